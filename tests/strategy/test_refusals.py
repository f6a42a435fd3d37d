"""What can't be done right is refused: on all ranks, naming the value, the rule and the fix."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import grad_norm
from strategy.exactness import assert_same
from strategy.models import D_MODEL, Case, Net, make_optimizer, reference
from strategy.tracing import make_trainer, run_case
from torch import Tensor, nn

from lightning_fastmoe import FastMoEStrategy, MoE
from lightning_fastmoe.distributed.dispatch import counts
from lightning_fastmoe.errors import FastMoEError

CASE = Case(world=2, ep=2, steps=2)


def error_of(name: str) -> tuple[str, str]:
    """The type and the message of the package's error that ``SCENES[name]`` raises."""
    try:
        SCENES[name]()
    except FastMoEError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def fit(module: Any = None, case: Case = CASE, **kwargs: Any) -> None:
    """Trains under FastMoEStrategy."""
    make_trainer(case, **kwargs).fit(Net(case) if module is None else module)


def fit_with(module: Any = None, **strategy: Any) -> None:
    """Trains under FastMoEStrategy with other arguments."""
    made = FastMoEStrategy(**{"expert_parallel_size": 2, **strategy})
    fit(module, strategy=made, gradient_clip_val=None)


class TwoOptimizers(Net):
    """One for the matrices, one for the rest; stepped by hand, or Lightning itself refuses them."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        groups = make_optimizer(self.net).param_groups
        return [torch.optim.SGD(group["params"], lr=0.1) for group in groups]


class Adagrad(Net):
    """DeepSpeed would replace it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.net.parameters(), lr=0.1)


class Adafactor(Net):
    """Scales its steps by norms of parameters; a scheduler begins at zero."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adafactor(self.net.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, float)]


class TwoSchedulers(Net):
    """Both for the same optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net)
        schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
        return [optimizer], schedulers


class Detached(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).detach()


class NoOptimizer(Net):
    """Forgot it."""

    def configure_optimizers(self) -> None:
        return None


class Normed(Net):
    """Experts whose batch norms would meet on all ranks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        experts = [
            nn.Sequential(nn.Linear(D_MODEL, D_MODEL), nn.SyncBatchNorm(D_MODEL)) for _ in range(4)
        ]
        self.net["moes"][0] = MoE(D_MODEL, D_MODEL, 4, expert=experts)


class OwnBackward(Net):
    """Means to scale the loss."""

    def backward(self, loss: Tensor) -> None:
        (2 * loss).backward()


class LogsNorms(Net):
    """Lightning's own example of logging gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, norm_type=2))


class ClosureOptimizer(Net):
    """Evaluates the loss several times in a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters())


def find_learning_rate() -> None:
    """As in Lightning's documentation."""
    Tuner(make_trainer(CASE)).lr_find(Net(CASE))


class Foreign(Net):
    """Has a parameter that claims to be an expert."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.net["other"] = nn.Linear(2, 2)
        self.net["other"].weight.allreduce = False  # type: ignore[assignment]


class InTwoGroups(Net):
    """Trains one matrix twice."""

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net)
        optimizer.param_groups[1]["params"].append(self.net["moes"][1].experts.up_proj)
        return optimizer


class Outside(Net):
    """Trains a parameter that belongs to nobody."""

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 5))]})
        return optimizer


class OfACopy(Net):
    """Its optimizer has a copy of the model."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.optimizer = make_optimizer(copy.deepcopy(self.net))

    def configure_optimizers(self) -> Any:
        return self.optimizer


class Kept(Net):
    """Gives one optimizer to each fit."""

    def configure_optimizers(self) -> Any:
        vars(self).setdefault("kept", make_optimizer(self.net))
        return self.kept


def kept_optimizer() -> None:
    """A second fit, which in plain Lightning would go on with Adam's moments."""
    module = Kept(CASE)
    fit(module)
    fit(module)


class Warmed(Net):
    """Its optimizer has taken a step before."""

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.net)
        for p in self.net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return optimizer


