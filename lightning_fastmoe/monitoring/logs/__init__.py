"""The files in which runs keep what their experts did. Standard library only."""
