"""Monitoring of experts: metrics, callbacks that log them, log files, and an HTML report."""
