"""What can't be done right is refused: on all ranks, naming the value, the rule and the fix."""

from __future__ import annotations

import math

import pytest
from strategy import refusal_runs as runs
from strategy.exactness import assert_same
from strategy.models import Case, reference

REFUSED = [
    # scene, world, error, what the message must name
    ("ep zero", 1, "ConfigError", ["expert_parallel_size=0", "at least 1"]),
    ("ep name", 1, "ConfigError", ["expert_parallel_size='x'", "'auto'"]),
    ("ep bool", 1, "ConfigError", ["expert_parallel_size=True"]),
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
    ("no optimizer", 2, "ParameterGroupError", ["is empty", "configure_optimizers()"]),
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
    ("too early", 2, "ParameterGroupError", ["not part of the model", "configure_optimizers()"]),
    ("damaged counts", 2, "ExchangeError", ["net.moes.1", "rank 1", "damaged"]),
    ("swapped counts", 2, "ExchangeError", ["net.moes.0", "rank 1", "damaged"]),
    ("two backwards", 2, "ConfigError", ["twice", "accumulate_grad_batches"]),
]


@pytest.mark.parametrize(("scene", "world", "error", "named"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused_on_all_ranks(rank_pool, scene, world, error, named):
    for name, message in rank_pool.run(runs.error_of, world, scene, timeout=60):
        assert name == error, message
        for part in named:
            assert part in message


def test_every_scene_is_tested():
    assert {scene for scene, *_ in REFUSED} == runs.SCENES.keys()


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
    for result in rank_pool.run(runs.by_name, 2, name):
        assert result == expected


@pytest.mark.parametrize("in_configure_model", [False, True])
def test_the_mesh_that_users_see(rank_pool, in_configure_model):
    case = Case(world=4, ep=2, steps=1, in_configure_model=in_configure_model)
    names = ("expert_data_parallel", "expert_parallel")
    for rank, result in enumerate(rank_pool.run(runs.meshes, 4, case)):
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
    for result in rank_pool.run(runs.auto, 4, case):
        assert result == (size, [n // size for n in num_experts])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_local_layer_keeps_its_experts_and_trains_alike(rank_pool, stage):
    case = Case(world=2, ep=2, stage=stage)
    expected = reference(case)
    for local, trace in rank_pool.run(runs.local_layer, 2, case):
        assert local == [2, 8]
        assert_same(trace, expected)
