"""One study in one database, and who works on it."""
