"""A study as data that checks itself, what may be plugged into it, and the events that a run yields."""
