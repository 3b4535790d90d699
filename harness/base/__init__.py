"""Errors, seeds, files, versions, the wording of numbers: it knows nothing of studies."""
