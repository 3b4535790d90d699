"""Errors, seeds, files, versions, number formatting; independent of studies."""
