"""What checkpoint.py measures, and how; see there."""
