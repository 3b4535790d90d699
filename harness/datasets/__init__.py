"""The data sets that a study file can name."""
