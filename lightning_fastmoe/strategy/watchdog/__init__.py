"""How a run ends that hangs, fails on one rank, or is told to end: within a time, with a reason."""
