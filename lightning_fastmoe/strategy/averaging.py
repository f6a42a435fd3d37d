"""Runs Lightning's WeightAveraging on each rank's shard of the fp32 master weights.

The callback keeps a deep copy of the whole model, updates it after steps, and swaps it with the
model around validation. Here no rank has the whole model, and in bf16 the module's weights are too
coarse to average. So the callback gets an ``AveragedModel`` of this rank's master shards instead,
and averages, swaps and copies those. An elementwise averaging function gives the same average on
any number of ranks and at any stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.nn.experts.trained import TrainedExperts
from lightning_fastmoe.zero.averages import Averages
from lightning_fastmoe.zero.state import ZeroShard, ZeroState

_SWAP, _COPY = "_swap_models", "_copy_average_to_current"
_HANDLED = ("setup", _SWAP, _COPY, "on_save_checkpoint", "on_load_checkpoint")
"""The callback's methods that handle whole models."""
_AFTER_STEPS = "on_train_batch_end"
_STATE = "averaging_state"


class ShardedAverage(AveragedModel):
    """The average of this rank's shard; its ``module`` holds tensors in order, without names.

    Args:
        engine: the DeepSpeed engine, with its optimizer.
        device: where the averages are kept; None for the device of the averaged weights.
        options: the options of ``AveragedModel``.

    Attributes:
        swapped: whether the model holds the averages, and this object the training weights.
    """

    def __init__(self, engine: Any, device: Any, options: dict[str, Any]) -> None:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        state = ZeroState(engine, names)
        super().__init__(_ShardModule(state.shard(), engine.module), device=device, **options)
        # In a closure: as attributes they would be submodules, and averaged.
        self._of: Callable[[], tuple[Any, ZeroState]] = lambda: (engine, state)
        self.swapped = False

    @override
    def update_parameters(self, model: nn.Module) -> None:
        """Updates the average, including edits made to the weights since the last step."""
        engine, state = self._of()
        engine.take_over_edits()
        super().update_parameters(_ShardModule(state.shard(), engine.module))

    @contextmanager
    def writing(self) -> Iterator[nn.Module]:
        """The training weights as a module; writes to it take effect."""
        engine, state = self._of()
        # Validation runs in inference mode, and tensors allocated there can't be trained.
        with torch.inference_mode(False), torch.no_grad():
            engine.take_over_edits()
            state.begin_loading()
            shard = state.shard()
            yield _ShardModule(shard, engine.module)
            for one in shard.loose:
                one.write_back()
            state.finish_loading()
            engine.edits.forget()

    def averages(self) -> Averages:
        """The averages, for a checkpoint."""
        engine, state = self._of()
        shard = state.shard()
        kept = [p.detach() for p in self.module.parameters()]
        module: nn.Module = engine.module
        by_id = {id(b): own for b, own in zip(module.buffers(), self.module.buffers(), strict=True)}
        return Averages(
            kept[: len(shard.flats)],
            dict(zip((one.name for one in shard.loose), kept[len(shard.flats) :], strict=True)),
            {name: by_id[id(b)] for name, b in module.named_buffers(remove_duplicate=False)},
            self.swapped,
        )


class _ShardModule(nn.Module):
    """A module whose parameters and buffers are this rank's shard, sharing its memory."""

    def __init__(self, shard: ZeroShard, module: nn.Module) -> None:
        super().__init__()
        tensors = [*(f.master for f in shard.flats), *(one.data for one in shard.loose)]
        self.tensors = nn.ParameterList(
            nn.Parameter(tensor.detach(), requires_grad=False) for tensor in tensors
        )
        for i, buffer in enumerate(module.buffers()):
            self.register_buffer(f"buffer_{i}", buffer)


