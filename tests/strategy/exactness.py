"""How runs are compared with one plain process, and over which topologies."""

from __future__ import annotations

import torch
from strategy.models import Case, Trace

RELATIVE = 1e-6

TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def cases() -> list[Case]:
    found = []
    for world, ep in TOPOLOGIES:
        for stage in (1, 2, 3):
            for accumulate in (1, 2):
                found.append(
                    Case(
                        world=world,
                        ep=ep,
                        stage=stage,
                        accumulate=accumulate,
                        # Both ways of building the model are covered on every topology.
                        in_configure_model=(stage + accumulate) % 2 == 0,
                    )
                )
    return found


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Relative to the largest entry: 1e-6 of a tensor's scale, at any entry."""
    scale = expected.abs().max().clamp_min(1e-12)
    error = float((actual - expected).abs().max() / scale)
    assert error <= RELATIVE, f"{what}: relative error {error:.2e}"


def assert_same(actual: Trace, expected: Trace) -> None:
    for i, (a, e) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert abs(a - e) <= RELATIVE * abs(e), f"loss of step {i}: {a} != {e}"
    for i, (a, e) in enumerate(zip(actual.norms, expected.norms, strict=True)):
        assert abs(a - e) <= RELATIVE * abs(e), f"norm of step {i}: {a} != {e}"
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, f"gradient of {name}")
    assert len(actual.weights) == len(expected.weights)
    for i, (own, twin) in enumerate(zip(actual.weights, expected.weights, strict=True)):
        assert own.keys() == twin.keys()
        for name, weight in twin.items():
            assert_close(own[name], weight, f"{name} after step {i}")


def axes(case: Case) -> tuple[int | bool, ...]:
    """What cases differ in, of which every two values are to meet."""
    return case.world, case.ep, case.stage, case.accumulate, case.in_configure_model


def ident(case: Case) -> str:
    built = "configure_model" if case.in_configure_model else "init"
    return f"world{case.world}-ep{case.ep}-zero{case.stage}-acc{case.accumulate}-{built}"
