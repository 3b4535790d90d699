"""Reports from the storage: text, JSON, tables, one HTML page."""