class TwoBackwards(Net):
    """Manual optimization that accumulates by itself."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for _ in range(2):
            self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.net)


def _lightning_class(base: type, module: str) -> type:
    """A subclass of a class that says it comes from the ``lightning`` package."""
    theirs = type("Theirs", (base,), {"__module__": module})
    return type("Mine", (theirs,), {"__module__": __name__})


def foreign_callback() -> None:
    """A callback of lightning.pytorch."""
    callback = _lightning_class(pl.Callback, "lightning.pytorch.callbacks.callback")
    fit(callbacks=[callback()])


def foreign_plugin() -> None:
    """A plugin of lightning.fabric, given to the strategy."""
    plugin = _lightning_class(Precision, "lightning.fabric.plugins.precision.precision")
    FastMoEStrategy(2, precision_plugin=plugin())


def damaged_counts() -> None:
    """Rank 1 sends token counts whose checksum is wrong, in the second step."""
    original = counts.pack_counts

    def damaged(*args: Any) -> Tensor:
        vector = original(*args)
        if os.environ["RANK"] == "1" and args[2] > 2 and args[4] == "net.moes.1":
            vector[-1] += 1
        return vector

    _with_counts(damaged)


def swapped_counts() -> None:
    """Rank 1 sends two counts in each other's place: their sum is right."""
    original = counts.pack_counts

    def swapped(*args: Any) -> Tensor:
        vector = original(*args)
        body = vector[-args[1] :]
        if os.environ["RANK"] == "1":
            high, low = int(body.argmax()), int(body.argmin())
            assert body[high] != body[low]
            body[[high, low]] = body[[low, high]]
        return vector

    _with_counts(swapped)


def _with_counts(pack: Callable[..., Tensor]) -> None:
    original = counts.pack_counts
    counts.pack_counts = pack
    try:
        fit()
    finally:
        counts.pack_counts = original


def sharded_then_ddp() -> None:
    """A module that was trained with sharded experts goes on under plain DDP."""
    module = Net(CASE)
    fit(module)
    make_trainer(CASE, strategy="ddp", max_steps=4, gradient_clip_val=None).fit(module)


def sharded_then_forward() -> None:
    """The same module is called with no trainer around."""
    module = Net(CASE)
    fit(module)
    module.net["moes"][0](torch.zeros(3, 12))


def sharded_otherwise() -> None:
    """The same module in a run with other groups."""
    module = Net(CASE)
    fit(module)
    fit(module, strategy=FastMoEStrategy(1), max_steps=4)


