"""Sharded checkpoints that resume on any number of ranks.

``format`` reads and writes the files that ``docs/checkpoint_format.md`` specifies, ``sources`` has
one class for each kind of checkpoint that can be loaded, and ``tools`` works on checkpoints outside
of runs. The modules of this folder itself are what the ranks of a run do together.
"""

from lightning_fastmoe.checkpoint.format.manifest import FORMAT_VERSION, Manifest, Topology
from lightning_fastmoe.checkpoint.format.publish import Publication
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment

OwnedPiece = OwnedFragment
"""The former name of :class:`OwnedFragment`; what was passed by position now needs names."""

__all__ = [
    "FORMAT_VERSION",
    "CheckpointReader",
    "Manifest",
    "OwnedFragment",
    "OwnedPiece",
    "Publication",
    "TensorRecord",
    "Topology",
    "is_checkpoint",
]
