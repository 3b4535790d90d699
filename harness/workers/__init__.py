"""Other processes that do the training."""
