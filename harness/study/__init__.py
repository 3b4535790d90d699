"""Run a study from its first trial to the published model."""
