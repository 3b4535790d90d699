"""Data sets, and loading their images as tensors (`harness.data.splits`)."""
