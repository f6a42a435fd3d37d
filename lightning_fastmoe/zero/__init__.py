"""All uses of DeepSpeed's private names: its engine, its groups, and the layout of its state.

Another engine would be another folder.
"""

from lightning_fastmoe.zero import config as _config  # noqa: F401  before DeepSpeed is imported
