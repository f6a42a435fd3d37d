"""Saves a checkpoint: each rank writes what it owns, rank 0 the manifest; nothing is gathered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from lightning_fastmoe.checkpoint.format.layout import files_per_rank
from lightning_fastmoe.checkpoint.format.manifest import Manifest
from lightning_fastmoe.checkpoint.format.publish import Publication, saving_name
from lightning_fastmoe.checkpoint.format.shards import OwnedFragment
from lightning_fastmoe.checkpoint.format.threads import thread_count
from lightning_fastmoe.checkpoint.format.writer import (
    write_manifest,
    write_rank,
)
from lightning_fastmoe.checkpoint.lockstep import Together
from lightning_fastmoe.errors import CheckpointError


@dataclass
class Snapshot:
    """What a rank will write.

    Attributes:
        fragments: tensors that the rank owns; views of the live state unless they were copied.
        small: file name -> content, for everything that is not a tensor.
        manifest: the manifest on rank 0; None on the other ranks.
    """

    fragments: list[OwnedFragment]
    small: dict[str, bytes] = field(default_factory=dict)
    manifest: Manifest | None = None


def local_path(path: Any) -> Path:
    """Converts to a file-system path.

    Raises:
        CheckpointError: if it is a URL.
    """
    text = str(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" in text:
        raise CheckpointError(
            f"{path} is not a file-system path: checkpoints are directories that all ranks write"
            " to at once, and that are renamed in one step. Save to a file system that they"
            " share, and copy the finished directory to where you want it."
        )
    return Path(text)


def write(path: Path, snapshot: Snapshot, group: Any = None) -> None:
    """Writes a checkpoint; every rank calls this with its own snapshot.

    Args:
        path: the same on all ranks, on a file system that they share.
        snapshot: the snapshot of this rank.
        group: the ranks; None is the world.

    Raises:
        CheckpointError: on every rank, naming the rank and the path that failed. Nothing on the
            disk has changed then.
    """
    together = Together(path, "saved", group)
    publication: Publication | None = None
    try:
        with together.stage():
            if together.rank == 0:
                publication = Publication(path)
        token = together.gather(publication.token if publication is not None else "")[0]
        threads = thread_count(together.ranks_on_host())
        with together.stage():
            directory = saving_name(path, token)
            written = write_rank(
                directory,
                together.rank,
                snapshot.fragments,
                snapshot.small,
                max_files=files_per_rank(together.world_size),
                threads=threads,
            )
        everything = together.gather(written)
        with together.stage():
            if publication is not None and snapshot.manifest is not None:
                write_manifest(publication.directory, snapshot.manifest, everything)
                publication.commit()
    except BaseException:
        if publication is not None:
            publication.abort()
        raise


def warn_of_objects(small: Mapping[str, bytes]) -> None:
    """Warns on saving of objects that loading will refuse."""
    for name, content in small.items():
        if name.endswith(".pt"):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(BytesIO(content))
            if unsafe:
                warnings.warn(
                    f"The checkpoint holds objects that are not plain data ({', '.join(unsafe)})."
                    " Loading it will need torch.serialization.add_safe_globals([...]) or"
                    " FastMoEStrategy(trust_checkpoints=True).",
                    stacklevel=2,
                )


def loaders_of(client_state: dict[str, Any]) -> Any:
    """The state of this rank's data loaders, if they have any; each rank has its own."""
    with suppress(KeyError, TypeError):
        return client_state["loops"]["fit_loop"]["state_dict"].get("combined_loader")
    return None


def set_loaders(client_state: dict[str, Any], states: Any) -> None:
    """Replaces the state that :func:`loaders_of` returns."""
    client_state["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states


def batches_of_epoch(client_state: dict[str, Any]) -> int:
    """Number of batches of the current epoch that each rank has processed; 0 between epochs."""
    with suppress(KeyError, TypeError):
        progress = client_state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        return 0 if progress["is_last_batch"] else int(progress["current"]["processed"])
    return 0
