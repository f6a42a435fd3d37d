"""Parts of the single-layer benchmarks: problems, peers, measurements, tables."""
