"""Loads a checkpoint's weights into a module before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fastmoe.checkpoint.extra_states import load_extra_states
from lightning_fastmoe.checkpoint.format.fragment import Fragment
from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.records import TensorRecord
from lightning_fastmoe.checkpoint.format.tensor_names import WEIGHTS, repeats_rows, weight_name
from lightning_fastmoe.checkpoint.format.threads import thread_count
from lightning_fastmoe.checkpoint.lockstep import Together
from lightning_fastmoe.checkpoint.matching import check_experts, check_names, check_shapes
from lightning_fastmoe.checkpoint.model_map import ModelMap, map_model
from lightning_fastmoe.checkpoint.sources.directory import DirectorySource
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts.lora import SCALES, adapter_scales, check_same_scales
from lightning_fastmoe.nn.placement import settle_placement

_ADVICE = (
    "If you trust the checkpoint's origin, load_weights(path, module, trusted=True) loads the extra"
    " states of its modules, which may be any objects."
)


def load_weights(
    path: Path | str,
    module: nn.Module,
    *,
    prefix: str = "",
    strict: bool = True,
    verify: bool = True,
    trusted: bool = False,
) -> None:
    """Loads a checkpoint's weights into a module, to train from there.

    Call it at the end of ``configure_model``, on all ranks if there are several. Each rank reads
    the dense weights and the experts that it has created, converted to the dtype of its parameters,
    and what its modules' ``get_extra_state()`` returned.
    Optimizer states, counters and random number generators are left alone; to resume a run, pass
    its checkpoint to ``Trainer.fit(ckpt_path=...)`` instead.

    Args:
        path: a checkpoint, saved by a run or written by an import.
        module: the module to load into.
        prefix: the prefix of the module's names in the checkpoint, such as "network.".
        strict: names must match exactly; otherwise, missing weights keep their values.
        verify: compare the files with their hashes first; each is read by one rank.
        trusted: also unpickle arbitrary objects, which can run any code; for extra states alone.

    Raises:
        ConfigError: if ZeRO stage 3 has partitioned the parameters already.
        CheckpointError: on all ranks, if the checkpoint is damaged or does not fit the module.
    """
    settle_placement()
    model = map_model(module, dict(expert_layers(module)))
    if any(hasattr(parameter, "ds_id") for parameter, _ in model.parameters.values()):
        raise ConfigError(
            "load_weights: ZeRO stage 3 has partitioned the module's parameters already. Call it in"
            " configure_model, or pass the checkpoint to validate, test or predict."
        )
    if not (dist.is_available() and dist.is_initialized()):
        _load(path, model, prefix, strict, (0, 1) if verify else None, thread_count(1), trusted)
        return
    together = Together(Path(path), "loaded")
    threads = thread_count(together.ranks_on_host())
    verifier = (together.rank, together.world_size) if verify else None
    with together.stage():
        _load(path, model, prefix, strict, verifier, threads, trusted)


def _load(
    path: Path | str,
    model: ModelMap,
    prefix: str,
    strict: bool,
    verifier: tuple[int, int] | None,
    threads: int,
    trusted: bool,
) -> None:
    with CheckpointReader(path) as reader:
        reader.advice, reader.threads = _ADVICE, threads
        source = _Inside(reader, prefix)
        check_experts(source, model)
        check_names(source, model, strict)
        check_shapes(source, model)
        _check_scales(reader, model, prefix)
        if verifier is not None:
            source.check(*verifier, ("weights",))
        with torch.no_grad():
            for name, (parameter, fragment) in model.parameters.items():
                if not repeats_rows(name):
                    _fill(source, name, fragment.start, parameter)
                    continue
                flat = parameter.detach().view(-1)
                for stack, start, part in model.in_stack(name, Fragment(0, fragment.length)):
                    if weight_name(stack) in source.tensors:
                        source.read_into(weight_name(stack), start, part.within(flat))
            for name, buffer in model.buffers.items():
                _fill(source, name, 0, buffer)
            stored = source.read_state(trusted=trusted)["extra_state"] if model.extra() else {}
            load_extra_states(source, model, stored, strict=strict)


def _check_scales(reader: CheckpointReader, model: ModelMap, prefix: str) -> None:
    """Refuses adapters that the checkpoint's run multiplied by another number."""
    scales = adapter_scales(model.module)
    if any(weight_name(prefix + name) in reader.manifest.tensors for name in scales):
        stored = reader.read_state()["lightning"].get(SCALES) or {}
        inside = {n.removeprefix(prefix): s for n, s in stored.items() if n.startswith(prefix)}
        check_same_scales(inside, model.module)


def _fill(source: _Inside, name: str, start: int, target: Tensor) -> None:
    if weight_name(name) in source.tensors:
        flat = target.detach()
        whole = flat if flat.is_contiguous() else torch.empty_like(flat).contiguous()
        source.read_into(weight_name(name), start, whole.view(-1))
        if whole is not flat:
            flat.copy_(whole)


class _Inside(DirectorySource):
    """The part of a checkpoint whose names have a prefix, with the prefix removed."""

    def __init__(self, reader: CheckpointReader, prefix: str) -> None:
        super().__init__(reader)
        self._prefix = prefix
        start = weight_name(prefix)
        self._tensors = {
            weight_name(name.removeprefix(start)): record
            for name, record in reader.manifest.tensors.items()
            if name.startswith(start)
        }

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        return self._tensors

    @property
    def excluded(self) -> tuple[str, ...]:
        return tuple(n.removeprefix(self._prefix) for n in super().excluded)

    @property
    def tied(self) -> Mapping[str, str]:
        pairs = super().tied.items()
        return {n.removeprefix(self._prefix): f.removeprefix(self._prefix) for n, f in pairs}

    @property
    def moe_layers(self) -> Mapping[str, int]:
        return {n.removeprefix(self._prefix): e for n, e in super().moe_layers.items()}

    def read_state(self, *, trusted: bool = False) -> dict[str, Any]:
        state = super().read_state(trusted=trusted)
        named = state["extra_state"].items()
        start = self._prefix
        extra = {n.removeprefix(start): value for n, value in named if n.startswith(start)}
        return {**state, "extra_state": extra}

    def read_into(self, tensor: str, start: int, out: Tensor) -> None:
        super().read_into(weight_name(self._prefix + tensor[len(WEIGHTS) + 1 :]), start, out)
