"""ZeRO 1 and 2's step in fewer passes equals DeepSpeed's, with skipped steps and clipping."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from pairwise import covering
from strategy.exactness import assert_same
from strategy.models import Case, Net, Trace, make_optimizer
from strategy.tracing import Tracer, make_trainer

from lightning_fastmoe.zero import engine, weight_gather

BAD_STEP, LOSS_SCALE = 1, 8.0
LARGE, SMALL = 100_000, 100
"""Bucket sizes: for all gradients together, and smaller than most of them."""
STEP = ("step", "flatten_dense_tensors_aligned")
"""The functions of DeepSpeed that join gradients in a step."""


class Spoiled(Net):
    """In one step, the last rank has a gradient of Inf or NaN in one element of one dense weight.

    The loss is scaled, as it is in fp16.
    """

    def __init__(self, case: Case, value: float | None) -> None:
        super().__init__(case)
        self.value, self.joins = value, 0

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.net, self.case.fused)

    def on_fit_start(self) -> None:
        zero = self.trainer.strategy.deepspeed_engine.optimizer
        zero.override_loss_scale(LOSS_SCALE)
        flatten = zero.flatten

        def counted(tensors: Any) -> torch.Tensor:
            self.joins += sys._getframe(1).f_code.co_name in STEP  # buckets are flattened too
            return flatten(tensors)

        zero.flatten = counted
        if self.value is not None and self.global_rank == self.case.world - 1:
            self.net["head"].weight.register_hook(self._spoil)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.trainer.global_step != BAD_STEP:
            return gradient
        gradient = gradient.clone()
        gradient[0, 0] = self.value
        return gradient


class Skipped(pl.Callback):
    """Notes how many steps the engine has skipped, after each batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.counts.append(trainer.strategy.deepspeed_engine.skipped_steps)


def fit(case: Case, fewer: bool, value: float | None) -> tuple[Trace, list[int], Counter[str]]:
    """(what the run did, skipped steps after each batch, calls of DeepSpeed's own passes)."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(DeepSpeedZeroOptimizer, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(self, *args, **kwargs)

        return mock.patch.object(DeepSpeedZeroOptimizer, name, call)

    tracer, skipped = Tracer(), Skipped()
    pl.seed_everything(7, verbose=False)
    used = engine.use_fewer_passes if fewer else lambda *_: None
    with (
        mock.patch.object(engine, "use_fewer_passes", used),
        mock.patch.object(weight_gather, "PART", 40),  # several parts even here
        counted("has_overflow"),
        counted("get_grad_norm_direct"),
        counted("unscale_and_clip_grads"),
        counted("average_tensor"),
    ):
        module = Spoiled(case, value)
        make_trainer(case, callbacks=[tracer, skipped]).fit(module)
    calls["flatten"] = module.joins
    tracer.trace.losses = []
    # A skipped step's norm is Inf, which no tolerance compares.
    tracer.trace.norms = [n if math.isfinite(n) else -1.0 for n in tracer.trace.norms]
    return tracer.trace, skipped.counts, calls


@covering(
    "world,ep,stage,precision,accumulate,bucket,fused,value",
    [
        (*case, fused, value)
        for case in (
            (1, 1, 1, "bf16-mixed", 2, LARGE),
            (1, 1, 2, "32-true", 2, LARGE),
            (2, 1, 1, "bf16-mixed", 2, SMALL),
            (2, 1, 2, "32-true", 2, SMALL),
            (2, 2, 1, "32-true", 2, LARGE),
            (2, 2, 2, "bf16-mixed", 1, SMALL),
        )
        for fused in (False, True)
        for value in (None, float("inf"), math.nan)
    ],
)
def test_equal_to_deepspeeds_own_passes(
    rank_pool, world, ep, stage, precision, accumulate, bucket, fused, value
):
    extra = {"reduce_bucket_size": bucket}
    case = Case(
        world, ep, stage, accumulate, precision=precision, fused=fused, steps=4, extra=extra
    )
    own = rank_pool.run(fit, world, case, True, value)
    for (trace, skipped, calls), (expected, as_before, before) in zip(
        own, rank_pool.run(fit, world, case, False, value), strict=True
    ):
        assert max(expected.norms) > case.clip, "the case must really clip"
        assert skipped == as_before
        assert skipped[-1] == (value is not None)
        assert_same(trace, expected)
        passes = ("get_grad_norm_direct", "unscale_and_clip_grads", "flatten", "average_tensor")
        for name in passes:
            assert before[name] > 0, "the test sees the passes that it counts"
        left = set() if fused else {"unscale_and_clip_grads"}
        if precision == "32-true" and not fused:  # nothing to convert
            left.add("flatten")
        assert {name for name, count in calls.items() if count} == left
