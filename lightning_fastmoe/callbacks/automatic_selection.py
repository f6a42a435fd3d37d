"""Chooses single experts when a fit begins, or takes those that its checkpoint was trained with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_fastmoe.callbacks.expert_selection import By, check_options, select_among
from lightning_fastmoe.callbacks.single_experts import apply_selection, check_selection
from lightning_fastmoe.checkpoint import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.format.publish import resolve
from lightning_fastmoe.checkpoint.save import local_path
from lightning_fastmoe.checkpoint.sources.single_file import open_file
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts.trained import trained_of
from lightning_fastmoe.strategy.early_steps import (
    before_optimizers,
    check_strategy,
    early_batches,
    early_steps,
)
from lightning_fastmoe.zero.trained_experts import is_partitioned

MEASURES: dict[str, By] = {"by_load": "load", "by_gate": "gate"}
"""Values of ``SparseUpdate(experts=)`` -> those of ``select_experts(by=)``."""

Chosen = dict[str, list[int]]


class AutomaticSelection:
    """The selection of a ``SparseUpdate`` that looks at the first training batches.

    Args:
        by: a key of :data:`MEASURES`.
        batches: how many, on each rank.
        share: see :func:`~lightning_fastmoe.select_experts`.
        budget: see :func:`~lightning_fastmoe.select_experts`.

    Attributes:
        chosen: layer's name -> ids of experts; None before the first fit.
        restored: the callback's state in a checkpoint that Lightning has read before set-up.

    Raises:
        ConfigError: if an argument is out of range.
    """

    def __init__(
        self, by: str, batches: int, share: float | None, budget: int | float | None
    ) -> None:
        if type(batches) is not int or batches < 1:
            raise ConfigError(f"batches={batches!r} must be a number of batches, at least 1.")
        check_options(MEASURES[by], share, budget)
        self._by, self._batches, self._share, self._budget = by, batches, share, budget
        self._cancel: Callable[[], None] | None = None
        self.chosen: Chosen | None = None
        self.restored: Mapping[str, Any] | None = None

    def begin(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        state_key: str,
        prefix: Callable[[], set[int]],
        apply: Callable[[], None],
    ) -> None:
        """At set-up: arranges that experts are chosen before the optimizers are made.

        Args:
            trainer: fits.
            module: the model, perhaps not yet built.
            state_key: of the callback in checkpoints.
            prefix: gives the ids of the parameters before the first trained block.
            apply: freezes what :attr:`chosen` says.

        Raises:
            ConfigError: if the strategy can't run the model then.
        """
        check_strategy(trainer)
        self.end()
        self.restored = None

        path = path_to_resume_from(trainer)

        def choose() -> None:
            self._cancel = None
            if not any(True for _ in expert_layers(module)):
                raise ConfigError("SparseUpdate found no MoE layer in the model: add one.")
            if path is not None:
                self.chosen = self._resumed(local_path(path), state_key)
            elif self.chosen is None or _trained(module) != self.chosen:
                self.chosen = self._choose(trainer, module, prefix)
            apply()

        self._cancel = before_optimizers(module, choose)

    def end(self) -> None:
        """Cancels what :meth:`begin` arranged."""
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _choose(
        self, trainer: pl.Trainer, module: pl.LightningModule, prefix: Callable[[], set[int]]
    ) -> Chosen:
        if any(is_partitioned(p) for p in module.parameters()):
            raise ConfigError(
                f"SparseUpdate(experts={self._by!r}) can't run a model that an earlier fit with"
                " ZeRO 3 left partitioned: start from a new model, or name the experts."
            )
        apply_selection(module, {})  # an earlier one, of which this model may hold the rest frozen
        frozen = prefix()
        layers = {
            name: layer
            for name, layer in expert_layers(module)
            if not any(id(p) in frozen for p in layer.experts.parameters())
        }
        batches = early_batches(trainer, self._batches)
        with early_steps(trainer, module) as step:
            try:
                return select_among(
                    module, layers, batches, MEASURES[self._by], self._share, self._budget, step
                )
            except Exception as error:
                error.add_note(
                    f"SparseUpdate(experts={self._by!r}) was running training_step before the"
                    " optimizers exist, in evaluation mode. If that can't work, choose experts by"
                    " select_experts() and pass them as experts={...}."
                )
                raise

    def _resumed(self, path: Path, state_key: str) -> Chosen:
        """The selection in the checkpoint from which the fit will go on."""
        state: Any = self.restored
        if state is None:
            state = _callback_states(path).get(state_key)
        if state is None:
            raise CheckpointError(
                f"{path} was saved without SparseUpdate, so it has no selection to go"
                " on with. To choose experts and start from its weights, use"
                " lightning_fastmoe.checkpoint.weights.load_weights."
            )
        experts = state.get("experts")
        if not isinstance(experts, dict):
            raise CheckpointError(
                f"{path} was trained with SparseUpdate(experts={experts!r}), and this"
                f" run has experts={self._by!r}: resume with the same, or start from its weights"
                " by lightning_fastmoe.checkpoint.weights.load_weights."
            )
        checked = check_selection(experts)
        assert isinstance(checked, dict)
        return {str(name): ids for name, ids in checked.items()}


def path_to_resume_from(trainer: pl.Trainer) -> Any:
    """The checkpoint of the fit that is being set up; None if it starts anew.

    Strategies that restore it after set-up have ``trainer.ckpt_path`` only then: until that, it is
    known to the Trainer's own call alone.
    """
    run: Any = pl.Trainer._run
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is run.__code__ and frame.f_locals.get("self") is trainer:
            return frame.f_locals["ckpt_path"]
        frame = frame.f_back
    raise ConfigError("SparseUpdate chooses experts within trainer.fit() alone: name them instead.")


def _trained(module: pl.LightningModule) -> Chosen:
    """The experts that are parameters of their own already."""
    found = {name: trained_of(layer.experts.holder) for name, layer in expert_layers(module)}
    return {name: list(part.expert_ids) for name, part in found.items() if part is not None}


def _callback_states(path: Path) -> Mapping[str, Any]:
    """The states of callbacks in a checkpoint, without its tensors."""
    if path.is_file():
        state = open_file(path, trusted=False).read_state()
    elif is_checkpoint(resolve(path)):
        with CheckpointReader(path) as reader:
            state = reader.read_state()
    else:
        return {}  # DeepSpeed's, or none: loading it says so
    states: Any = state["lightning"].get("callbacks")
    return states if isinstance(states, Mapping) else {}
