"""One script per claim; `RESULTS.md` has the results."""
