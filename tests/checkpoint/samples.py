"""Small checkpoints made without any training, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fastmoe.checkpoint import Manifest, OwnedFragment, Publication, Topology
from lightning_fastmoe.checkpoint.format.writer import (
    pack_rank_state,
    pack_state,
    write_manifest,
    write_rank,
)

STATE = {
    "lightning": {"epoch": 1, "global_step": 3, "callbacks": {"a": (1, 2.5)}},
    "optimizer": {
        "class": "AdamW",
        "groups": [{"params": ["head.weight"], "options": {"lr": 0.5, "betas": (0.9, 0.99)}}],
        "user_groups": [{"params": ["head.weight"], "options": {"lr": 0.5}}],
        "scalars": [{"params": ["head.weight"], "values": {"step": torch.tensor(3.0)}}],
    },
    "engine": {"counters": {"global_steps": 3}, "loss_scaler": {"cur_scale": 1.0}},
    "extra_state": {},
}


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every kind: a matrix, experts, a scalar, an empty one, other dtypes."""
    g = torch.Generator().manual_seed(seed)
    return {
        "weights/head.weight": torch.randn(5, 7, generator=g),
        "weights/moe.experts.up_proj": torch.randn(4, 3, 2, generator=g),
        "weights/half": torch.randn(9, generator=g).to(torch.bfloat16),
        "weights/mask": torch.randn(11, generator=g) > 0,
        "weights/nothing": torch.empty(0, 3),
        "weights/seen": torch.tensor(7),
        "optimizer/exp_avg/head.weight": torch.randn(5, 7, generator=g),
        "optimizer/exp_avg_sq/head.weight": torch.randn(5, 7, generator=g),
    }


def fragments_of(tensors: dict[str, Tensor], ranks: int) -> list[list[OwnedFragment]]:
    """Each tensor cut into uneven fragments, one for each rank."""
    result: list[list[OwnedFragment]] = [[] for _ in range(ranks)]
    for i, (name, tensor) in enumerate(tensors.items()):
        flat = tensor.reshape(-1)
        cuts = [0, *sorted((i + r * flat.numel()) // ranks for r in range(1, ranks)), flat.numel()]
        cuts = [min(c, flat.numel()) for c in cuts]
        for rank, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if start < stop or (flat.numel() == 0 and rank == 0):
                fragment = OwnedFragment.of(name, tuple(tensor.shape), start, flat[start:stop])
                result[rank].append(fragment)
    return result


def make_manifest(**changes: Any) -> Manifest:
    about: dict[str, Any] = {
        "written_by": "test",
        "contents": ("weights", "optimizer"),
        "topology": Topology(2, 1, 2, "32-true"),
        "progress": {"epoch": 1, "global_step": 3},
        "moe_layers": {"moe": 4},
    }
    return Manifest(**{**about, **changes})


def small_files(rank: int) -> dict[str, bytes]:
    own = pack_rank_state(rank, {"rng": {"torch": b"\0\1"}, "loaders": None})
    return own | pack_state(STATE) if rank == 0 else own


def write_sample(path: Path, tensors: dict[str, Tensor] | None = None, ranks: int = 2) -> Path:
    """A complete checkpoint of ``ranks`` ranks."""
    publication = Publication(path)
    written = [
        write_rank(publication.directory, rank, fragments, small_files(rank))
        for rank, fragments in enumerate(fragments_of(tensors or make_tensors(), ranks))
    ]
    layers = {"moe": 4} if "weights/moe.experts.up_proj" in (tensors or make_tensors()) else {}
    write_manifest(publication.directory, make_manifest(moe_layers=layers), written)
    publication.commit()
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def write_manifest_again(path: Path, content: Any) -> None:
    """As someone who knows the format would forge it: with the right checksum."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / "manifest.json").write_bytes(data)
    line = f"{hashlib.sha256(data).hexdigest()}  manifest.json\n"
    (path / "manifest.sha256").write_text(line)


def forge_file(path: Path, name: str, data: bytes) -> None:
    """Puts other bytes into a file and makes the manifest agree."""
    (path / name).write_bytes(data)
    content = read_manifest(path)
    for row in content["files"]:
        if row[0] == name:
            row[1:] = [len(data), hashlib.sha256(data).hexdigest()]
    write_manifest_again(path, content)


def write_state(path: Path, **changes: Any) -> None:
    """Puts other JSON values into ``state.json``, as they are written there."""
    state = json.loads((path / "state.json").read_text())
    forge_file(path, "state.json", json.dumps({**state, **changes}).encode())


def add_file(path: Path, name: str, data: bytes) -> None:
    """Adds a file, and lists it in its place by name; fragments know files by their number."""
    (path / name).write_bytes(data)
    content = read_manifest(path)
    place = sum(row[0] < name for row in content["files"])
    content["files"].insert(place, [name, len(data), hashlib.sha256(data).hexdigest()])
    for tensor in content["tensors"].values():
        for fragment in tensor["pieces"]:
            fragment[2] += fragment[2] >= place
    write_manifest_again(path, content)


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload
