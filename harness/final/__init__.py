"""From the chosen configuration to a test accuracy that can be believed."""
