"""Log files about a run's experts. Uses only the standard library."""
