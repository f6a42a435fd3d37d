"""What is done with checkpoints outside of runs, in one process. The command line is ``cli``."""
