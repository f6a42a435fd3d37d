"""FastMoEStrategy: expert parallelism with DeepSpeed ZeRO data parallelism, for Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fastmoe.distributed import ExpertMesh
from lightning_fastmoe.registration import NAME, register_names
from lightning_fastmoe.strategy.arguments import check_arguments, check_stage_beside_config
from lightning_fastmoe.strategy.averaging import Averaging
from lightning_fastmoe.strategy.checkpointing.loading import Loading
from lightning_fastmoe.strategy.checkpointing.saving import Saving
from lightning_fastmoe.strategy.checks import check_objects, check_trainer
from lightning_fastmoe.strategy.compiled import CompiledSteps, unwrap_compiled
from lightning_fastmoe.strategy.device_agnostic import DeviceAgnosticDeepSpeedStrategy
from lightning_fastmoe.strategy.engines import Engines
from lightning_fastmoe.strategy.expert_groups import ExpertGroups
from lightning_fastmoe.strategy.loaders.resumable import resumable
from lightning_fastmoe.strategy.loaders.uneven import UnevenData
from lightning_fastmoe.strategy.model_summary import correct_summary
from lightning_fastmoe.strategy.monitored import share_monitored
from lightning_fastmoe.strategy.quiet import quiet_logs, quiet_warnings
from lightning_fastmoe.strategy.same_settings import check_same_settings, compare_before_resuming
from lightning_fastmoe.strategy.steps import Steps
from lightning_fastmoe.strategy.trainer_options import check_trainer_options
from lightning_fastmoe.strategy.watchdog.blocked_device import end_if_blocked
from lightning_fastmoe.strategy.watchdog.ending import is_launched, prepare_ending
from lightning_fastmoe.strategy.watchdog.exchange_waits import ExchangeWaits
from lightning_fastmoe.strategy.watchdog.watch import Activity, Watch
from lightning_fastmoe.zero.engine import FastMoEEngine, NonFinitePolicy

_Result = TypeVar("_Result")


class FastMoEStrategy(DeviceAgnosticDeepSpeedStrategy):
    """Trains mixture-of-experts models: experts sharded over ranks, the rest by DeepSpeed ZeRO.

    The experts of every ``MoE`` layer, and of transformers' models with
    ``experts_implementation="fastmoe"``, are sharded over ``expert_parallel_size`` neighbouring
    ranks. ZeRO partitions an expert's replicas among themselves, and all other parameters over the
    whole world. Gradients are those of the loss averaged over the global batch, as in one process.

    Args:
        expert_parallel_size: number of ranks over which the experts of each layer are sharded. It
            must divide the world size and every layer's ``num_experts``. "auto" is the smallest one
            within a node whose weights, gradients and Adam's state fit; see docs/strategy.md.
        stage: ZeRO stage. 1 partitions optimizer states, 2 also gradients, 3 also parameters.
        nonfinite: what happens when NaN or Inf reaches a router on any rank in a training step:
            "raise" stops all ranks before the weights change, "skip" drops the step on all ranks,
            "ignore" does not check (ZeRO itself drops a step whose gradient norm is not finite).
        verify_checkpoints: compare every file of a checkpoint with its hash before loading from it.
        trust_checkpoints: also unpickle objects that aren't plain data, which can run any code.
        async_checkpoint: copy the state to host memory and write it while training goes on.
            Errors are raised at the next step; a run's end waits for the last write.
        hang_timeout: seconds without a finished batch or phase of the run, after which it ends on
            every rank, with stacks on stderr and exit status 75; or None.
        exchange_timeout: seconds that a rank waits for others in an exchange, until all raise an
            ExchangeError that says where each is. "auto": 0.9 ``hang_timeout``; None: no limit.
        signal_grace: seconds without a finished batch after SIGTERM, before the process exits with
            status 143; a second SIGTERM ends it at once. None waits as long as it takes.
        ranks_per_node: consecutive ranks that share a fast interconnect, such as NVLink across
            hosts; it must divide the world size. None is the number of devices per host.
        tokens_per_rank: of a micro-batch. With it, "auto" also counts the exchange's buffers.
        exact: as ``MoE(exact=True)``, for all layers: the bits of one process in every dtype.
        kwargs: as for :class:`pytorch_lightning.strategies.DeepSpeedStrategy`.

    Raises:
        ConfigError: if an option is unknown or would train experts incorrectly.
    """

    strategy_name = NAME

    def __init__(
        self,
        expert_parallel_size: int | Literal["auto"] = "auto",
        stage: int = 2,
        nonfinite: NonFinitePolicy = "raise",
        verify_checkpoints: bool = True,
        trust_checkpoints: bool = False,
        async_checkpoint: bool = False,
        hang_timeout: float | None = 600.0,
        signal_grace: float | None = 30.0,
        exchange_timeout: float | Literal["auto"] | None = "auto",
        ranks_per_node: int | None = None,
        tokens_per_rank: int | None = None,
        exact: bool = False,
        **kwargs: Any,
    ) -> None:
        check_objects("FastMoEStrategy", kwargs.values())
        own, passed_on = check_arguments(FastMoEStrategy.__init__, locals())
        quiet_logs()
        self._own = own
        self._compiled = CompiledSteps()
        super().__init__(stage=own["stage"], **passed_on)
        assert isinstance(self.config, dict)
        check_stage_beside_config(own["stage"], self.config)
        self.verify_checkpoints: bool = own["verify_checkpoints"]
        self.trust_checkpoints: bool = own["trust_checkpoints"]
        self.async_checkpoint: bool = own["async_checkpoint"]
        # Called with the model (experts sharded) and the optimizer with expert groups split off.
        self.before_engine: list[Callable[[nn.Module, Optimizer], None]] = []
        self._watch = Watch(hang_timeout, signal_grace)
        self._waits = ExchangeWaits(exchange_timeout, hang_timeout)
        self._uneven = UnevenData(self)
        self._averaging = Averaging()
        self._groups = ExpertGroups(self, own)
        self._engines = Engines(self, self._groups, nonfinite, own["exact"])
        state = self._engines.state
        self._steps = Steps(self, state, self._groups, self._watch, self._uneven, self._waits)
        leave = self._waits.leave
        self._saving = Saving(self, state, self._groups, self._watch, self._averaging, leave)
        self._loading = Loading(self, state, self._watch, self._averaging)
        self._at_teardown = ExitStack()

    @property
    def expert_parallel_size(self) -> int | Literal["auto"]:
        """The argument as given; :attr:`expert_mesh` has the size that "auto" resolved to."""
        return self._groups.size

    @property
    def expert_mesh(self) -> ExpertMesh:
        """The expert parallel and expert data parallel groups.

        Raises:
            UnmanagedExpertsError: if the groups don't exist yet.
        """
        return self._groups.mesh

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks as ``(expert_data_parallel, expert_parallel)``; also ``module.device_mesh``."""
        return self.expert_mesh.device_mesh

    # ---------------------------------------------------------------- set-up of ranks and groups

    @property
    def _lightning_module(self) -> pl.LightningModule | None:
        return self._compiled.module

    @_lightning_module.setter
    def _lightning_module(self, module: pl.LightningModule | None) -> None:
        """Set by the Trainer, just before it refuses compiled modules for all but its own."""
        self._compiled.take(module)

    @override
    def setup_environment(self) -> None:
        # Before callbacks are set up: some would fail first, with less helpful errors.
        check_trainer_options(self.lightning_module)
        super().setup_environment()

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        check_same_settings(self, self._own)
        self._groups.make_if_sized()

    @override
    def _init_deepspeed_distributed(self) -> None:
        self._averaging.prepare(self.lightning_module)  # before callbacks are set up
        self._at_teardown.callback(self._averaging.end)
        self._at_teardown.callback(quiet_warnings())
        super()._init_deepspeed_distributed()

    # ------------------------------------------------------------------------ set-up of the model

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around ``configure_model``: MoE layers create only this rank's experts."""
        self._init_config_if_needed()
        with self._groups.placing():
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        check_trainer(trainer, module)
        correct_summary(trainer, module)
        launched = [process.pid for process in getattr(self.launcher, "procs", ())]
        self._watch.start(self.global_rank, self.root_device, launched, is_launched(self))
        unwrap_compiled(module)
        self._at_teardown.callback(self._saving.begin(trainer, self.async_checkpoint))
        self._init_config_if_needed()
        sharder = self._engines.shard(trainer, module)
        self._waits.begin(sharder, self._watch)
        super().setup(trainer)
        self._at_teardown.callback(compare_before_resuming(trainer))
        if trainer.training:
            self._at_teardown.callback(share_monitored(trainer))
            self._averaging.begin(self.deepspeed_engine)
        self._engines.begin(module)
        self._watch.beat()
        self._compiled.apply()

    @override
    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        return self._engines.optimizer()

    @override
    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[FastMoEEngine, Any]:
        assert optimizer is not None
        hooks = self.before_engine
        return self._engines.for_training(model, optimizer, lr_scheduler, hooks), optimizer

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        self.model = self._engines.for_inference(model)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        self._loading.before_iteration()
        self._watch.beat()
        return self._uneven.wrap(resumable(dataloader, self.lightning_module.trainer))

    # ------------------------------------------------------------------------------------- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._saving.poll()
        return self._steps.train(super().training_step, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._steps.evaluate(Activity.VALIDATING, super().validation_step, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._steps.evaluate(Activity.TESTING, super().test_step, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._steps.evaluate(Activity.PREDICTING, super().predict_step, *args, **kwargs)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._at_teardown.callback(self._steps.begin_training())
        self._loading.on_train_start()
        self._watch.beat(Activity.TRAINING)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._watch.beat(Activity.TRAINING)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.deepspeed_engine.take_over_edits()
        self._watch.beat(Activity.ENDING)

    @override
    def on_validation_start(self) -> None:
        self._steps.begin_evaluation(Activity.VALIDATING)

    @override
    def on_test_start(self) -> None:
        self._steps.begin_evaluation(Activity.TESTING)

    @override
    def on_predict_start(self) -> None:
        self._steps.begin_evaluation(Activity.PREDICTING)

    def edit_parameters(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Gives access to whole parameters, for reading and writing, in any hook during training.

        On exit, what was written is copied to the master weights that ZeRO trains, at every stage.
        ZeRO 3 gathers the parameters; each rank gathers those of its own experts. ::

            with trainer.strategy.edit_parameters([self.head.bias]), torch.no_grad():
                self.head.bias.zero_()

        Every rank calls this with the same parameters in the same order, and writes the same values
        to those that are not experts.

        Args:
            parameters: the parameters of the LightningModule.

        Raises:
            ParameterEditError: outside of training, or if a parameter is not the model's.
        """
        return self._steps.editing(parameters)

    def on_rank_zero(
        self, function: Callable[..., _Result], *args: Any, **kwargs: Any
    ) -> _Result | None:
        """Runs ``function`` on rank 0 only, for example to sample text in a callback.

        Every rank calls this at the same point: while rank 0 runs the model, the others take part
        in its MoE layers without tokens. The model is in evaluation mode, without gradients.

        Args:
            function: may run the LightningModule any number of times.
            args, kwargs: its arguments.

        Returns:
            What ``function`` returned on rank 0; None on the others.

        Raises:
            ConfigError: at stage 3, where rank 0 can't gather dense layers; if ``function`` trains.
            ExchangeError: on the other ranks, if ``function`` raised on rank 0.
        """
        return self._steps.on_rank_zero(partial(function, *args, **kwargs))

    def on_each_rank(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Runs ``function`` on every rank, for example to generate from prompts of its own.

        As :meth:`on_rank_zero`, but ranks may run the model differently often, or never. Raises
        the same errors.
        """
        return self._steps.on_each_rank(partial(function, *args, **kwargs))

    # ------------------------------------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Names and shapes only: each rank writes its weights in :meth:`save_checkpoint`."""
        return self._saving.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty: each rank writes its state in :meth:`save_checkpoint`."""
        return {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint directory; every rank calls this. Errors: see :meth:`Saving.save`."""
        self._saving.save(checkpoint, filepath, storage_options)

    def wait_for_checkpoint(self) -> None:
        """Waits until a checkpoint that is written in the background is complete."""
        self._saving.wait()

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Deletes a checkpoint, its name first, so that no partial one is ever found."""
        self._saving.remove(filepath)

    @override
    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restores a checkpoint into the engine; every rank calls this.

        Raises:
            CheckpointError: on all ranks, if it is damaged or does not fit.
            ConfigError: if no Trainer has set up a model.
        """
        self._saving.wait()
        trusted = self.trust_checkpoints or weights_only is False
        return self._loading.load(checkpoint_path, verify=self.verify_checkpoints, trusted=trusted)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Checks that no hook edited weights; :meth:`load_checkpoint` has restored them."""
        self._loading.check_hooks(checkpoint)

    # ------------------------------------------------------------------------------------ the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._watch.beat(Activity.ENDING)
        prepare_ending(exception, is_launched(self))
        self._waits.leave(exception)
        end_if_blocked(exception)

    @override
    def teardown(self) -> None:
        with ExitStack() as last:  # called in reverse order, all of them even if one raises
            last.callback(self._watch.stop)
            last.callback(lambda: self._waits.end(self._groups.sharder))
            last.callback(super().teardown)
            last.callback(self._saving.end)
            last.push(self._at_teardown.pop_all())
            last.callback(self._engines.end)
            last.callback(self._compiled.undo)
        self._waits.raise_for_peer(self.lightning_module)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers "fastmoe" and its variants for ``Trainer(strategy=...)``."""
        register_names(strategy_registry, cls)
