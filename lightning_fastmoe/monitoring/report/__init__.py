"""The HTML report about a run's experts. Uses only the standard library, so that it starts fast."""
