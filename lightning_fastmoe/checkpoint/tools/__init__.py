"""Tools for checkpoints outside of runs, in one process; ``cli.checkpoint`` has their commands."""
