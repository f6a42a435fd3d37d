"""Everything that knows DeepSpeed's private names: its engine, its groups, where its state lies.

Another engine would be another folder.
"""

from lightning_fastmoe.zero import config as _config  # noqa: F401  before DeepSpeed is imported
