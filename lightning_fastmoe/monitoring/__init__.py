"""What a run's experts do: metrics, the callbacks that log them, their logs, and a report."""
