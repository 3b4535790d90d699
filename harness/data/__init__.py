"""Data sets, and the one way from their images to tensors (`harness.data.splits`)."""
