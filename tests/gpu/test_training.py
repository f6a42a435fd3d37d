"""Training on GPUs against one plain process on the CPU, over NCCL, and gloo on a shared GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu.sharing import ranks_per_node, run
from strategy.models import Case, Trace, reference
from strategy.tracing import exchange_with_itself, run_case, run_case_in_parts

from lightning_fastmoe.testing import RankPool

PER_NODE = ranks_per_node(2)
BACKENDS = ["nccl"] if PER_NODE is None else ["nccl", "gloo"]


@pytest.fixture(scope="module")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_same(actual: Trace, expected: Trace, start: dict[str, torch.Tensor], tol: float) -> None:
    """Losses, norms, gradients, and how far each weight has moved, relative to ``tol``."""
    for i, (a, e) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert abs(a - e) <= tol * abs(e), f"loss of step {i}: {a} != {e}"
    for i, (a, e) in enumerate(zip(actual.norms, expected.norms, strict=True)):
        assert abs(a - e) <= tol * abs(e), f"norm of step {i}: {a} != {e}"
    for name, gradient in expected.gradients.items():
        error = relative(actual.gradients[name], gradient)
        assert error <= tol, f"gradient of {name}: {error:.2e}"
    for name, weight in expected.weights[-1].items():
        error = relative(actual.weights[-1][name], weight)
        assert error <= tol, f"{name} after the last step: {error:.2e}"
        moved = relative(weight, start[name]) if float(start[name].norm()) else 1.0
        assert moved > 3 * error, f"{name} moved {moved:.2e}, off by {error:.2e}"


def start_weights(case: Case) -> dict[str, torch.Tensor]:
    import pytorch_lightning as pl
    from strategy.models import build_net

    pl.seed_everything(7, verbose=False)
    return {n: p.detach() for n, p in build_net(case.num_experts, (0, 0)).named_parameters()}


def base(precision: str, stage: int, accumulate: int) -> Case:
    return Case(
        stage=stage,
        accumulate=accumulate,
        precision=precision,
        accelerator="cuda",
        in_configure_model=False,
        fused=True,
        extra={"overlap_comm": True},
    )


# bf16-mixed rounds weights, activations and gradients to 8 bits of mantissa: 2^-9 each, some tens
# of roundings in a row. A wrong scale by a factor of two would show as 0.5.
TOLERANCES = {"32-true": 2e-5, "bf16-mixed": 4e-2}
OTHERS = {"16-mixed": 1e-2, "bf16-true": 4e-2}


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_trains_as_the_reference_does(
    stage: int, accumulate: int, precision: str, rank_pool: RankPool
) -> None:
    case = base(precision, stage, accumulate)
    expected = reference(case)
    (trace,) = rank_pool.run(run_case, 1, case)
    assert_same(trace, expected, start_weights(case), TOLERANCES[precision])


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_train_as_the_reference_does(
    backend: str, stage: int, ep: int, precision: str, rank_pool: RankPool
) -> None:
    case = replace(base(precision, stage, 2), world=2, ep=ep, fused=ep == 2)
    if PER_NODE == 1:  # two nodes of one GPU each, as far as the ranks know
        case = replace(case, nodes=2, shared_gpu=backend == "gloo")
    expected = reference(case)
    for trace in run(rank_pool, run_case, 2, case):
        assert_same(trace, expected, start_weights(case), TOLERANCES[precision])


@pytest.mark.parametrize("precision", list(OTHERS))
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_precisions_train_as_the_reference_does(
    stage: int, precision: str, rank_pool: RankPool
) -> None:
    """With fp16 the attached terms must follow the loss scale (2^8: nothing overflows)."""
    case = base(precision, stage, 2)
    # Terms as large as the loss itself: a wrong scale could not hide.
    case = replace(case, coefficients=(1.0, 0.3), extra={"initial_scale_power": 8})
    expected = reference(case)
    (trace,) = rank_pool.run(run_case, 1, case)
    assert_same(trace, expected, start_weights(case), OTHERS[precision])


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_trains_as_the_reference_does(stage: int, rank_pool: RankPool) -> None:
    extra = {"offload_optimizer": True, "offload_parameters": stage == 3}
    case = replace(base("32-true", stage, 2), extra=extra, fused=False)
    expected = reference(case)
    (trace,) = rank_pool.run(run_case, 1, case)
    assert_same(trace, expected, start_weights(case), TOLERANCES["32-true"])


def test_nccl_exchange_with_itself(rank_pool: RankPool) -> None:
    """The exchange over NCCL with the only rank there is, against the local dispatcher, bitwise."""
    (pairs,) = rank_pool.run(exchange_with_itself, 1)
    for name, (exchanged, local) in pairs.items():
        assert torch.equal(exchanged, local), name


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_gathered_in_several_parts(stage: int, rank_pool: RankPool) -> None:
    """Over NCCL, each part while the next is updated: the same bits as in one part."""
    case = replace(base("bf16-mixed", stage, 1), world=2, nodes=2 if PER_NODE == 1 else 1)
    whole = run(rank_pool, run_case, 2, case)
    for trace, wanted in zip(run(rank_pool, run_case_in_parts, 2, case), whole, strict=True):
        for name, weight in wanted.weights[-1].items():
            assert torch.equal(trace.weights[-1][name], weight), name
        assert trace.losses == wanted.losses
