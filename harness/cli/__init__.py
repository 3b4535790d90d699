"""Commands, messages, exit codes."""
