"""One training, from its configuration to the last bit of its checkpoint."""
