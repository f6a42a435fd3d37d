"""A sharded checkpoint's weights, read into a model that is whole on each rank, for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pytorch_lightning.strategies import Strategy
from typing_extensions import override

from lightning_fastmoe.checkpoint import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.format.publish import resolve
from lightning_fastmoe.checkpoint.save import local_path
from lightning_fastmoe.checkpoint.weights import load_weights
from lightning_fastmoe.checkpoint.whole import extra_state
from lightning_fastmoe.errors import CheckpointError


class LoadsDirectories(Strategy):
    """Of strategies that evaluate: ``ckpt_path`` may be a directory of ``FastMoEStrategy``, too.

    Each parameter is read into the memory that it has, so there is no second copy of the model.
    """

    _loaded: dict[str, Any] | None = None

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a directory's weights and extra states, or reads one of Lightning's files.

        Returns:
            What Lightning expects of a checkpoint; of a directory, with the model's own tensors.

        Raises:
            CheckpointError: if a directory is damaged or does not fit the model.
        """
        module, path = self.lightning_module, resolve(local_path(checkpoint_path))
        if module is None or not is_checkpoint(path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        load_weights(path, module, strict=module.strict_loading)
        with CheckpointReader(path) as reader:
            state = reader.read_state()
        modules = dict(module.named_modules())
        for name, value in extra_state(state).items():
            owner = modules.get(name.rpartition(".")[0])
            if owner is not None:
                owner.set_extra_state(value)
        self._loaded = module.state_dict()
        checkpoint: dict[str, Any] = {**state["lightning"], "state_dict": dict(self._loaded)}
        checkpoint.setdefault("pytorch-lightning_version", version("pytorch-lightning"))
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Of a directory, loads what ``on_load_checkpoint`` has put into the place of weights.

        Raises:
            CheckpointError: if it has removed weights, which have been loaded already.
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
        edits = {name: value for name, value in weights.items() if loaded.get(name) is not value}
        if edits:
            is_new = strict and not edits.keys() <= loaded.keys()  # an error that names them
            super().load_model_state_dict({"state_dict": weights if is_new else edits}, is_new)
