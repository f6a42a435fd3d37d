"""Estimates of a run's parameter counts and memory before it starts."""
