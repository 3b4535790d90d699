"""Backbones: each a frozen dataclass that builds the model it describes."""
