"""Which configuration is next, and when a trial stops."""
