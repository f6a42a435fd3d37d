"""Callbacks that watch a run and change nothing. Users import them from ``callbacks``."""
