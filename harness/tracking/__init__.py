"""MLflow, one consumer of events among others."""
