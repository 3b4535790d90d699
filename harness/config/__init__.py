"""Study definitions that validate themselves, protocols of their parts, and the events of a run."""
