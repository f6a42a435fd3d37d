"""Callbacks that observe a run without changing it. Users import them from ``callbacks``."""
