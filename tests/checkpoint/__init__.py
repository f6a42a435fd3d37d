"""A package, as a plain folder would give way to benchmarks/checkpoint.py, which is on the path."""
