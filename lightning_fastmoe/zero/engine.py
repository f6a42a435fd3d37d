"""DeepSpeed's engine, extended for sharded experts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from lightning_fastmoe.errors import (
    ConfigError,
    FastMoEError,
    NonFiniteError,
    ParameterEditError,
)
from lightning_fastmoe.nn.attached_loss import LossScale
from lightning_fastmoe.nn.expert_layers import ExpertLayer
from lightning_fastmoe.nn.nonfinite import take_largest
from lightning_fastmoe.zero.optimizer_step import ZeroOptimizer, use_fewer_passes
from lightning_fastmoe.zero.param_groups import UserParamGroups
from lightning_fastmoe.zero.shared_options import SharedOptions
from lightning_fastmoe.zero.untraced import leave_to_python, restore_linear
from lightning_fastmoe.zero.verdict import PendingVerdict
from lightning_fastmoe.zero.weight_edits import WeightEdits

_KNOWN_OPTIMIZERS = (
    NoneType,  # inference, stages 1 and 2
    DeepSpeedZeRoOffload,  # inference, stage 3
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
)

NonFinitePolicy = Literal["raise", "skip", "ignore"]


@dataclass
class ExpertState:
    """What the engine knows about experts.

    Attributes:
        layers: name -> MoE layer, sharded or not.
        loss_scale: the loss scale, shared by all layers.
        nonfinite: what to do when NaN or Inf reaches a router.
        user_groups: the optimizer's groups as the user wrote them; None without an optimizer.
    """

    layers: dict[str, ExpertLayer] = field(default_factory=dict)
    loss_scale: LossScale = field(default_factory=LossScale)
    nonfinite: NonFinitePolicy = "raise"
    user_groups: UserParamGroups | None = None

    @property
    def sharded_layers(self) -> list[ExpertLayer]:
        """The layers whose experts are sharded over ranks."""
        return [layer for layer in self.layers.values() if layer.is_sharded]

    @property
    def optimizes_sharded_experts(self) -> bool:
        """Whether some parameter group holds sharded experts."""
        return self.user_groups is not None and self.user_groups.has_experts


class FastMoEEngine(DeepSpeedEngine):  # type: ignore[misc]
    """``DeepSpeedEngine`` for models with this package's MoE layers.

    The base class recognises only its own MoE layers. Without its ``has_moe_layers`` flag, ZeRO 3
    silently trains third-party experts wrongly.

    Args:
        expert_state: the layers and how to treat them.
        kwargs: as for the base class.

    Attributes:
        edits: applies the user's edits of parameters; None without an optimizer.
        mid_accumulation: whether gradients of an unfinished accumulation are pending.
        has_accumulated: whether earlier micro-batches of the step have left gradients.
        next_clip: the norm that the next step clips by, 0 for none; None leaves the config's.
    """

    next_clip: float | None = None

    def __init__(self, *, expert_state: ExpertState, **kwargs: Any) -> None:
        self.expert_state = expert_state
        self._awaits_step = False
        self.mid_accumulation = self.has_accumulated = False
        self.edits: WeightEdits | None = None
        try:
            super().__init__(**kwargs)
            self._take_optimizer()
        except BaseException:
            self.let_go()
            raise

    def _take_optimizer(self) -> None:
        if type(self.optimizer) not in _KNOWN_OPTIMIZERS:
            raise ConfigError(
                f"The DeepSpeed config selects {type(self.optimizer).__name__}, which has not been"
                " tested with experts. Drop the options that select it (data_types,"
                " super_offload, ...)."
            )
        use_fewer_passes(self.optimizer, self.module)
        if self.zero_optimization_partition_weights():
            leave_to_python(getattr(self.optimizer, "parameter_offload", self.optimizer))
        user = self.expert_state.user_groups
        if user is not None:
            optimized = [p for group in user.optimizer.param_groups for p in group["params"]]
            self.edits = WeightEdits(self, optimized)

    @property
    def has_dropped_step(self) -> bool:
        """Whether the latest step was dropped, of which the Trainer counts one nonetheless."""
        return bool(getattr(self.optimizer, "overflow", False))

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        state = self.expert_state
        stage_3 = self.zero_optimization_partition_weights()
        self.has_moe_layers = bool(state.sharded_layers) and (
            stage_3 or state.optimizes_sharded_experts
        )
        self.num_experts = [layer.num_experts for layer in state.sharded_layers]

    def _validate_zero3_moe_compatibility(self) -> None:
        # The base class looks for its own layers. Its other refusals are made earlier, in
        # `check_deepspeed_config`.
        if self.sequence_parallel_size != 1:
            raise ConfigError(
                f"sequence_parallel_size={self.sequence_parallel_size} can't be combined with"
                " experts under ZeRO 3. Set it to 1."
            )

    def let_go(self) -> None:
        """After the last step, drops references that keep it alive; it can still save and evaluate.

        Gradient hooks, which Python's garbage collector doesn't see, and a global list in DeepSpeed
        refer to the engine, so that it, the model, the optimizer and the Trainer would never be
        freed. ZeRO 3 also replaces ``torch.nn.functional.linear`` for the whole process, with a
        version that rounds differently; this restores the original.
        """
        if self.edits is not None:
            self.edits.let_go()
        hooks = getattr(vars(self).get("optimizer"), "_grad_acc_hooks", None) or []
        for hook in hooks:
            hook.remove()
        hooks.clear()
        stack = parameter_offload.FWD_MODULE_STACK
        own = set(map(id, self.modules())) if "_modules" in vars(self) else set()
        stack[:] = [module for module in stack if id(module) not in own]
        restore_linear()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs backward without dividing the loss by the accumulation steps again.

        Lightning has divided it already, and DeepSpeed would divide it a second time. The attached
        loss terms take their scale from ``loss``.
        """
        if self._awaits_step:
            raise ConfigError(
                "backward() was called twice before a step: DeepSpeed would keep only the last"
                " gradient. Use Trainer(accumulate_grad_batches=...) with automatic optimization,"
                " or add the losses and call backward once."
            )
        if not loss.requires_grad:
            raise ConfigError(
                "The loss doesn't depend on anything that is trained: it was computed without"
                " gradients, detached, or made anew from its value."
            )
        self._awaits_step = bool(self.is_gradient_accumulation_boundary())
        self.mid_accumulation = not self._awaits_step
        self.has_accumulated |= self.mid_accumulation
        kwargs["scale_wrt_gas"] = False
        with self.expert_state.loss_scale.of(loss):
            return super().backward(loss, *args, **kwargs)

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        state = self.expert_state
        self._awaits_step = self.mid_accumulation = False
        zero = self.optimizer
        clip = zero.clip_grad if self.next_clip is None else self.next_clip
        self.next_clip = None  # also if this step isn't taken
        if state.user_groups is not None:
            state.user_groups.call_hooks(after=False)
        reads_once = isinstance(zero, ZeroOptimizer) and zero.updates_at_once
        refusal: FastMoEError | None = None
        try:
            self.take_over_edits(samples=not reads_once)
            _refuse(self.edits.assigned_gradients() if self.edits is not None else [])
        except FastMoEError as error:
            refusal = error
        norm = zero.gradient_norm() if reads_once else None
        pending = self._judge(refusal is not None, norm, clip)
        if norm is not None and self._ranks_meet:
            with self._clipping(clip):
                zero.update_unless(pending.blocked)
        verdict = pending.read()
        if norm is not None and not verdict.is_clear:
            zero.forget_update()
        is_refused = verdict.is_refused
        if verdict.options_differ and not is_refused:
            assert self._shared_options is not None
            refusal = self._shared_options.complaint(clip)
            is_refused = refusal is not None
        if norm is not None and (is_refused or (verdict.bad and state.nonfinite == "raise")):
            zero.forget_norm()
        if is_refused:
            raise refusal or ParameterEditError(
                "Another rank has refused edits of parameters or of the optimizer's groups: see its"
                " error. Make the same edits on all ranks."
            )
        if verdict.bad and state.nonfinite == "raise":
            raise NonFiniteError(
                f"NaN or Inf reached the router of {', '.join(verdict.bad)} on at least one rank;"
                f" step {self.global_steps} was not taken and no weight has changed. Lower the"
                " learning rate or look for the bad batch; FastMoEStrategy(nonfinite='skip') skips"
                " such steps on all ranks, 'ignore' lets them pass."
            )
        if norm is not None:
            zero.tell_if_finite(verdict.is_norm_finite)
        if verdict.has_late_edits:
            self.take_over_edits()
        self._collect_gradients()
        with self._overflowing_step() if verdict.bad else nullcontext(), self._clipping(clip):
            super()._take_model_step(lr_kwargs)
        self._drop_gradients()
        if state.user_groups is not None:
            state.user_groups.pull()
        if self.edits is not None:
            self.edits.remember()
        if state.user_groups is not None and not getattr(zero, "overflow", False):
            state.user_groups.call_hooks(after=True)

    @contextmanager
    def _clipping(self, clip: float) -> Iterator[None]:
        """Inside, the ZeRO optimizer clips by this norm."""
        optimizer = self.optimizer
        configured, optimizer.clip_grad = optimizer.clip_grad, clip
        try:
            yield
        finally:
            optimizer.clip_grad = configured

    def _collect_gradients(self) -> None:
        """Sends all gradients to ZeRO 3's host optimizer, not only the last micro-batch's."""
        zero = self.optimizer
        if self.has_accumulated and getattr(zero, "offload_optimizer", False):
            zero._offload_boundary_param_ids = {
                p.ds_id for group in zero.fp16_groups for p in group
            }
            zero._finalize_offload_gradient_accumulation()
        self.has_accumulated = False

    def _drop_gradients(self) -> None:
        """Clears gradients that ZeRO 3 would reuse in a step where their parameters are unused."""
        if self.zero_optimization_partition_weights():
            zero = self.optimizer
            zero.grad_partitions_flat_buffer.zero_()
            if zero.offload_optimizer:
                zero.norm_for_param_grads.clear()
                for flat in zero.fp32_partitioned_groups_flat:
                    if flat.grad is not None:
                        flat.grad.zero_()

    def take_over_edits(self, samples: bool = True) -> None:
        """Applies the user's edits of parameters and of the optimizer's groups.

        Args:
            samples: whether to compare samples of the parameters too, which waits for the device.

        Raises:
            ParameterEditError: if an edit of a parameter can't be applied.
            ParameterGroupError: if groups or parameters were added, removed or moved.
        """
        if self.expert_state.user_groups is not None:
            self.expert_state.user_groups.push()
        if self.edits is not None:
            _refuse(self.edits.settle(samples))

    @property
    def _ranks_meet(self) -> bool:
        """Whether ranks tell each other what they know before each step."""
        state = self.expert_state
        has_something = bool(state.layers) or self._shared_options is not None
        return state.nonfinite != "ignore" and has_something

    def _judge(self, refused: bool, norm: Tensor | None, clip: float) -> PendingVerdict:
        """Has the device find out what it and the other ranks know about the next step.

        Args:
            refused: whether this rank refuses the step.
            norm: of the gradients; None where the optimizer finds out by itself.
            clip: the norm that the step clips by.
        """
        layers, shared = self.expert_state.layers, self._shared_options
        names = list(layers) if self._ranks_meet else []
        asks_device = norm is not None or self._ranks_meet
        device = self.device if asks_device else torch.device("cpu")
        values = take_largest((layers[name].nonfinite for name in names), device)
        if norm is not None:
            values = torch.cat([values, norm.reshape(1)])
        flags = [~values.isfinite()]
        if norm is not None and self.edits is not None:
            flags.append(self.edits.samples_differ().reshape(1))
        if isinstance(zero := self.optimizer, ZeroOptimizer) and norm is not None:
            # The user's options have been taken over since it was decided to update at once.
            is_late = int(not zero.updates_at_once)
            flags.append(torch.full((1,), is_late, dtype=torch.int32, device=device))
        has_digest = shared is not None and not refused and self._ranks_meet
        digest = shared.digest(clip) if shared is not None and has_digest else 0
        own = [int(refused), digest, -digest]
        flags.extend(torch.full((1,), x, dtype=torch.int32, device=device) for x in own)
        everyone = torch.cat(flags)
        if self._ranks_meet:
            dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
        return PendingVerdict(everyone, names, norm is not None)

    @property
    def _shared_options(self) -> SharedOptions | None:
        user = self.expert_state.user_groups
        return None if user is None else user.shared

    @contextmanager
    def _overflowing_step(self) -> Iterator[None]:
        """Inside, the ZeRO optimizer drops the step as if it had overflowed in fp16."""
        optimizer = self.optimizer

        def overflow(**_: Any) -> bool:
            optimizer.overflow = True
            return True

        name = (
            "_overflow_check_and_loss_scale_update"
            if self.zero_optimization_partition_weights()
            else "check_overflow"
        )
        checked = getattr(optimizer, "check_grad_overflow", None)
        optimizer.check_grad_overflow = True
        setattr(optimizer, name, overflow)
        try:
            yield
        finally:
            delattr(optimizer, name)
            optimizer.check_grad_overflow = checked


def _refuse(complaints: list[str]) -> None:
    if complaints:
        more = f" ({len(complaints) - 1} more like it.)" if len(complaints) > 1 else ""
        raise ParameterEditError(complaints[0] + more)


def make_engine(
    *,
    model: nn.Module,
    config: dict[str, Any],
    device_rank: int,
    expert_state: ExpertState,
    optimizer: Any = None,
    lr_scheduler: Any = None,
) -> FastMoEEngine:
    """Does what ``deepspeed.initialize`` does, which can't create our engine class."""
    config_class = DeepSpeedConfig(config, None, mesh_device=None)
    parameters = [p for p in model.parameters() if p.requires_grad] if optimizer else []
    engine = FastMoEEngine(
        expert_state=expert_state,
        args=argparse.Namespace(device_rank=device_rank),
        model=model,
        optimizer=optimizer,
        model_parameters=parameters,
        lr_scheduler=lr_scheduler,
        dist_init_required=False,
        config=config,
        config_class=config_class,
    )
    engine._configure_python_gc()
    return engine
