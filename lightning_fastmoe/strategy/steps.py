"""Runs training and evaluation steps: applies weight edits and keeps the ranks in step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lightning_fastmoe.distributed.each_rank import run_on_each_rank
from lightning_fastmoe.errors import ConfigError, ParameterEditError
from lightning_fastmoe.nn.nonfinite import begin_micro_batch
from lightning_fastmoe.strategy.clipping import Clipping
from lightning_fastmoe.strategy.compiled import unwrap_compiled
from lightning_fastmoe.strategy.expert_groups import ExpertGroups
from lightning_fastmoe.strategy.loaders.uneven import UnevenData
from lightning_fastmoe.strategy.rank_zero import run_on_rank_zero
from lightning_fastmoe.strategy.watchdog.exchange_waits import ExchangeWaits
from lightning_fastmoe.strategy.watchdog.signals import DeferredSignals
from lightning_fastmoe.strategy.watchdog.watch import Activity, Watch
from lightning_fastmoe.zero.engine import ExpertState
from lightning_fastmoe.zero.graph_memory import begin_graphs

_Result = TypeVar("_Result")
_EVALUATION_STEPS = {
    Activity.VALIDATING: "validation_step",
    Activity.TESTING: "test_step",
    Activity.PREDICTING: "predict_step",
}


class Steps:
    """Runs the steps of a strategy whose forward passes exchange tokens; one object per strategy.

    Args:
        strategy: the strategy with the engine.
        state: the MoE layers and optimizer groups of the engine.
        groups: the expert parallel groups.
        watch: records each batch.
        uneven: keeps ranks with different numbers of batches in step.
        waits: tells ranks that wait what became of the others.
    """

    def __init__(
        self,
        strategy: DeepSpeedStrategy,
        state: ExpertState,
        groups: ExpertGroups,
        watch: Watch,
        uneven: UnevenData,
        waits: ExchangeWaits,
    ) -> None:
        self._strategy, self._state, self._groups = strategy, state, groups
        self._watch, self._uneven, self._waits = watch, uneven, waits
        self._signals: DeferredSignals | None = None  # while training
        self._clipping = Clipping(strategy)

    def train(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a training step; returns its output."""
        assert self._strategy.lightning_module is not None
        self._look_at_parameters()
        self._begin_graphs()
        loop = self._strategy.lightning_module.trainer.fit_loop
        engine = self._strategy.deepspeed_engine
        engine.set_gradient_accumulation_boundary(not loop._should_accumulate())
        output = step(*args, **kwargs)
        self._groups.end_pass(self._state.layers.values())
        self._watch.batch(Activity.TRAINING, loop.epoch_loop.global_step)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.requires_grad:
            # Lightning will divide this loss by the accumulation steps.
            self._state.loss_scale.watch(loss)
        return output

    def evaluate(
        self, activity: Activity, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a step of validation, testing or prediction; returns its output."""
        if activity is Activity.VALIDATING:
            self._look_at_parameters()
        self._begin_graphs()
        output = step(*args, **kwargs)
        self._groups.end_pass(self._state.layers.values())
        self._watch.batch(activity)
        if self._signals is not None and activity is Activity.VALIDATING:
            self._signals.after_validation_step()
        return output

    def begin_training(self) -> Callable[[], None]:
        """Called before the first batch; returns the function that undoes it."""
        module = self._strategy.lightning_module
        assert module is not None
        unwrap_compiled(module)  # a user's hook may have compiled modules since set-up
        end_clipping = self._clipping.begin()
        self._signals = DeferredSignals(module.trainer, self._watch, self._waits.for_work)

        def end() -> None:
            end_clipping()
            signals, self._signals = self._signals, None
            if signals is not None:
                signals.detach()

        return end

    def begin_evaluation(self, activity: Activity) -> None:
        """Called before the first batch of validation, testing or prediction."""
        assert self._strategy.lightning_module is not None
        self._watch.beat(activity)
        unwrap_compiled(self._strategy.lightning_module)
        self._uneven.fill_up(_EVALUATION_STEPS[activity])

    @contextmanager
    def editing(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Gives access to whole parameters, for reading and writing.

        Raises:
            ParameterEditError: outside of training, or if a parameter is not the model's.
        """
        edits = getattr(self._strategy.model, "edits", None)
        if edits is None:
            raise ParameterEditError(
                "edit_parameters() was called outside of training. Call it between"
                " on_fit_start and on_train_end; at other times write to the parameters directly."
            )
        with edits.editing(parameters):
            yield

    def _begin_graphs(self) -> None:
        """What earlier micro-batches have left is moved out of the memory of CUDA graphs."""
        engine = self._strategy.deepspeed_engine
        begin_micro_batch(layer.nonfinite for layer in self._state.layers.values())
        has_gradients = bool(getattr(engine, "has_accumulated", False))
        begin_graphs(engine.optimizer, engine.module.parameters(), has_gradients=has_gradients)

    def _look_at_parameters(self) -> None:
        edits = self._strategy.deepspeed_engine.edits
        if edits is not None:
            edits.look()

    def on_rank_zero(self, function: Callable[..., _Result], *args: Any) -> _Result | None:
        """Runs ``function(*args)`` on rank 0 only, in the precision of the run.

        Raises:
            ConfigError: on all ranks, at stage 3.
        """
        strategy = self._strategy
        assert strategy.lightning_module is not None
        if strategy.zero_stage_3:
            raise ConfigError(
                "on_rank_zero does not work at stage 3: the parameters of dense layers are"
                " partitioned over all ranks, and rank 0 can't gather them by itself. Call the"
                " function on every rank, with the same inputs, or use stage 2."
            )
        with strategy.precision_plugin.forward_context():
            return run_on_rank_zero(
                strategy.lightning_module, self._state.layers, self._watch.beat, function, *args
            )

    def on_each_rank(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """Runs ``function(*args)`` on every rank, each for itself, in the precision of the run.

        Raises:
            ConfigError: on all ranks, at stage 3.
        """
        strategy = self._strategy
        assert strategy.lightning_module is not None
        if strategy.zero_stage_3:
            raise ConfigError(
                "on_each_rank does not work at stage 3: each pass gathers the parameters of dense"
                " layers from all ranks, which a rank that has finished would not join. Make the"
                " same number of passes on every rank, or use stage 2."
            )
        with strategy.precision_plugin.forward_context():
            return run_on_each_rank(
                strategy.lightning_module,
                self._state.layers,
                self._watch.beat,
                strategy.root_device,
                function,
                *args,
            )
