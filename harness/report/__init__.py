"""What the storage says, to people: lines, JSON, tables, one HTML page."""
