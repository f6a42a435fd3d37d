"""What a run will need, before it starts: parameters and memory."""
