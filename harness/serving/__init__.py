"""The final model as files, and what answers with it."""
