"""Samplers, pruners, and the evaluation of trials."""
