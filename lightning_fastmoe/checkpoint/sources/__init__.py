"""Readers for the kinds of checkpoints that can be loaded: ours, single files, DeepSpeed's."""
