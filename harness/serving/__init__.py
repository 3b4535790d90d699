"""The final model: files, registry, predictions, web pages."""
