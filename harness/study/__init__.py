"""A study from its first trial to its published end."""
