"""A hyperparameter-search harness for fine-tuning image classifiers. Start reading at `run_study.py`."""

__version__ = "0.1.0"
