"""What FastMoEStrategy does in and around each step; its set-up is in ``fastmoe.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from typing_extensions import override

from lightning_fastmoe.distributed import ExpertSharder
from lightning_fastmoe.errors import ConfigError, ParameterEditError
from lightning_fastmoe.strategy.averaging import AveragedRun, prepare_averaging
from lightning_fastmoe.strategy.compiled import CompiledSteps, unwrap_compiled
from lightning_fastmoe.strategy.ending import is_launched, prepare_ending
from lightning_fastmoe.strategy.exchange_waits import ExchangeWaits
from lightning_fastmoe.strategy.monitored import share_monitored
from lightning_fastmoe.strategy.quiet import quiet_logs, quiet_warnings
from lightning_fastmoe.strategy.rank_zero import run_on_rank_zero
from lightning_fastmoe.strategy.resumable import resumable
from lightning_fastmoe.strategy.uneven import UnevenData
from lightning_fastmoe.strategy.watch import Activity, Watch
from lightning_fastmoe.zero.averages import Averages
from lightning_fastmoe.zero.collectives import modernise_collectives
from lightning_fastmoe.zero.engine import ExpertState
from lightning_fastmoe.zero.groups import check_batch_norms

_Result = TypeVar("_Result")


class ExpertSteps(DeepSpeedStrategy):
    """The steps of a strategy whose forward passes exchange tokens between ranks."""

    _sharder: ExpertSharder | None
    _expert_state: ExpertState
    _uneven: UnevenData
    _watch: Watch
    _waits: ExchangeWaits
    _module: pl.LightningModule | None = None
    _compiled_steps: CompiledSteps | None = None
    _unshare_monitored: Callable[[], None] | None = None
    _unquiet_warnings: Callable[[], None] | None = None
    _averaged_run: AveragedRun | None = None

    def __init__(self, **kwargs: Any) -> None:
        quiet_logs()
        super().__init__(**kwargs)

    @override
    def _init_deepspeed_distributed(self) -> None:
        module = self.lightning_module
        if module is not None and module.trainer.training:  # before callbacks are set up
            self._averaged_run = prepare_averaging(module.trainer)
        if self._unquiet_warnings is None:
            self._unquiet_warnings = quiet_warnings()
        super()._init_deepspeed_distributed()
        modernise_collectives()

    @property
    def _lightning_module(self) -> pl.LightningModule | None:
        return self._module

    @_lightning_module.setter
    def _lightning_module(self, module: pl.LightningModule | None) -> None:
        """Set by the Trainer, just before it refuses compiled modules for all but its own."""
        if module is not self._module:
            self._compiled_steps = None
        self._module = module
        if getattr(module, "_compiler_ctx", None) is not None:
            assert module is not None
            self._compiled_steps = CompiledSteps(module)

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        # Lightning decides when to step, and tells the engine. Left to count by itself, DeepSpeed
        # drifts out of step with Lightning when an epoch is not a multiple of the accumulation.
        return False

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: the engine reduces as its stage needs, and steps when told."""
        yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        check_batch_norms(self._expert_state.layers)
        super().setup(trainer)
        if trainer.training:
            self._unshare_monitored = share_monitored(trainer)
            if self._averaged_run is not None:
                self._averaged_run.begin(self.deepspeed_engine)

    @override
    def teardown(self) -> None:
        undo = (self._unshare_monitored, self._unquiet_warnings)
        self._unshare_monitored = self._unquiet_warnings = None
        for call in filter(None, undo):
            call()
        averaged, self._averaged_run = self._averaged_run, None
        if averaged is not None:
            averaged.end()
        super().teardown()

    def _averages(self) -> Averages | None:
        """For a checkpoint: what WeightAveraging keeps beside the weights."""
        return self._averaged_run.averages() if self._averaged_run is not None else None

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        self._look_at_parameters()
        loop = self.lightning_module.trainer.fit_loop
        self.deepspeed_engine.set_gradient_accumulation_boundary(not loop._should_accumulate())
        output = super().training_step(*args, **kwargs)
        self._end_pass()
        self._watch.batch(Activity.TRAINING, loop.epoch_loop.global_step)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.requires_grad:
            # Lightning will divide this loss by the accumulation steps.
            self._expert_state.loss_scale.watch(loss)
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._look_at_parameters()
        output = super().validation_step(*args, **kwargs)
        self._end_pass()
        self._watch.batch(Activity.VALIDATING)
        return output

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().test_step(*args, **kwargs)
        self._end_pass()
        self._watch.batch(Activity.TESTING)
        return output

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict_step(*args, **kwargs)
        self._end_pass()
        self._watch.batch(Activity.PREDICTING)
        return output

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.deepspeed_engine.take_over_edits()
        self._watch.beat(Activity.ENDING)

    @contextmanager
    def edit_parameters(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Parameters that may be read and written whole, in any hook while training.

        At the end what was written is in the master weights that ZeRO trains, at every stage and
        whatever wrote it. ZeRO 3 gathers the parameters, each rank those of its own experts. ::

            with trainer.strategy.edit_parameters([self.head.bias]), torch.no_grad():
                self.head.bias.zero_()

        Every rank calls this with the same parameters in the same order, and writes the same into
        those that are not experts.

        Args:
            parameters: the parameters of the LightningModule.

        Raises:
            ParameterEditError: if there is no training, or if one is not the model's.
        """
        edits = getattr(self.model, "edits", None)
        if edits is None:
            raise ParameterEditError(
                "edit_parameters() was called outside of training. It may be called from"
                " on_fit_start to on_train_end; at other times write into the parameters."
            )
        with edits.editing(parameters):
            yield

    def _look_at_parameters(self) -> None:
        edits = self.deepspeed_engine.edits
        if edits is not None:
            edits.look()

    def on_rank_zero(self, function: Callable[..., _Result], *args: Any) -> _Result | None:
        """Runs ``function(*args)`` on rank 0 alone, a callback's sample say.

        Every rank calls this at the same point, also those where nothing runs: while rank 0 runs
        the model, they take part in its MoE layers without tokens of their own. The model is in
        evaluation mode meanwhile, without gradients and in the precision of the run.

        Args:
            function: may run the LightningModule any number of times.
            args: for it.

        Returns:
            What ``function`` returned on rank 0; None on the others.

        Raises:
            ConfigError: on all ranks, at stage 3, where rank 0 can't gather a dense layer's
                parameters alone; on rank 0, if ``function`` trains.
            ExchangeError: on the other ranks, if ``function`` raised on rank 0, where its own error
                is.

        Example:
            >>> class Sample(pl.Callback):
            ...     def on_train_epoch_end(self, trainer, pl_module):
            ...         text = trainer.strategy.on_rank_zero(generate, pl_module, "Once")
            ...         if trainer.is_global_zero:
            ...             print(text)
        """
        assert self.lightning_module is not None
        if self.zero_stage_3:
            raise ConfigError(
                "on_rank_zero does not work at stage 3: the parameters of dense layers are"
                " partitioned over all ranks, and rank 0 can't gather them alone. Call the function"
                " on every rank, with the same inputs, or use stage 2."
            )
        with self.precision_plugin.forward_context():
            return run_on_rank_zero(
                self.lightning_module,
                self._expert_state.layers,
                self._watch.beat,
                function,
                *args,
            )

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._watch.beat(Activity.ENDING)
        prepare_ending(exception, is_launched(self.cluster_environment, self.local_rank))
        self._waits.leave(exception)

    def _end_pass(self) -> None:
        """A rank that left out its last MoE layers meets the ranks that wait for it in them."""
        if self._sharder is not None:
            self._sharder.end_pass(self._expert_state.layers.values(), self.root_device)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As the base class, but the mean of integers is not rounded down to one.

        ``self.log(..., sync_dist=True)`` divides by the mean number of samples per rank.
        """
        integers = isinstance(tensor, Tensor) and not tensor.is_floating_point()
        if integers and reduce_op in ("mean", "avg"):
            tensor = tensor.double()
        return super().reduce(tensor, group, reduce_op)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._watch.beat(Activity.TRAINING)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        self._watch.beat()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.training:
            dataloader = resumable(dataloader, trainer.fit_loop)
        return self._uneven.wrap(dataloader)

    def _unwrap_compiled(self) -> None:
        """What a hook of the user's has compiled since set-up has no part in ZeRO 3."""
        assert self.lightning_module is not None
        unwrap_compiled(self.lightning_module)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._unwrap_compiled()

    @override
    def on_validation_start(self) -> None:
        self._watch.beat(Activity.VALIDATING)
        self._unwrap_compiled()
        self._uneven.fill_up("validation_step")

    @override
    def on_test_start(self) -> None:
        self._watch.beat(Activity.TESTING)
        self._unwrap_compiled()
        self._uneven.fill_up("test_step")

    @override
    def on_predict_start(self) -> None:
        self._watch.beat(Activity.PREDICTING)
        self._unwrap_compiled()
        self._uneven.fill_up("predict_step")
