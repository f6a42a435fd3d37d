"""FastMoEStrategy: expert parallelism beside DeepSpeed ZeRO data parallelism, for Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.core.optimizer import _init_optimizers_and_lr_schedulers
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.deepspeed import remove_module_hooks
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fastmoe.distributed import (
    AutoPlacement,
    ExpertMesh,
    ExpertSharder,
    make_expert_mesh,
    resolve_expert_parallel_size,
)
from lightning_fastmoe.errors import ConfigError, UnmanagedExpertsError
from lightning_fastmoe.nn import moe_layers
from lightning_fastmoe.nn.collect import warn_about_causality
from lightning_fastmoe.nn.placement import expert_placement
from lightning_fastmoe.registration import NAME, register_names
from lightning_fastmoe.strategy.arguments import check_arguments, check_stage_beside_config
from lightning_fastmoe.strategy.checkpoints import ExpertCheckpoints
from lightning_fastmoe.strategy.checks import (
    check_can_be_saved,
    check_directories,
    check_links,
    check_objects,
    check_optimizer,
    check_single,
    check_trainer,
)
from lightning_fastmoe.strategy.compiled import unwrap_compiled
from lightning_fastmoe.strategy.ending import is_launched
from lightning_fastmoe.strategy.exchange_waits import ExchangeWaits
from lightning_fastmoe.strategy.model_summary import correct_summary
from lightning_fastmoe.strategy.pending_names import count_pending_names
from lightning_fastmoe.strategy.trainer_options import check_has_no_closure, check_trainer_options
from lightning_fastmoe.strategy.uneven import UnevenData
from lightning_fastmoe.strategy.watch import Watch
from lightning_fastmoe.zero.config import check_deepspeed_config, select_accelerator
from lightning_fastmoe.zero.engine import (
    ExpertState,
    FastMoEEngine,
    NonFinitePolicy,
    make_engine,
)
from lightning_fastmoe.zero.gathering import meet_before_gathering
from lightning_fastmoe.zero.groups import (
    check_tags,
    divided_experts,
    group_name,
    register_groups,
    tag_experts,
)
from lightning_fastmoe.zero.param_groups import release, split_expert_groups
from lightning_fastmoe.zero.same_on_ranks import check_same_groups, check_same_structure

_ENGINE = "_fastmoe_engine"


class FastMoEStrategy(ExpertCheckpoints):
    """Trains mixture-of-experts models: experts split over ranks, the rest by DeepSpeed ZeRO.

    Every ``MoE`` layer of the model has its experts divided over ``expert_parallel_size``
    neighbouring ranks; replicas of an expert (if the world is larger) are ZeRO-partitioned among
    themselves, all other parameters over the whole world. The result equals training on one
    process: an expert's gradient is that of the loss averaged over the global batch.

    Runs on CUDA (NCCL) and on the CPU (gloo).

    Args:
        expert_parallel_size: ranks over which the experts of each layer are split. It must divide
            the world and every layer's ``num_experts``. "auto" is the largest such size that fits
            into a node.
        stage: ZeRO stage. 1 partitions optimizer states, 2 also gradients, 3 also parameters.
        nonfinite: what happens when NaN or Inf reaches a router on any rank in a training step:
            "raise" stops all ranks before the weights change, "skip" drops the step on all ranks,
            "ignore" does not look (ZeRO itself drops a step whose gradient norm is not finite, in
            fp32 and fp16).
        verify_checkpoints: compare every file of a checkpoint with its hash before loading from it.
        trust_checkpoints: also unpickle objects that are not plain data (of callbacks, say) from
            checkpoints. That can run any code: only for checkpoints whose origin you trust.
        async_checkpoint: copy the state into the host's memory and write it while training goes on.
            Needs that much memory, once. An error surfaces at the next step; the end of a run waits
            for the last checkpoint.
        hang_timeout: seconds after which a run that stands still ends, on every rank, with its
            stacks on stderr and exit status 75: no batch was finished (in training or evaluation),
            and no phase of the run began or ended. None switches it off, as for a debugger.
        exchange_timeout: seconds that a rank waits for the others in an exchange of tokens. Then it
            raises an ExchangeError that says where each rank is, as do the others. "auto" is nine
            tenths of ``hang_timeout``: no wait is cut that may be legitimate. None is no limit.
        signal_grace: seconds after SIGTERM, without a batch that ends, after which the process ends
            with status 143. A second SIGTERM ends it at once. None waits as long as it takes.
        kwargs: as for :class:`pytorch_lightning.strategies.DeepSpeedStrategy`.

    Raises:
        ConfigError: if an option is unknown or would train experts wrongly.
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
        **kwargs: Any,
    ) -> None:
        own = {
            "expert_parallel_size": expert_parallel_size,
            "stage": stage,
            "nonfinite": nonfinite,
            "verify_checkpoints": verify_checkpoints,
            "trust_checkpoints": trust_checkpoints,
            "async_checkpoint": async_checkpoint,
            "hang_timeout": hang_timeout,
            "signal_grace": signal_grace,
            "exchange_timeout": exchange_timeout,
        }
        check_objects("FastMoEStrategy", kwargs.values())
        checked = check_arguments(FastMoEStrategy.__init__, own, kwargs)
        kwargs.update((name, checked[name]) for name in kwargs)
        stage, expert_parallel_size = checked["stage"], checked["expert_parallel_size"]
        super().__init__(stage=stage, **kwargs)
        assert isinstance(self.config, dict)
        # DeepSpeed demands its own CPU Adam for offloading unless told that any optimizer will do.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        check_deepspeed_config(self.config)
        check_stage_beside_config(stage, self.config)
        self.expert_parallel_size = expert_parallel_size
        self._nonfinite = nonfinite
        self.verify_checkpoints: bool = checked["verify_checkpoints"]
        self.trust_checkpoints: bool = checked["trust_checkpoints"]
        self.async_checkpoint: bool = checked["async_checkpoint"]
        self._sharder: ExpertSharder | None = None
        self._expert_state = ExpertState(nonfinite=nonfinite)
        self._uneven = UnevenData(self)
        self._watch = Watch(hang_timeout, signal_grace)
        self._waits = ExchangeWaits(exchange_timeout, hang_timeout)
        # Called with the model, experts sharded, and an optimizer whose groups are of one kind.
        self.before_engine: list[Callable[[nn.Module, Optimizer], None]] = []

    # ---------------------------------------------------------------- set-up of ranks and groups

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator | CPUAccelerator):
            raise ConfigError(
                f"accelerator={type(self.accelerator).__name__} is not supported: FastMoEStrategy"
                " runs on 'cuda' (NCCL) and 'cpu' (gloo)."
            )
        module = self.lightning_module
        if module is not None and module._trainer is not None:
            # Before callbacks are set up, some of which fail for reasons of their own.
            check_trainer_options(module._trainer, module)
        # Past DeepSpeedStrategy's own method, which refuses the CPU.
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        select_accelerator(self.root_device)
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            # What the base class does, less its check of CUDA device indices.
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
            assert isinstance(self.config, dict)
            self.config["zero_optimization"]["overlap_comm"] = False  # there are no streams
        if self.expert_parallel_size != "auto":
            self._mesh_for({})

    def _mesh_for(self, num_experts: Mapping[str, int]) -> ExpertSharder:
        """The groups of the run, made when first needed: "auto" must see a layer before."""
        if self._sharder is None:
            size = resolve_expert_parallel_size(
                self.expert_parallel_size, self.world_size, self.num_processes, num_experts
            )
            mesh = make_expert_mesh(size, self.root_device.type, self._timeout)
            register_groups(mesh)
            self._sharder = ExpertSharder(mesh, self.num_processes, self._timeout)
            if self.lightning_module is not None:
                self.lightning_module._device_mesh = mesh.device_mesh
        return self._sharder

    @property
    @override
    def expert_mesh(self) -> ExpertMesh:
        """The expert parallel and expert data parallel groups.

        Raises:
            UnmanagedExpertsError: before they exist.
        """
        if self._sharder is None:
            raise UnmanagedExpertsError(
                "The expert mesh does not exist yet: it is made when the Trainer starts, and with"
                " expert_parallel_size='auto' when configure_model() has built the last MoE layer."
            )
        return self._sharder.mesh

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks as ``(expert_data_parallel, expert_parallel)``; also ``module.device_mesh``."""
        return self.expert_mesh.device_mesh

    # ------------------------------------------------------------------------ set-up of the model

    @override
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around ``configure_model``: MoE layers create only this rank's experts."""
        self._init_config_if_needed()
        if self._sharder is not None and self.lightning_module is not None:
            self.lightning_module._device_mesh = self.device_mesh

        # DeepSpeed's zero.Init stays out: it would partition experts over all ranks. Dense
        # parameters are partitioned when the engine is built.
        if self._sharder is not None:
            with expert_placement(self._sharder.placement):
                yield
            return
        module = self.lightning_module
        built = divided_experts(moe_layers(module) if module is not None else ()).values()
        auto = AutoPlacement(self.global_rank, self.world_size, self.num_processes, built)
        with expert_placement(auto):
            yield
        if auto.built:
            self._mesh_for(auto.num_experts)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        check_trainer(trainer, self.lightning_module)
        launched = [process.pid for process in getattr(self.launcher, "procs", ())]
        self._watch.start(
            self.global_rank,
            self.root_device,
            launched,
            is_launched(self.cluster_environment, self.local_rank),
        )
        unwrap_compiled(self.lightning_module)
        if trainer.training:
            check_directories(trainer)
            self._check_names(trainer)
            self._put_back_names(trainer)
            correct_summary(trainer, dict(moe_layers(self.lightning_module)))
        if self.async_checkpoint:
            check_links(trainer)
            self._forget_pending = count_pending_names(trainer, self._is_pending)
        self._init_config_if_needed()
        assert isinstance(self.config, dict)
        check_deepspeed_config(self.config)
        self._destroy_earlier_engine(self.lightning_module)
        self._setup_experts(self.lightning_module)
        check_can_be_saved(trainer, self.lightning_module, self._expert_state.layers)
        if self.zero_stage_3:
            check_same_structure(self._expert_state.layers)
        super().setup(trainer)
        if self.zero_stage_3:
            meet_before_gathering(self.deepspeed_engine, self._mesh_for({}).meet)
        self._watch.beat()
        vars(self.lightning_module)[_ENGINE] = self.model
        if self._compiled_steps is not None:
            self._compiled_steps.apply()

    @staticmethod
    def _destroy_earlier_engine(module: pl.LightningModule) -> None:
        """Frees the parameters of an engine that an earlier fit, by any strategy, put around them.

        Its gradient hooks would run beside the new engine's. Not done when a fit ends: the engine
        is still needed to save its checkpoint.
        """
        engine = vars(module).pop(_ENGINE, None)
        if engine is not None:
            engine.destroy()

    def _setup_experts(self, module: nn.Module) -> None:
        state = self._expert_state
        state.layers = dict(moe_layers(module))
        sharder = self._mesh_for(divided_experts(state.layers.items()))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = sharder.mesh.device_mesh
        sharder.shard(module)
        self._waits.begin(sharder, self._watch)
        if self.is_global_zero:
            warn_about_causality(module)
        tag_experts(state.layers.values(), sharder.mesh)
        check_tags(module, state.layers.values())
        for layer in state.layers.values():
            layer.balancing.scale = state.loss_scale
            layer.nonfinite.policy = "ignore" if self._nonfinite == "ignore" else "collect"

    @override
    def _auto_select_batch_size(self) -> int:
        # DeepSpeed wants it for its own throughput log. The base class builds the user's data
        # loader a second time to find out, and fails on loaders without a batch sampler.
        return 1

    @override
    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        assert self.lightning_module is not None
        optimizers, schedulers = _init_optimizers_and_lr_schedulers(self.lightning_module)
        check_single(optimizers, schedulers)
        release(optimizers[0])
        check_has_no_closure(optimizers[0])
        check_optimizer(optimizers[0])
        return optimizers[0], schedulers[0] if schedulers else None

    @override
    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[FastMoEEngine, Any]:
        assert isinstance(self.config, dict)
        assert optimizer is not None
        names = {id(p): name for name, p in model.named_parameters()}
        user = split_expert_groups(optimizer, names, group_name(self.expert_mesh))
        check_same_groups(user.twin, self._expert_state.layers)
        self._expert_state.user_groups = user
        for call in list(self.before_engine):
            call(model, user.twin)
        engine = make_engine(
            model=model,
            config=self.config,
            device_rank=self._device_rank,
            expert_state=self._expert_state,
            optimizer=user.twin,
            lr_scheduler=lr_scheduler,
        )
        user.attach(engine.optimizer)
        return engine, optimizer

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        assert isinstance(self.config, dict)
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
        if self.zero_stage_3:
            keys = ("fp16", "bf16", "zero_optimization", "zero_allow_untested_optimizer")
            config.update({key: self.config[key] for key in keys if key in self.config})
        else:
            # Without an optimizer DeepSpeed would build a mixed-precision optimizer all the same,
            # which knows no experts; all that is wanted of it is the cast.
            dtype = self.precision_plugin._desired_dtype  # type: ignore[attr-defined]
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        remove_module_hooks(model)
        self._expert_state.user_groups = None
        self.model = make_engine(
            model=model,
            config=config,
            device_rank=self._device_rank,
            expert_state=self._expert_state,
        )

    @property
    def _device_rank(self) -> int:
        index = self.root_device.index
        return self.local_rank if index is None else index

    @override
    def teardown(self) -> None:
        if self._compiled_steps is not None:
            self._compiled_steps.undo()
        for layer in self._expert_state.layers.values():
            layer.disconnect()
        try:
            if isinstance(self.model, FastMoEEngine):
                self.model.let_go()
            super().teardown()
        finally:
            self._waits.end(self._sharder)
            self._watch.stop()
        self._waits.raise_for_peer(self.lightning_module)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers "fastmoe" and its variants for ``Trainer(strategy=...)``."""
        register_names(strategy_registry, cls)
