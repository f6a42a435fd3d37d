"""Resumes runs: connects Lightning's hooks to the checkpoint package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities import rank_zero_warn

from lightning_fastmoe.checkpoint import CheckpointReader, is_checkpoint
from lightning_fastmoe.checkpoint.format.publish import resolve
from lightning_fastmoe.checkpoint.format.threads import thread_count
from lightning_fastmoe.checkpoint.lockstep import Together
from lightning_fastmoe.checkpoint.random_state import set_random_state
from lightning_fastmoe.checkpoint.save import batches_of_epoch, loaders_of, local_path, set_loaders
from lightning_fastmoe.checkpoint.sources.base import Source
from lightning_fastmoe.checkpoint.sources.deepspeed import find_deepspeed, open_deepspeed
from lightning_fastmoe.checkpoint.sources.directory import DirectorySource
from lightning_fastmoe.checkpoint.sources.single_file import open_file
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.nn.experts.lora import SCALES, check_same_scales
from lightning_fastmoe.strategy.averaging import Averaging
from lightning_fastmoe.strategy.checkpointing.hook_edits import WeightNames
from lightning_fastmoe.strategy.checks import (
    ACCUMULATION,
    attached_module,
    check_order_is_known,
    check_same_accumulation,
)
from lightning_fastmoe.strategy.loaders.resumable import for_other_ranks, is_own_state
from lightning_fastmoe.strategy.watchdog.watch import Activity, Watch
from lightning_fastmoe.zero.averages import has_training_weights
from lightning_fastmoe.zero.engine import ExpertState
from lightning_fastmoe.zero.restore import Loaded, load


class Loading:
    """Restores checkpoints into the engine of a strategy; one object per strategy.

    Some of the state is applied later, when Lightning no longer overwrites it: random number
    generators when the loaders are created, gradients when training starts.

    Args:
        strategy: the strategy with the engine to restore.
        state: the MoE layers and optimizer groups of the engine.
        watch: records progress.
        averaging: adapter of the WeightAveraging callback.
    """

    def __init__(
        self,
        strategy: DeepSpeedStrategy,
        state: ExpertState,
        watch: Watch,
        averaging: Averaging,
    ) -> None:
        self._strategy, self._state = strategy, state
        self._watch, self._averaging = watch, averaging
        self._weight_names: WeightNames | None = None
        self._random_state: dict[str, Any] | None = None
        self._put_gradients: Callable[[], None] | None = None
        self._accumulation: int | None = None

    def load(self, checkpoint_path: Any, *, verify: bool, trusted: bool) -> dict[str, Any]:
        """Restores a checkpoint into the engine; every rank calls this.

        Args:
            checkpoint_path: a checkpoint of this package, of DeepSpeed, or of another strategy.
            verify: compare files with their hashes.
            trusted: also unpickle objects that are not plain data.

        Raises:
            CheckpointError: on all ranks, if it is damaged or does not fit.
            ConfigError: if no Trainer has set up a model.
        """
        with self._watch.during(Activity.LOADING):
            return self._load_into_engine(checkpoint_path, verify, trusted)

    def _load_into_engine(
        self, checkpoint_path: Any, verify: bool, trusted: bool
    ) -> dict[str, Any]:
        strategy = self._strategy
        trainer = attached_module(strategy, "load_checkpoint").trainer
        path = local_path(strategy.broadcast(checkpoint_path))
        edits = strategy.deepspeed_engine.edits
        if edits is not None:
            edits.settle()  # first, so that loading writes to the memory that ZeRO trains
        loaded = self._load(path, training=bool(trainer.training), verify=verify, trusted=trusted)
        check_same_scales(loaded.lightning.get(SCALES), trainer.lightning_module)
        user = self._state.user_groups
        if trainer.training and user is not None:
            user.load_named(loaded.user_groups, path)
        if edits is not None:
            edits.forget()
        self._take_local_state(loaded)
        assert self._weight_names is not None
        loaded.lightning["state_dict"] = self._weight_names.state_dict()
        # Without it, Lightning mistakes another program's state dict for a very old checkpoint.
        loaded.lightning.setdefault("pytorch-lightning_version", version("pytorch-lightning"))
        if trainer.training:
            # Lightning expects the key; the states themselves are restored already.
            loaded.lightning.setdefault("optimizer_states", [])
        return loaded.lightning

    def check_hooks(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses edits by hooks: :meth:`load` has restored the weights, so they would be lost.

        Raises:
            CheckpointError: on all ranks, if a hook has edited weights in ``checkpoint``.
        """
        names, self._weight_names = self._weight_names, None
        if names is not None:
            trainer = attached_module(self._strategy, "load_model_state_dict").trainer
            with Together(Path("The checkpoint"), "loaded").stage():
                names.check(checkpoint, 0, "on_load_checkpoint", trainer)

    def before_iteration(self) -> None:
        """Restores random states before an iterator is created, which draws numbers."""
        self._restore_random_state()

    def on_train_start(self) -> None:
        """Restores what Lightning has cleared or drawn from since :meth:`load`."""
        assert self._strategy.lightning_module is not None
        if self._strategy.lightning_module.trainer.fit_loop.restarted_mid_epoch:
            # In an uninterrupted run, the iterator would have been created long before the save.
            self._restore_random_state()
        self._random_state = None
        if self._put_gradients is not None:
            trainer = self._strategy.lightning_module.trainer
            if trainer.fit_loop.restarted_mid_epoch:
                check_same_accumulation(self._accumulation, trainer)
            self._put_gradients()  # not earlier: Lightning clears gradients when training starts
            self._strategy.deepspeed_engine.has_accumulated = True
        self._put_gradients = None

    def _load(self, path: Path, *, training: bool, verify: bool, trusted: bool) -> Loaded:
        assert self._strategy.lightning_module is not None
        together = Together(path, "loaded")
        threads = thread_count(together.ranks_on_host())
        user = self._state.user_groups
        with ExitStack() as stack:
            with together.stage():
                source: Source
                checksum = ""
                if path.is_file():
                    if training:
                        check_order_is_known(path, self._state.layers)
                    groups = user.named() if user is not None else None
                    source = open_file(path, trusted=trusted, user_groups=groups)
                elif not is_checkpoint(resolve(path)) and (native := find_deepspeed(path)):
                    source = open_deepspeed(native, trusted=trusted)
                else:
                    reader = stack.enter_context(CheckpointReader(path))
                    reader.threads = threads
                    source, checksum = DirectorySource(reader), reader.checksum
            if len(set(together.gather(checksum))) > 1:
                raise CheckpointError(
                    f"{path}: ranks see different checkpoints there. It was replaced during"
                    " loading, or they don't share the file system."
                )
            self._weight_names = WeightNames.of_source(source)
            averages = self._averaging.averages() if training else None
            if training and averages is None and has_training_weights(source.tensors):
                rank_zero_warn(
                    f"{path} was saved with WeightAveraging, and this run has no such callback:"
                    " training continues from the averages."
                )
            return load(
                source,
                together,
                engine=self._strategy.deepspeed_engine,
                layers=self._state.layers,
                training=training,
                strict=self._strategy.lightning_module.strict_loading,
                trusted=trusted,
                verify=verify,
                averages=averages,
            )

    def _take_local_state(self, loaded: Loaded) -> None:
        self._put_gradients = loaded.put_gradients
        self._accumulation = loaded.lightning.get(ACCUMULATION)
        local = loaded.local_state
        if local is not None:
            self._random_state = local["rng"]
            if local["loaders"] is not None:
                set_loaders(loaded.lightning, local["loaders"])
            return
        module = self._strategy.lightning_module
        assert module is not None
        if not module.trainer.training:  # nothing resumes
            return
        if (batches := batches_of_epoch(loaded.lightning)) and loaded.topology is not None:
            rank_zero_warn(
                f"The checkpoint was saved in the middle of an epoch, after {batches} batches on"
                f" each of {loaded.topology.world_size} ranks. Lightning skips as many on each of"
                f" {self._strategy.world_size}, which is the same position only if an epoch has as"
                " many batches as before. Keep the global batch size through the batch size per"
                " rank, not through accumulate_grad_batches."
            )
        if (states := loaders_of(loaded.lightning)) is not None:
            set_loaders(loaded.lightning, for_other_ranks(states))
        if not all(map(is_own_state, states or ())):
            rank_zero_warn(
                "The checkpoint was saved on another number of ranks: every data loader resumes"
                " from rank 0's state. Check that this state does not depend on the rank."
            )

    def _restore_random_state(self) -> None:
        module = self._strategy.lightning_module
        assert module is not None
        if self._random_state is not None and module.trainer.training:
            set_random_state(self._random_state, torch.device(self._strategy.root_device))
