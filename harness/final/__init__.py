"""Choose a configuration, retrain it, and measure its test accuracy."""
