"""Builds and tears down the DeepSpeed engine around a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.core.optimizer import _init_optimizers_and_lr_schedulers
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.strategies.deepspeed import remove_module_hooks
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_fastmoe.distributed import ExpertSharder
from lightning_fastmoe.distributed.data_parallel.contents import Contents
from lightning_fastmoe.distributed.data_parallel.start import check_same_tensors
from lightning_fastmoe.distributed.expert_checks import (
    check_batch_norms,
    check_not_tied,
    divided_experts,
)
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.collect import warn_about_causality
from lightning_fastmoe.nn.expert_layers import KINDS, expert_layers
from lightning_fastmoe.nn.experts.lora import check_trained
from lightning_fastmoe.nn.hooks import watch_replaced_hooks
from lightning_fastmoe.strategy.checks import (
    advise_fused,
    check_can_be_saved,
    check_optimizer,
    check_single,
    warn_of_float64,
    warn_of_idle_checkpointing,
)
from lightning_fastmoe.strategy.expert_groups import ExpertGroups
from lightning_fastmoe.strategy.same_settings import check_same_layers, check_same_optimizer
from lightning_fastmoe.strategy.same_start import take_start_of_rank_zero
from lightning_fastmoe.strategy.trainer_options import check_has_no_closure
from lightning_fastmoe.zero.engine import (
    ExpertState,
    FastMoEEngine,
    NonFinitePolicy,
    make_engine,
)
from lightning_fastmoe.zero.gathering import meet_before_gathering
from lightning_fastmoe.zero.groups import (
    check_partitions,
    check_tags,
    group_name,
    tag_experts,
)
from lightning_fastmoe.zero.leaf_modules import guard_leaf_modules
from lightning_fastmoe.zero.param_groups import release, split_expert_groups
from lightning_fastmoe.zero.replaced_parameters import refuse_replaced_parameters
from lightning_fastmoe.zero.same_on_ranks import check_same_groups, check_same_structure
from lightning_fastmoe.zero.shared_options import SharedOptions
from lightning_fastmoe.zero.whole_saving import guard_partitioned

_ENGINE = "_fastmoe_engine"


class Engines:
    """Builds an engine for each run; one object per strategy.

    Args:
        strategy: the strategy, with its module, device and DeepSpeed config.
        groups: the expert parallel groups.
        nonfinite: what to do when NaN or Inf reaches a router.
        exact: whether the layers must have the bits of one process.

    Attributes:
        state: what the engine and the strategy share about the model's experts.
    """

    def __init__(
        self,
        strategy: DeepSpeedStrategy,
        groups: ExpertGroups,
        nonfinite: NonFinitePolicy,
        exact: bool,
    ) -> None:
        self._strategy, self._groups, self._nonfinite = strategy, groups, nonfinite
        self._exact = exact
        self.state = ExpertState(nonfinite=nonfinite)

    def shard(self, trainer: pl.Trainer, module: pl.LightningModule) -> ExpertSharder:
        """Shards the experts and connects every MoE layer to the run.

        An engine that an earlier fit, by any strategy, put around the module's parameters is
        freed: its gradient hooks would run along with the new engine's. It isn't freed when a fit
        ends, as it is still needed to save checkpoints.

        Raises:
            ConfigError: for experts that can't be trained or saved when they are sharded.
            TopologyError: if ZeRO 3 has partitioned parameters over groups that are gone.
        """
        check_partitions(module)  # before anything uses the groups
        earlier = vars(module).pop(_ENGINE, None)
        if earlier is not None:
            earlier.destroy()
        state = self.state
        state.layers = dict(expert_layers(module))
        sharder = self._groups.make(divided_experts(state.layers.items()))
        if self._groups.wants_sharding(bool(state.layers)):
            for kind in KINDS:
                kind.check(module)
        if sharder.mesh.ep_size > 1:
            check_not_tied(state.layers)
        sharder.shard(module, self._exact)
        if sharder.automatic:
            rank_zero_info(sharder.automatic)
        if self._strategy.is_global_zero:
            warn_about_causality(module)
        plugin: Any = self._strategy.precision_plugin
        warn_of_float64(module, plugin.precision)
        tag_experts(state.layers.values(), sharder.mesh)
        check_tags(module, state.layers.values())
        for layer in state.layers.values():
            if isinstance(layer, MoE):
                layer.balancing.scale = state.loss_scale
            collects = self._nonfinite != "ignore"
            layer.nonfinite.begin(self._strategy.root_device, collects=collects)
        check_can_be_saved(trainer, module, state.layers)
        check_batch_norms(state.layers)
        if self._strategy.zero_stage_3:
            check_same_structure(state.layers)
            refuse_replaced_parameters(module)
        return sharder

    def begin(self, module: pl.LightningModule) -> None:
        """After the engine is built: connects it to the layers, and lets a later fit find it."""
        if self._strategy.zero_stage_3:
            assert self._groups.sharder is not None
            meet_before_gathering(self._strategy.deepspeed_engine, self._groups.sharder.meet)
            layers = self.state.layers.values()
            guard_leaf_modules(module, (p for one in layers for p in one.experts.parameters()))
            guard_partitioned(module)
        for layer in self.state.layers.values():  # the engine has moved them
            if isinstance(layer, MoE):
                self.state.loss_scale.follow(layer)
        vars(module)[_ENGINE] = self._strategy.model

    def optimizer(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        """The user's optimizer and its scheduler.

        Raises:
            ConfigError: for more than one of either, or one that can't work here.
        """
        assert self._strategy.lightning_module is not None
        found, schedulers = _init_optimizers_and_lr_schedulers(self._strategy.lightning_module)
        # Again: callbacks may have made parameters of single experts since.
        tag_experts(self.state.layers.values(), self._groups.mesh)
        check_single(found, schedulers)
        release(found[0])
        check_has_no_closure(found[0])
        check_optimizer(found[0])
        advise_fused(found[0], self._strategy.root_device)
        check_same_optimizer(found[0], schedulers)
        return found[0], schedulers[0] if schedulers else None

    def for_training(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: Any,
        before: Iterable[Callable[[nn.Module, Optimizer], None]],
    ) -> FastMoEEngine:
        """An engine that trains.

        Args:
            model: experts sharded and tagged.
            optimizer: the user's. The engine gets a twin whose groups hold either dense parameters
                or experts.
            lr_scheduler: the user's, or None.
            before: called with the model and the twin.
        """
        check_same_tensors(Contents(model, self.state.layers).parameters, self._groups.mesh)
        check_same_layers(self.state.layers)
        check_trained(model)
        warn_of_idle_checkpointing(model)
        names = {id(p): name for name, p in model.named_parameters()}
        user = split_expert_groups(optimizer, names, group_name(self._groups.mesh))
        check_same_groups(user.twin, self.state.layers)
        if self._strategy.world_size > 1:
            user.shared = SharedOptions(optimizer, self._groups.mesh.ep_rank)
            if (complaint := user.shared.complaint()) is not None:
                raise complaint
        self.state.user_groups = user
        for call in tuple(before):  # one that removes itself must not hide the next
            call(model, user.twin)
        engine = self._make(model, self._config, optimizer=user.twin, lr_scheduler=lr_scheduler)
        user.attach(engine.optimizer)
        mesh, device = self._groups.mesh, self._strategy.root_device
        take_start_of_rank_zero(model, self.state.layers, mesh, device)
        return engine

    def for_inference(self, model: nn.Module) -> FastMoEEngine:
        """An engine without an optimizer."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "timers": self._config.get("timers", {}),
        }
        if self._strategy.zero_stage_3:
            keys = ("fp16", "bf16", "zero_optimization", "zero_allow_untested_optimizer")
            config.update({key: self._config[key] for key in keys if key in self._config})
        else:
            # Without an optimizer DeepSpeed would still build a mixed-precision optimizer, which
            # doesn't support experts; only its cast is needed here.
            plugin: Any = self._strategy.precision_plugin
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(plugin._desired_dtype)
        remove_module_hooks(model)
        watch_replaced_hooks(model)
        self.state.user_groups = None
        return self._make(model, config)

    def end(self) -> None:
        """Disconnects the layers and the engine from the run."""
        for layer in self.state.layers.values():
            layer.disconnect()
        if isinstance(self._strategy.model, FastMoEEngine):
            self._strategy.model.let_go()

    def _make(self, model: nn.Module, config: dict[str, Any], **options: Any) -> FastMoEEngine:
        index = self._strategy.root_device.index
        return make_engine(
            model=model,
            config=config,
            device_rank=self._strategy.local_rank if index is None else index,
            expert_state=self.state,
            **options,
        )

    @property
    def _config(self) -> dict[str, Any]:
        assert isinstance(self._strategy.config, dict)
        return self._strategy.config
