"""A page that shows what a run's experts did. Standard library only, so that it comes at once."""