class AveragedRun:
    """Adapts one WeightAveraging callback for one run.

    Args:
        callback: the callback; its methods that handle whole models are replaced until
            :meth:`end`.

    Raises:
        ConfigError: if it overrides one of these methods, or its averaging function is not
            elementwise.
    """

    def __init__(self, callback: WeightAveraging) -> None:
        self._callback = callback
        self._forget()  # an earlier run may have ended without a teardown
        # Of an earlier run, too; what a checkpoint says comes later.
        callback._latest_update_step, callback._latest_update_epoch = 0, -1
        kind = type(callback)
        own = [name for name in _HANDLED if getattr(kind, name) != getattr(WeightAveraging, name)]
        if own:
            raise ConfigError(
                f"{kind.__name__} overrides {own[0]}() of WeightAveraging, which would never be"
                " called: averages are partitioned over ranks here. Override should_update() only."
            )
        if not _is_elementwise(callback._kwargs):
            raise ConfigError(
                f"The averaging function of {kind.__name__} is not elementwise, but parameters are"
                " partitioned over ranks here. Use get_ema_avg_fn(), or another elementwise"
                " function."
            )
        replacements = {
            "setup": lambda *_, **__: None,  # it would copy the whole model
            _SWAP: self._swap,
            _COPY: self._copy,
            "on_save_checkpoint": self._on_save,
            "on_load_checkpoint": self._on_load,
            _AFTER_STEPS: self._on_train_batch_end,
        }
        vars(callback).update(replacements)

    def begin(self, engine: Any) -> None:
        """Starts the average from the engine's weights.

        Raises:
            ConfigError: if single experts of a layer are trained.
        """
        if any(isinstance(module, TrainedExperts) for module in engine.module.modules()):
            raise ConfigError(
                "WeightAveraging would average the experts that SparseUpdate has selected, but not"
                " their rows in the frozen stacks. Remove it, or call SparseUpdate.release(model)"
                " before Trainer.fit to train whole layers."
            )
        callback = self._callback
        options = {"use_buffers": callback._use_buffers, **callback._kwargs}
        callback._average_model = ShardedAverage(engine, callback._device, options)

    def end(self) -> None:
        """Restores the callback's methods. By now the averages are in the model."""
        self._forget()
        self._callback._average_model = None

    def averages(self) -> Averages | None:
        """The averages for a checkpoint, once there is an engine."""
        model = self._callback._average_model
        return model.averages() if isinstance(model, ShardedAverage) else None

    def _forget(self) -> None:
        for name in (*_HANDLED, _AFTER_STEPS):
            vars(self._callback).pop(name, None)

    @property
    def _model(self) -> ShardedAverage:
        model = self._callback._average_model
        assert isinstance(model, ShardedAverage)
        return model

    def _swap(self, _: pl.LightningModule) -> None:
        model = self._model
        with model.writing() as shard:
            WeightAveraging._swap_models(self._callback, shard)  # type: ignore[arg-type]
        model.swapped = not model.swapped

    def _copy(self, _: pl.LightningModule) -> None:
        with self._model.writing() as shard:
            WeightAveraging._copy_average_to_current(self._callback, shard)  # type: ignore[arg-type]

    def _on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Leaves a dropped step out, which the Trainer counts."""
        if trainer.strategy.deepspeed_engine.has_dropped_step:
            self._callback._latest_update_step = trainer.global_step
        kind = type(self._callback)
        kind.on_train_batch_end(self._callback, trainer, *arguments)

    def _on_save(self, *arguments: Any) -> None:
        """The weights themselves are written by each rank: see ``zero/averages.py``."""
        arguments[-1][_STATE] = {"n_averaged": self._model.n_averaged.cpu()}

    def _on_load(self, *arguments: Any) -> None:
        checkpoint = arguments[-1]
        if "current_model_state" in checkpoint:
            raise CheckpointError(
                "The checkpoint was saved with WeightAveraging under another strategy, and only its"
                " averages can be loaded here, not the weights that were training. Resume it with"
                " that strategy, or without WeightAveraging to train on from the averages."
            )
        if _STATE in checkpoint:
            self._model.n_averaged.copy_(checkpoint[_STATE]["n_averaged"])
        else:
            rank_zero_warn(
                "The checkpoint was saved without WeightAveraging. Training and the average both"
                " start from its weights."
            )


class Averaging:
    """Adapts the WeightAveraging callback of each run, if it has one; one object per strategy."""

    def __init__(self) -> None:
        self._run: AveragedRun | None = None

    def prepare(self, module: pl.LightningModule | None) -> None:
        """Takes over the callback of a training run, before it is set up.

        Raises:
            ConfigError: for two such callbacks, or one that can't work here.
        """
        if module is None or not module.trainer.training:
            return
        callbacks: list[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
        if len(found) > 1:
            raise ConfigError(
                f"The Trainer has {len(found)} WeightAveraging callbacks, which would swap each"
                " other's weights: keep one."
            )
        self._run = AveragedRun(found[0]) if found else None

    def begin(self, engine: Any) -> None:
        """Starts the average from the engine's weights."""
        if self._run is not None:
            self._run.begin(engine)

    def averages(self) -> Averages | None:
        """The averages for a checkpoint; None without the callback."""
        return self._run.averages() if self._run is not None else None

    def end(self) -> None:
        """Restores the callback's methods."""
        run, self._run = self._run, None
        if run is not None:
            run.end()


@torch.no_grad()
def _is_elementwise(options: dict[str, Any]) -> bool:
    """Whether averaging a tensor in fragments gives the same result as averaging it whole."""
    average, current = torch.linspace(-2, 3, 8), torch.linspace(1, 0, 8).square()
    cut = 3
    fragments = torch.cat(
        [
            _averaged(options, average[:cut], current[:cut]),
            _averaged(options, average[cut:], current[cut:]),
        ]
    )
    return torch.equal(_averaged(options, average, current), fragments)


def _averaged(options: dict[str, Any], average: Tensor, current: Tensor) -> Tensor:
    model = AveragedModel(_Values(average), **options)
    model.n_averaged.fill_(3)
    model.update_parameters(_Values(current))
    return next(model.module.parameters()).detach()


class _Values(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone(), requires_grad=False)
