"""Errors, seeds, files, versions, number formatting; independent of studies."""

__version__ = "0.1.0"
