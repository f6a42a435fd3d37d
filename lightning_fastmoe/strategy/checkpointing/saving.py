"""Saves runs: connects Lightning's hooks to the checkpoint package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities import rank_zero_warn

from lightning_fastmoe.checkpoint import Topology
from lightning_fastmoe.checkpoint.background import BackgroundWriter, ForegroundWriter
from lightning_fastmoe.checkpoint.format.discard import check_replaceable
from lightning_fastmoe.checkpoint.format.publish import put_back, remove
from lightning_fastmoe.checkpoint.lockstep import Together, meet_after_error
from lightning_fastmoe.checkpoint.model_map import map_model
from lightning_fastmoe.checkpoint.save import local_path
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.nn.experts.lora import SCALES, adapter_scales
from lightning_fastmoe.strategy.averaging import Averaging
from lightning_fastmoe.strategy.checkpointing.hook_edits import WeightNames
from lightning_fastmoe.strategy.checkpointing.pending_names import count_pending_names
from lightning_fastmoe.strategy.checks import (
    ACCUMULATION,
    attached_module,
    check_directories,
    check_links,
    fixed_paths,
    warn_within_batch,
)
from lightning_fastmoe.strategy.compiled import unwrap_compiled
from lightning_fastmoe.strategy.expert_groups import ExpertGroups
from lightning_fastmoe.strategy.watchdog.watch import Activity, Watch
from lightning_fastmoe.zero.engine import ExpertState
from lightning_fastmoe.zero.snapshot import take_snapshot


class Saving:
    """Writes checkpoints of a strategy whose state is sharded; one object per strategy.

    Args:
        strategy: the strategy with the engine to save.
        state: the MoE layers and optimizer groups of the engine.
        groups: the expert parallel groups.
        watch: records progress.
        averaging: adapter of the WeightAveraging callback.
        leave: tells the other ranks of an error here.
    """

    def __init__(
        self,
        strategy: DeepSpeedStrategy,
        state: ExpertState,
        groups: ExpertGroups,
        watch: Watch,
        averaging: Averaging,
        leave: Callable[[BaseException], None],
    ) -> None:
        self._strategy, self._state, self._groups = strategy, state, groups
        self._watch, self._averaging, self._leave = watch, averaging, leave
        self._in_background = False
        self._made_writer: BackgroundWriter | ForegroundWriter | None = None
        self._weight_names: WeightNames | None = None
        self._saves_after_error = 0

    def begin(self, trainer: pl.Trainer, in_background: bool) -> Callable[[], None]:
        """Prepares the directories and names that a run will save to.

        Args:
            trainer: the run's Trainer.
            in_background: write while training continues.

        Returns:
            A function that undoes it.

        Raises:
            CheckpointError: on all ranks, if something else has one of the names, or a checkpoint
                has just been restored.
            ConfigError: if a callback links to checkpoints that are still being written.
        """
        self._in_background = in_background
        if trainer.training:
            check_directories(trainer)
            self._check_names(trainer)
            self._put_back_names(trainer)
        if not in_background:
            return lambda: None
        check_links(trainer)
        return count_pending_names(trainer, self._is_pending)

    def state_dict(self) -> dict[str, Any]:
        """Names and shapes only: each rank writes its weights in :meth:`save`."""
        attached_module(self._strategy, "lightning_module_state_dict")
        self._weight_names = None
        try:
            model = map_model(self._strategy.deepspeed_engine.module, self._state.layers)
        except CheckpointError:
            return {}  # maybe on this rank only: save() raises it on all ranks together
        self._weight_names = WeightNames.of_model(model)
        return self._weight_names.state_dict()

    def save(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        """Writes a checkpoint directory; every rank calls this.

        Raises:
            CheckpointError: on all ranks, if one can't write, or if hooks have edited weights in
                ``checkpoint``; training may continue.
            ConfigError: for storage options, and if no Trainer has set up a model.
        """
        if storage_options is not None:
            raise ConfigError(
                "save_checkpoint(storage_options=...) is not supported: every rank writes its own"
                " files into a directory. Drop the argument."
            )
        with self._watch.during(Activity.SAVING):
            self._save(checkpoint, filepath)

    def _save(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        strategy = self._strategy
        module = attached_module(strategy, "save_checkpoint")
        trainer = module.trainer
        if trainer.interrupted:
            self._meet_after_error(local_path(filepath), trainer.global_step)
        warn_within_batch(trainer, filepath)
        unwrap_compiled(module)
        path = local_path(strategy.broadcast(filepath))
        user = self._state.user_groups
        together = Together(path, "saved")
        names, self._weight_names = self._weight_names, None
        if names is not None:
            with together.stage():
                names.check(checkpoint, len(trainer.optimizers), "on_save_checkpoint", trainer)
        with together.stage():
            # Pending edits of weights and of optimizer options are part of the state.
            strategy.deepspeed_engine.take_over_edits()
        if strategy.deepspeed_engine.mid_accumulation:
            checkpoint[ACCUMULATION] = trainer.accumulate_grad_batches
        if scales := adapter_scales(module):
            checkpoint[SCALES] = scales
        snapshot = take_snapshot(
            together,
            engine=strategy.deepspeed_engine,
            layers=self._state.layers,
            topology=self._topology(),
            client_state=checkpoint,
            user_groups=user.named() if user is not None else None,
            exclude_frozen=strategy.exclude_frozen_parameters,
            averages=self._averaging.averages(),
        )
        self._writer.submit(path, snapshot)
        if trainer.state.status != TrainerStatus.RUNNING:
            self._writer.wait()  # no later step could raise its error

    def poll(self) -> None:
        """Raises any error from the background writer."""
        if self._made_writer is not None:
            self._made_writer.poll()

    def _meet_after_error(self, path: Path, step: int) -> None:
        cause = sys.exception()
        try:
            meet_after_error(path, step, self._saves_after_error)
        except CheckpointError:
            if cause is not None:
                # Lightning calls the strategy's on_exception() after the callbacks', and not if one
                # of these raises: the others would never hear why this rank has left.
                self._leave(cause)
            raise
        self._saves_after_error += 1

    def wait(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self._made_writer is not None:
            self._made_writer.wait()

    def remove(self, filepath: Any) -> None:
        """Deletes a checkpoint, its name first, so that no partial one is ever found."""
        if self._strategy.is_global_zero:
            path = local_path(filepath)
            writer = self._made_writer or ForegroundWriter()
            writer.after_success(lambda: remove(path))

    def end(self) -> None:
        """Waits for the last checkpoint at the end of a run.

        Raises:
            CheckpointError: on all ranks, if it could not be written.
        """
        writer = self._made_writer
        try:
            if writer is not None:
                with self._watch.during(Activity.SAVING):
                    writer.wait()  # interrupted by Ctrl-C, it is waited for again
            self._made_writer = None
        except CheckpointError as error:
            self._made_writer = None
            assert self._strategy.lightning_module is not None
            if not self._strategy.lightning_module.trainer.interrupted:
                raise
            rank_zero_warn(str(error))  # the error that interrupted the run matters more

    @property
    def _writer(self) -> BackgroundWriter | ForegroundWriter:
        """The writer; created by the first save, on all ranks together."""
        if self._made_writer is None:
            self._made_writer = BackgroundWriter() if self._in_background else ForegroundWriter()
        return self._made_writer

    def _put_back_names(self, trainer: pl.Trainer) -> None:
        """Restores checkpoints that a killed run was replacing, so that ``"last"`` finds them.

        Raises:
            CheckpointError: on all ranks, if one was restored after this run looked for it.
        """
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        names: list[str] = []
        if self._strategy.is_global_zero:
            for folder in dict.fromkeys(str(c.dirpath) for c in callbacks if c.dirpath):
                with suppress(OSError):  # saving will report it
                    names += [f"{folder}/{name}" for name in put_back(Path(folder))]
        names = self._strategy.broadcast(names)
        if names and trainer.ckpt_path is None:
            raise CheckpointError(
                f"A run was stopped while it replaced {names[0]}, which was missing and has now"
                " been restored. It was not there when this run looked for a checkpoint to"
                " resume from. Start again, and 'last' finds it."
            )

    def _check_names(self, trainer: pl.Trainer) -> None:
        """Refuses paths that a save can't replace, now rather than hours later.

        Raises:
            CheckpointError: on all ranks, naming the path.
        """
        fault = ""
        if self._strategy.is_global_zero:
            try:
                for path in fixed_paths(trainer):
                    check_replaceable(path)
            except CheckpointError as error:
                fault = str(error)
        if fault := self._strategy.broadcast(fault):
            raise CheckpointError(fault)

    def _is_pending(self, path: Path) -> bool:
        writer = self._made_writer
        return isinstance(writer, BackgroundWriter) and writer.is_pending(local_path(path))

    def _topology(self) -> Topology:
        strategy = self._strategy
        assert isinstance(strategy.config, dict)
        return Topology(
            world_size=strategy.world_size,
            expert_parallel_size=self._groups.mesh.ep_size,
            zero_stage=strategy.config["zero_optimization"]["stage"],
            precision=str(strategy.precision_plugin.precision),
        )
