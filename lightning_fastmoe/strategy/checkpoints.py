"""How a strategy saves and resumes: Lightning's calls, led to the checkpoint package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerStatus
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fastmoe.checkpoint import CheckpointReader, Topology, is_checkpoint
from lightning_fastmoe.checkpoint.background import BackgroundWriter, ForegroundWriter
from lightning_fastmoe.checkpoint.format.discard import check_replaceable
from lightning_fastmoe.checkpoint.format.publish import put_back, remove, resolve
from lightning_fastmoe.checkpoint.format.threads import thread_count
from lightning_fastmoe.checkpoint.lockstep import Together, meet_after_error
from lightning_fastmoe.checkpoint.model_map import map_model
from lightning_fastmoe.checkpoint.random_state import set_random_state
from lightning_fastmoe.checkpoint.save import batches_of_epoch, loaders_of, local_path, set_loaders
from lightning_fastmoe.checkpoint.sources.base import Source
from lightning_fastmoe.checkpoint.sources.deepspeed import find_deepspeed, open_deepspeed
from lightning_fastmoe.checkpoint.sources.directory import DirectorySource
from lightning_fastmoe.checkpoint.sources.single_file import open_file
from lightning_fastmoe.distributed import ExpertMesh
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.strategy.checks import (
    check_order_is_known,
    fixed_paths,
    warn_within_batch,
)
from lightning_fastmoe.strategy.hook_edits import WeightNames
from lightning_fastmoe.strategy.resumable import for_other_ranks, is_own_state
from lightning_fastmoe.strategy.signals import DeferredSignals
from lightning_fastmoe.strategy.steps import ExpertSteps
from lightning_fastmoe.strategy.watch import Activity
from lightning_fastmoe.zero.averages import has_training_weights
from lightning_fastmoe.zero.engine import FastMoEEngine
from lightning_fastmoe.zero.restore import Loaded, load
from lightning_fastmoe.zero.snapshot import take_snapshot


class ExpertCheckpoints(ExpertSteps):
    """Saving and loading of a strategy whose state is sharded over ranks."""

    verify_checkpoints: bool
    trust_checkpoints: bool
    async_checkpoint: bool
    _made_writer: BackgroundWriter | ForegroundWriter | None = None
    _random_state: dict[str, Any] | None = None
    _put_gradients: Callable[[], None] | None = None
    _forget_pending: Callable[[], None] | None = None
    _weight_names: WeightNames | None = None
    _signals: DeferredSignals | None = None
    _saves_after_error: int = 0

    @property
    def expert_mesh(self) -> ExpertMesh:
        """The groups of the run."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------- saving

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names and shapes alone: each rank writes its weights in :meth:`save_checkpoint`."""
        self._attached("lightning_module_state_dict")
        self._weight_names = None
        try:
            model = map_model(self.deepspeed_engine.module, self._expert_state.layers)
        except CheckpointError:
            return {}  # on this rank, maybe: save_checkpoint is where all ranks meet and say it
        self._weight_names = WeightNames.of_model(model)
        return self._weight_names.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty: as for the weights."""
        return {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint directory; every rank calls this.

        Raises:
            CheckpointError: on all ranks, if one can't write, or if hooks have edited weights in
                ``checkpoint``; training may go on.
            ConfigError: for storage options, and without a model that a Trainer has set up.
        """
        if storage_options is not None:
            raise ConfigError(
                "save_checkpoint(storage_options=...) is not supported: every rank writes its own"
                " files into a directory. Drop the argument."
            )
        with self._watch.during(Activity.SAVING):
            self._save(checkpoint, filepath)

    def _save(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        trainer = self._attached("save_checkpoint").trainer
        if trainer.interrupted:
            meet_after_error(local_path(filepath), trainer.global_step, self._saves_after_error)
            self._saves_after_error += 1
        warn_within_batch(trainer, filepath)
        self._unwrap_compiled()
        path = local_path(self.broadcast(filepath))
        user = self._expert_state.user_groups
        together = Together(path, "saved")
        names, self._weight_names = self._weight_names, None
        if names is not None:
            with together.stage():
                names.check(checkpoint, len(trainer.optimizers), "on_save_checkpoint", trainer)
        with together.stage():
            # What was set for the next step, and written to weights, belongs to the state.
            self.deepspeed_engine.take_over_edits()
        snapshot = take_snapshot(
            together,
            engine=self.deepspeed_engine,
            layers=self._expert_state.layers,
            topology=self._topology(),
            client_state=checkpoint,
            user_groups=user.named() if user is not None else None,
            exclude_frozen=self.exclude_frozen_parameters,
            averages=self._averages(),
        )
        self._writer.submit(path, snapshot)
        if not self._trainer_runs:
            self._writer.wait()  # no step will come in which an error could surface

    @property
    def _trainer_runs(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.state.status == TrainerStatus.RUNNING

    @property
    def _writer(self) -> BackgroundWriter | ForegroundWriter:
        """Made by the first save, on all ranks together."""
        if self._made_writer is None:
            self._made_writer = BackgroundWriter() if self.async_checkpoint else ForegroundWriter()
        return self._made_writer

    def _put_back_names(self, trainer: pl.Trainer) -> None:
        """After a save that died at the wrong moment "last" finds nothing: don't start anew then.

        Raises:
            CheckpointError: on all ranks, if a checkpoint has got its name back.
        """
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        names: list[str] = []
        if self.is_global_zero:
            for folder in dict.fromkeys(str(c.dirpath) for c in callbacks if c.dirpath):
                with suppress(OSError):  # of which saving will complain
                    names += [f"{folder}/{name}" for name in put_back(Path(folder))]
        names = self.broadcast(names)
        if names and trainer.ckpt_path is None:
            raise CheckpointError(
                f"A run was stopped while it replaced {names[0]}, which was missing and has now"
                " been restored. It was not there when this run looked for a checkpoint to"
                " resume from. Start again, and 'last' finds it."
            )

    def _check_names(self, trainer: pl.Trainer) -> None:
        """What will be saved to and can't be replaced is refused now, not hours later.

        Raises:
            CheckpointError: on all ranks, naming the file that is in the way.
        """
        fault = ""
        if self.is_global_zero:
            try:
                for path in fixed_paths(trainer):
                    check_replaceable(path)
            except CheckpointError as error:
                fault = str(error)
        if fault := self.broadcast(fault):
            raise CheckpointError(fault)

    def _is_pending(self, path: Path) -> bool:
        writer = self._made_writer
        return isinstance(writer, BackgroundWriter) and writer.is_pending(local_path(path))

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Deletes a checkpoint: first its name, then its files, so that no half of it is found."""
        if self.is_global_zero:
            path = local_path(filepath)
            writer = self._made_writer or ForegroundWriter()
            writer.after_success(lambda: remove(path))

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._made_writer is not None:
            self._made_writer.poll()
        return super().training_step(*args, **kwargs)

    @override
    def teardown(self) -> None:
        writer, self._made_writer = self._made_writer, None
        forget, self._forget_pending = self._forget_pending, None
        if forget is not None:
            forget()
        signals, self._signals = self._signals, None
        if signals is not None:
            signals.detach()
        try:
            if writer is not None:
                with self._watch.during(Activity.SAVING):
                    writer.wait()
        except CheckpointError as error:
            assert self.lightning_module is not None
            if not self.lightning_module.trainer.interrupted:
                raise
            rank_zero_warn(str(error))  # what interrupted the run matters more
        finally:
            super().teardown()

    def _topology(self) -> Topology:
        assert isinstance(self.config, dict)
        return Topology(
            world_size=self.world_size,
            expert_parallel_size=self.expert_mesh.ep_size,
            zero_stage=self.config["zero_optimization"]["stage"],
            precision=str(self.precision_plugin.precision),
        )

    # ------------------------------------------------------------------------------------ loading

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restores a checkpoint into the engine; every rank calls this.

        Raises:
            CheckpointError: on all ranks, if it is damaged or does not fit.
            ConfigError: without a model that a Trainer has set up.
        """
        with self._watch.during(Activity.LOADING):
            return self._load_into_engine(checkpoint_path, weights_only)

    def _load_into_engine(self, checkpoint_path: Any, weights_only: bool | None) -> dict[str, Any]:
        trainer = self._attached("load_checkpoint").trainer
        path = local_path(self.broadcast(checkpoint_path))
        if self._made_writer is not None:
            self._made_writer.wait()
        edits = self.deepspeed_engine.edits
        if edits is not None:
            edits.settle()  # what is loaded replaces it, where parameters have their memory
        loaded = self._load(
            path,
            training=bool(trainer.training),
            trusted=self.trust_checkpoints or weights_only is False,
        )
        user = self._expert_state.user_groups
        if trainer.training and user is not None:
            user.load_named(loaded.user_groups, path)
        if edits is not None:
            edits.forget()
        self._take_local_state(loaded)
        assert self._weight_names is not None
        loaded.lightning["state_dict"] = self._weight_names.state_dict()
        # Without it, Lightning takes a state dict of another program for a very old checkpoint.
        loaded.lightning.setdefault("pytorch-lightning_version", version("pytorch-lightning"))
        if trainer.training:
            # Lightning looks for it; what it stands for is restored.
            loaded.lightning.setdefault("optimizer_states", [])
        return loaded.lightning

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing to do: :meth:`load_checkpoint` has restored the weights. Comes after the hooks.

        Raises:
            CheckpointError: on all ranks, if a hook has edited weights in ``checkpoint``.
        """
        names, self._weight_names = self._weight_names, None
        if names is not None:
            trainer = self._attached("load_model_state_dict").trainer
            with Together(Path("The checkpoint"), "loaded").stage():
                names.check(checkpoint, 0, "on_load_checkpoint", trainer)

    def _attached(self, method: str) -> pl.LightningModule:
        """The module, once there is an engine around it."""
        module = self.lightning_module
        if module is None or not isinstance(self.model, FastMoEEngine):
            raise ConfigError(
                f"FastMoEStrategy.{method}() needs a model that a Trainer has set up, and there is"
                " none yet. Pass the path to Trainer.fit(..., ckpt_path=...), validate, test or"
                " predict; without a Trainer, make a module of a checkpoint with"
                " Module.load_from_checkpoint(path), or fill one with"
                " lightning_fastmoe.checkpoint.weights.load_weights(path, module)."
            )
        return module

    def _load(self, path: Path, *, training: bool, trusted: bool) -> Loaded:
        assert self.lightning_module is not None
        together = Together(path, "loaded")
        threads = thread_count(together.ranks_on_host())
        user = self._expert_state.user_groups
        with ExitStack() as stack:
            with together.stage():
                source: Source
                checksum = ""
                if path.is_file():
                    if training:
                        check_order_is_known(path, self._expert_state.layers)
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
            averages = self._averages() if training else None
            if training and averages is None and has_training_weights(source.tensors):
                rank_zero_warn(
                    f"{path} was saved with WeightAveraging, and this run has no such callback: it"
                    " trains on from the averages."
                )
            return load(
                source,
                together,
                engine=self.deepspeed_engine,
                layers=self._expert_state.layers,
                training=training,
                strict=self.lightning_module.strict_loading,
                trusted=trusted,
                verify=self.verify_checkpoints,
                averages=averages,
            )

    def _take_local_state(self, loaded: Loaded) -> None:
        self._put_gradients = loaded.put_gradients
        local = loaded.local_state
        if local is not None:
            self._random_state = local["rng"]
            if local["loaders"] is not None:
                set_loaders(loaded.lightning, local["loaders"])
            return
        if (batches := batches_of_epoch(loaded.lightning)) and loaded.topology is not None:
            rank_zero_warn(
                f"The checkpoint was saved in the middle of an epoch, after {batches} batches on"
                f" each of {loaded.topology.world_size} ranks. Lightning goes on after as many on"
                f" each of {self.world_size}: the same place only if an epoch has as many batches"
                " as before. Keep the global batch by the batch size of a rank, not by"
                " accumulate_grad_batches."
            )
        if (states := loaders_of(loaded.lightning)) is not None:
            set_loaders(loaded.lightning, for_other_ranks(states))
        if not all(map(is_own_state, states or ())):
            rank_zero_warn(
                "The checkpoint was saved on another number of ranks: every data loader resumes"
                " from the state of rank 0's. Check that its state does not depend on the rank."
            )

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # Before an iterator is made, which draws numbers at the beginning of an epoch.
        self._restore_random_state()
        return super().process_dataloader(dataloader)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        self._signals = DeferredSignals(self.lightning_module.trainer, self._watch)
        if self.lightning_module.trainer.fit_loop.restarted_mid_epoch:
            # The iterator of a run that was not interrupted was made long before the save.
            self._restore_random_state()
        self._random_state = None
        if self._put_gradients is not None:
            self._put_gradients()  # not before: Lightning clears gradients when it starts
            self.deepspeed_engine.has_accumulated = True
        self._put_gradients = None
        self._watch.beat(Activity.TRAINING)

    def _restore_random_state(self) -> None:
        assert self.lightning_module is not None
        if self._random_state is not None and self.lightning_module.trainer.training:
            set_random_state(self._random_state, torch.device(self.root_device))
