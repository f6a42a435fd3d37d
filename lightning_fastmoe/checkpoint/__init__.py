"""Saving and resuming: checkpoints that fit any ranks. ``docs/checkpoint_format.md`` defines them.

``format`` knows the files, ``sources`` what can be loaded from, and ``tools`` what is done outside
of runs. What stands beside them is what the ranks of a run do together.
"""

from lightning_fastmoe.checkpoint.format.manifest import FORMAT_VERSION, Manifest, Topology
from lightning_fastmoe.checkpoint.format.publish import Publication
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.shards import OwnedPiece

__all__ = [
    "FORMAT_VERSION",
    "CheckpointReader",
    "Manifest",
    "OwnedPiece",
    "Publication",
    "TensorRecord",
    "Topology",
    "is_checkpoint",
]
