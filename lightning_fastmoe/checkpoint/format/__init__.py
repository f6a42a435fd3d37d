"""Reads and writes the files of a checkpoint, as ``docs/checkpoint_format.md`` specifies them.

Depends only on torch: no process groups, optimizers or models.
"""
