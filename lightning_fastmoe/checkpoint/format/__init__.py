"""The format: what a checkpoint's files hold. ``docs/checkpoint_format.md`` defines it.

It knows torch alone: no process group, no optimizer, no model.
"""