SCENES: dict[str, Callable[[], Any]] = {
    "ep zero": lambda: FastMoEStrategy(0),
    "ep name": lambda: FastMoEStrategy("x"),
    "ep bool": lambda: FastMoEStrategy(True),
    "no tokens": lambda: FastMoEStrategy(tokens_per_rank=0),
    "nonfinite": lambda: FastMoEStrategy(nonfinite="panic"),
    "stage 0": lambda: FastMoEStrategy(stage=0),
    "stage 0 in config": lambda: FastMoEStrategy(config={"zero_optimization": {"stage": 0}}),
    "no stage in config": lambda: FastMoEStrategy(config={"bf16": {"enabled": True}}),
    "reduce_scatter": lambda: fit_with(reduce_scatter=False),
    "contiguous_gradients": lambda: fit_with(contiguous_gradients=False),
    "quantized": lambda: fit_with(
        config={"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
    ),
    "optimizer in config": lambda: fit_with(
        config={"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {}}}
    ),
    "ep does not divide world": lambda: fit(case=Case(world=4, ep=3)),
    "ep does not divide experts": lambda: fit(case=Case(world=4, ep=4, num_experts=(6, 8))),
    "ep does not divide experts, in configure_model": lambda: fit(
        case=Case(world=4, ep=4, num_experts=(8, 6), in_configure_model=True)
    ),
    "two optimizers": lambda: fit(TwoOptimizers(CASE), gradient_clip_val=None),
    "adagrad": lambda: fit(Adagrad(CASE)),
    "adafactor": lambda: fit(Adafactor(CASE)),
    "two schedulers": lambda: fit(TwoSchedulers(CASE)),
    "no optimizer": lambda: fit(NoOptimizer(CASE)),
    "detached": lambda: fit(Detached(CASE)),
    "clip by value": lambda: fit(gradient_clip_algorithm="value"),
    "sync_batchnorm": lambda: fit(sync_batchnorm=True),
    "sync_batchnorm in an expert": lambda: fit(Normed(CASE)),
    "checkpoint plugin": lambda: fit(plugins=[AsyncCheckpointIO()]),
    "own backward": lambda: fit(OwnBackward(CASE)),
    "grad_norm": lambda: fit(LogsNorms(CASE)),
    "lbfgs": lambda: fit(ClosureOptimizer(CASE)),
    "lr_find": find_learning_rate,
    "accumulation scheduler": lambda: fit(
        callbacks=[callbacks.GradientAccumulationScheduler({0: 2})], accumulate_grad_batches=1
    ),
    "lr finder": lambda: fit(callbacks=[callbacks.LearningRateFinder()]),
    "batch size finder": lambda: fit(callbacks=[callbacks.BatchSizeFinder()]),
    "finetuning": lambda: fit(callbacks=[callbacks.BackboneFinetuning()]),
    "pruning": lambda: fit(callbacks=[callbacks.ModelPruning("l1_unstructured")]),
    "swa": lambda: fit(callbacks=[callbacks.StochasticWeightAveraging(0.1)]),
    "fp16 on the CPU": lambda: fit(precision="16-mixed"),
    "callback": foreign_callback,
    "plugin": foreign_plugin,
    "ddp": sharded_then_ddp,
    "forward": sharded_then_forward,
    "other groups": sharded_otherwise,
    "all_to_all": lambda: MoE(4, 4, 2, dispatcher="all_to_all")(torch.zeros(1, 4)),
    "foreign expert": lambda: fit(Foreign(CASE)),
    "two groups": lambda: fit(InTwoGroups(CASE)),
    "outside": lambda: fit(Outside(CASE)),
    "kept optimizer": kept_optimizer,
    "warmed optimizer": lambda: fit(Warmed(CASE)),
    "of a copy": lambda: fit(OfACopy(CASE)),
    "damaged counts": damaged_counts,
    "swapped counts": swapped_counts,
    "two backwards": lambda: fit(TwoBackwards(CASE), gradient_clip_val=None),
}


# ----------------------------------------------------------------------------- what is not refused


def by_name(name: str) -> dict[str, Any]:
    """What ``Trainer(strategy=name)`` gives."""
    strategy = make_trainer(CASE, strategy=name).strategy
    zero = strategy.config["zero_optimization"]
    return {
        "type": type(strategy).__name__,
        "stage": zero["stage"],
        "optimizer": zero.get("offload_optimizer", {}).get("device"),
        "parameters": zero.get("offload_param", {}).get("device"),
    }


class Meshes(Net):
    """Notes the mesh that a user sees in configure_model."""

    seen: Any = None

    def configure_model(self) -> None:
        if self.case.ep != 0:
            self.seen = self.device_mesh.mesh_dim_names, tuple(self.device_mesh.shape)
        super().configure_model()


def meshes(case: Case) -> dict[str, Any]:
    """The mesh as a user sees it in each place."""
    module = Meshes(case)
    trainer = make_trainer(case)
    trainer.fit(module)
    mesh = trainer.strategy.device_mesh
    assert mesh is module.device_mesh
    return {
        "in configure_model": module.seen,
        "names": mesh.mesh_dim_names,
        "ranks": mesh.mesh.tolist(),
        "local": [layer.num_local_experts for layer in module.net["moes"]],
        "first": [layer.experts.local_ids[0] for layer in module.net["moes"]],
    }


def auto(case: Case) -> tuple[int, list[int]]:
    """(expert parallel size, local experts of each layer) with "auto"."""
    module = Net(case)
    trainer = make_trainer(case, strategy=FastMoEStrategy("auto"))
    trainer.fit(module)
    size = trainer.strategy.expert_mesh.ep_size
    return size, [layer.num_local_experts for layer in module.net["moes"]]


class LocalNet(Net):
    """The second layer keeps all its experts on every rank."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if self.net is not None:
            self.net["moes"][1].dispatcher_name = "local"


def local_layer(case: Case) -> Any:
    """(local experts of each layer, the trace)."""
    from strategy import tracing

    kept: list[Net] = []

    class Kept(LocalNet):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            kept.append(self)

    original = tracing.Net
    tracing.Net = Kept  # type: ignore[misc]
    try:
        trace = run_case(case)
    finally:
        tracing.Net = original  # type: ignore[misc]
    return [layer.num_local_experts for layer in kept[0].net["moes"]], trace


REFUSED = [
    # scene, world, error, what the message must name
    ("ep zero", 1, "ConfigError", ["expert_parallel_size=0", "at least 1"]),
    ("ep name", 1, "ConfigError", ["expert_parallel_size='x'", "'auto'"]),
    ("ep bool", 1, "ConfigError", ["expert_parallel_size=True"]),
    ("no tokens", 1, "ConfigError", ["tokens_per_rank=0", "at least 1"]),
    ("nonfinite", 1, "ConfigError", ["'panic'", "raise, skip, ignore"]),
    ("stage 0", 1, "ConfigError", ["stage=0", "1, 2 or 3"]),
    ("stage 0 in config", 1, "ConfigError", ["stage=0", "1, 2 or 3"]),
    ("no stage in config", 1, "ConfigError", ["sets no ZeRO stage", "FastMoEStrategy(stage=2)"]),
    ("reduce_scatter", 2, "ConfigError", ["reduce_scatter=False", "Drop the option"]),
    ("contiguous_gradients", 2, "ConfigError", ["contiguous_gradients=False"]),
    ("quantized", 2, "ConfigError", ["zero_quantized_gradients=True"]),
    ("optimizer in config", 2, "ConfigError", ["'optimizer'", "configure_optimizers()"]),
    ("ep does not divide world", 4, "TopologyError", ["=3", "4 rank(s)", "[1, 2, 4]"]),
    ("ep does not divide experts", 4, "TopologyError", ["=4", "=6", "net.moes.0", "[1, 2]"]),
    (
        "ep does not divide experts, in configure_model",
        4,
        "TopologyError",
        ["expert_parallel_size=4", "num_experts=6"],
    ),
    ("two optimizers", 2, "ConfigError", ["2 optimizer(s)", "one optimizer"]),
    ("two schedulers", 2, "ConfigError", ["2 scheduler(s)", "SequentialLR"]),
    ("adagrad", 2, "ConfigError", ["Adagrad", "one group", "RMSprop"]),
    ("adafactor", 2, "ConfigError", ["Adafactor", "depends on whole parameters", "AdamW"]),
    ("no optimizer", 2, "ParameterGroupError", ["configure_optimizers() returned None"]),
    ("detached", 2, "ConfigError", ["loss doesn't depend on anything that is trained"]),
    ("clip by value", 2, "ConfigError", ["'value'", "gradient_clip_algorithm='norm'"]),
    ("sync_batchnorm", 2, "ConfigError", ["sync_batchnorm=True", "convert_sync_batchnorm"]),
    (
        "sync_batchnorm in an expert",
        2,
        "ConfigError",
        ["net.moes.0.experts.", ".1 is a SyncBatchNorm", "LayerNorm"],
    ),
    ("checkpoint plugin", 2, "ConfigError", ["AsyncCheckpointIO", "async_checkpoint=True"]),
    ("own backward", 2, "ConfigError", ["OwnBackward", "on_before_backward"]),
    ("grad_norm", 2, "ConfigError", ["LogsNorms", "get_global_grad_norm()"]),
    ("lbfgs", 2, "ConfigError", ["LBFGS", "AdamW"]),
    ("lr_find", 2, "ConfigError", ["LearningRateFinder", "another strategy"]),
    ("accumulation scheduler", 2, "ConfigError", ["on_train_epoch_start"]),
    ("lr finder", 2, "ConfigError", ["LearningRateFinder", "another strategy"]),
    ("batch size finder", 2, "ConfigError", ["BatchSizeFinder", "by hand"]),
    ("finetuning", 2, "ConfigError", ["BackboneFinetuning", "requires_grad"]),
    ("pruning", 2, "ConfigError", ["ModelPruning", "exported"]),
    ("swa", 2, "ConfigError", ["StochasticWeightAveraging", "Average checkpoints"]),
    ("fp16 on the CPU", 2, "ConfigError", ["'16-mixed'", "'bf16-mixed'"]),
    ("callback", 2, "ForeignObjectError", ["Mine", "lightning.pytorch.callbacks.callback"]),
    ("plugin", 1, "ForeignObjectError", ["Mine", "lightning.fabric", "pytorch_lightning"]),
    ("ddp", 2, "UnmanagedExpertsError", ["2 of 4 experts", "FastMoEStrategy"]),
    ("forward", 2, "UnmanagedExpertsError", ["net.moes.0", "2 of 4 experts"]),
    ("other groups", 2, "TopologyError", ["2 of its 4", "expert_parallel_size=1"]),
    ("all_to_all", 1, "UnmanagedExpertsError", ["dispatcher='all_to_all'", "'auto'"]),
    ("foreign expert", 2, "ParameterGroupError", ["'net.other.weight'", "allreduce=False"]),
    ("two groups", 2, "ParameterGroupError", ["net.moes.1.experts.up_proj", "two groups"]),
    ("outside", 2, "ParameterGroupError", ["(3, 5)", "configure_optimizers()"]),
    ("of a copy", 2, "ParameterGroupError", ["not part of the model", "configure_optimizers()"]),
    ("kept optimizer", 2, "ConfigError", ["already has state", "ckpt_path", "state.clear()"]),
    ("warmed optimizer", 2, "ConfigError", ["already has state", "Create a new optimizer"]),
    ("damaged counts", 2, "ExchangeError", ["net.moes.1", "rank 1", "damaged"]),
    ("swapped counts", 2, "ExchangeError", ["net.moes.0", "rank 1", "damaged"]),
    ("two backwards", 2, "ConfigError", ["twice", "accumulate_grad_batches"]),
]


@pytest.mark.parametrize(("scene", "world", "error", "named"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused_on_all_ranks(rank_pool, scene, world, error, named):
    for name, message in rank_pool.run(error_of, world, scene, timeout=60):
        assert name == error, message
        for part in named:
            assert part in message


def test_every_scene_is_tested():
    assert {scene for scene, *_ in REFUSED} == SCENES.keys()


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "parameters"),
    [
        ("fastmoe", 2, None, None),
        ("fastmoe_stage_1", 1, None, None),
        ("fastmoe_stage_2", 2, None, None),
        ("fastmoe_stage_3", 3, None, None),
        ("fastmoe_stage_2_offload", 2, "cpu", None),
        ("fastmoe_stage_3_offload", 3, "cpu", "cpu"),
    ],
)
def test_strategies_by_name(rank_pool, name, stage, optimizer, parameters):
    expected = {
        "type": "FastMoEStrategy",
        "stage": stage,
        "optimizer": optimizer,
        "parameters": parameters,
    }
    for result in rank_pool.run(by_name, 2, name):
        assert result == expected


@pytest.mark.parametrize("in_configure_model", [False, True])
def test_the_mesh_that_users_see(rank_pool, in_configure_model):
    case = Case(world=4, ep=2, steps=1, in_configure_model=in_configure_model)
    names = ("expert_data_parallel", "expert_parallel")
    for rank, result in enumerate(rank_pool.run(meshes, 4, case)):
        assert result["in configure_model"] == (names, (2, 2))
        assert result["names"] == names
        assert result["ranks"] == [[0, 1], [2, 3]]
        assert result["local"] == [2, 4]
        assert result["first"] == [rank % 2 * 2, rank % 2 * 4]


@pytest.mark.parametrize("in_configure_model", [False, True])
@pytest.mark.parametrize("num_experts", [(4, 8), (6, 6), (3, 5)])
def test_auto_is_the_largest_size_that_divides_all(rank_pool, num_experts, in_configure_model):
    case = Case(world=4, steps=1, num_experts=num_experts, in_configure_model=in_configure_model)
    size = math.gcd(4, *num_experts)
    for result in rank_pool.run(auto, 4, case):
        assert result == (size, [n // size for n in num_experts])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_local_layer_keeps_its_experts_and_trains_alike(rank_pool, stage):
    case = Case(world=2, ep=2, stage=stage)
    expected = reference(case)
    for local, trace in rank_pool.run(local_layer, 2, case):
        assert local == [2, 8]
        assert_same(trace, expected)
