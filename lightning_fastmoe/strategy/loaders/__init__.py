"""Data loaders: ranks with different numbers of batches, and resuming within an epoch."""
