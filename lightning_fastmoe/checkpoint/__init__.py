"""Saving and resuming: checkpoints that fit any ranks. ``docs/checkpoint_format.md`` defines them.

``records``, ``manifest``, ``shards``, ``files``, ``plain``, ``publish`` and ``reader`` know the
format and torch alone; no process group, no optimizer.
"""

from lightning_fastmoe.checkpoint.manifest import FORMAT_VERSION, Manifest, Topology
from lightning_fastmoe.checkpoint.publish import Publication
from lightning_fastmoe.checkpoint.reader import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.records import TensorRecord
from lightning_fastmoe.checkpoint.shards import OwnedPiece

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
