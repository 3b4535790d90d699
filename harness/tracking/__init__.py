"""Log a study to MLflow, one consumer of its events."""
