"""A sharded checkpoint's weights, read into a model that is whole on each rank, for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor, nn
from typing_extensions import override

from lightning_fastmoe.checkpoint import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.extra_states import unknown_state
from lightning_fastmoe.checkpoint.format.publish import resolve
from lightning_fastmoe.checkpoint.save import local_path
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.checkpoint.whole import WEIGHTS_ONLY
from lightning_fastmoe.errors import CheckpointError


class LoadsDirectories(Strategy):
    """Of strategies that evaluate: ``ckpt_path`` may be a directory of ``FastMoEStrategy``, too.

    Each parameter is read into the memory that it has, so there is no second copy of the model.
    """

    _loaded: dict[str, Any] | None = None

    @property
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Those whose memory other processes read: hooks can't edit them."""
        return ()

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a directory's weights and extra states, or reads one of Lightning's files.

        Returns:
            What Lightning expects of a checkpoint; of a directory, with the model's own tensors.

        Raises:
            CheckpointError: if a directory is damaged or does not fit the model, or holds more than
                plain data without ``weights_only=False``.
        """
        self._loaded = None
        module = self.lightning_module
        path = None if _is_remote(checkpoint_path) else resolve(local_path(checkpoint_path))
        if module is None or path is None or not is_checkpoint(path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        trusted, strict = weights_only is False, module.strict_loading
        with CheckpointReader(path) as reader:
            reader.advice = WEIGHTS_ONLY
            state = reader.read_state(trusted=trusted)
        load_weights(path, module, strict=strict, trusted=trusted)
        loaded: dict[str, Any] = module.state_dict()
        if strict and (unknown := state["extra_state"].keys() - loaded.keys()):
            raise unknown_state(path, min(unknown))
        shared = {id(parameter) for parameter in self.shared_parameters}
        named = module.named_parameters(remove_duplicate=False)
        self._loaded = loaded | {name: _shape_of(p) for name, p in named if id(p) in shared}
        checkpoint: dict[str, Any] = {**state["lightning"], "state_dict": dict(self._loaded)}
        checkpoint.setdefault("pytorch-lightning_version", version("pytorch-lightning"))
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Of a directory, loads what ``on_load_checkpoint`` has put into the place of weights.

        Raises:
            CheckpointError: if it has removed weights, which have been loaded already, or edited
                some that processes share.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        weights = checkpoint["state_dict"]
        if missing := sorted(loaded.keys() - weights.keys()):
            raise CheckpointError(
                f"on_load_checkpoint has removed {missing[0]} from the checkpoint, and it has been"
                " loaded already. Leave weights there, or put others into their place."
            )
        module = self.lightning_module
        assert module is not None
        every = (module.named_parameters, module.named_buffers)
        own = {name for named in every for name, _ in named(remove_duplicate=False)}
        # What is neither may be a copy, which a hook has edited in its place.
        edits = {n: v for n, v in weights.items() if n not in own or loaded.get(n) is not v}
        for name, value in loaded.items():
            is_shared = isinstance(value, Tensor) and value.is_meta
            if is_shared and (name in edits or value._version):
                raise CheckpointError(
                    f"on_load_checkpoint has changed {name}, and it has been loaded already, into"
                    " memory that several processes share. Edit the file that `lightning-fastmoe"
                    " checkpoint consolidate` writes, and load that."
                )
        if edits:
            is_new = strict and not edits.keys() <= loaded.keys()  # an error that names them
            everything = {**module.state_dict(), **edits} if is_new else edits
            super().load_model_state_dict({"state_dict": everything}, is_new)


def _is_remote(path: Any) -> bool:
    """Whether Lightning reads it, by fsspec: directories are local."""
    return "://" in str(path) and not str(path).startswith("file://")


def _shape_of(parameter: Tensor) -> Tensor:
    """Stands for values that nobody may change."""
    with torch.inference_mode(False):  # inference tensors don't count writes
        return torch.empty_like(parameter, device="meta")
