"""Which configuration is next, how it is evaluated, and when it stops."""
