"""Worker processes that do the training."""
