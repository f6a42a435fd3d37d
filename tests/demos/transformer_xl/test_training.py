"""Training with memory under FastMoEStrategy: the numbers of one process, and resuming midway."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demos.transformer_xl import training_runs as runs

RELATIVE = 1e-5


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= RELATIVE, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize(("world", "ep", "stage"), [(2, 2, 2), (2, 2, 3), (2, 1, 1), (1, 1, 2)])
def test_ranks_train_to_the_numbers_of_one_process(
    rank_pool, tmp_path: Path, world: int, ep: int, stage: int
) -> None:
    text = runs.write_text(tmp_path / "text")
    expected = runs.reference(text)
    found = rank_pool.run(runs.fit, world, text, world, ep, stage)
    assert len({round(loss, 4) for loss in expected.losses}) == runs.STEPS
    lengths = [s[0].shape[1] if s else 0 for s in expected.remembered]
    assert lengths == [0, 6, 9, 9, 9, 0, 6, 9], "within the first epoch and the second"
    losses = torch.tensor([run.losses for run in found], dtype=torch.float64).mean(dim=0)
    assert_close(losses, torch.tensor(expected.losses, dtype=torch.float64), "losses")
    for step, twin in enumerate(expected.remembered):
        own = [run.remembered[step] for run in found]
        for layer, states in enumerate(twin):
            assert_close(torch.cat([s[layer] for s in own]), states, f"memory of step {step}")
    for run in found:
        assert len(run.val_losses) == len(expected.val_losses) > 2
        assert_close(torch.tensor(run.val_losses), torch.tensor(expected.val_losses), "validation")
        for step, twin in enumerate(expected.weights):
            assert run.weights[step].keys() == twin.keys()
            for name, weight in twin.items():
                assert_close(run.weights[step][name], weight, f"{name} after step {step}")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_that_resumes_midway_has_its_memory_back(
    rank_pool, tmp_path: Path, precision: str
) -> None:
    text = runs.write_text(tmp_path / "text")
    results = rank_pool.run(runs.straight_and_resumed, 2, text, str(tmp_path), precision)
    for straight, resumed in results:
        assert len(straight.remembered[runs.SAVED][0][0]) == runs.MEM_LEN
        assert len(resumed.losses) == runs.STEPS - runs.SAVED
        assert resumed.losses == straight.losses[runs.SAVED :]
        for own, twin in zip(resumed.remembered, straight.remembered[runs.SAVED :], strict=True):
            assert len(own) == len(twin)
            assert all(map(torch.equal, own, twin))
        for name, weight in straight.weights[-1].items():
            assert torch.equal(resumed.weights[-1][name], weight), name


def test_on_another_number_of_ranks_the_memory_starts_empty(rank_pool, tmp_path: Path) -> None:
    """The step after loading is that of the loaded weights without a memory."""
    text, path = runs.write_text(tmp_path / "text"), str(tmp_path / "midway.ckpt")

    def resumed_loss(memory: list[torch.Tensor]) -> float:
        losses, _ = runs.step_loss(network, runs.halves(text)[0], runs.SAVED, memory)
        return losses.mean().item()

    straight = rank_pool.run(runs.fit_and_save, 2, text, path)
    network = runs.plain_network()
    network.load_state_dict(straight[0].weights[runs.SAVED - 1])
    (resumed,) = rank_pool.run(runs.fit_from, 1, text, path)
    assert len(resumed.losses) == runs.STEPS - runs.SAVED
    assert resumed.remembered[0] == []
    assert resumed.remembered[1][0].shape[1] == runs.SEQ_LEN
    assert resumed.losses[0] == pytest.approx(resumed_loss([]), rel=1e-6)
    both = zip(*(run.remembered[runs.SAVED] for run in straight), strict=True)
    with_memory = resumed_loss([torch.cat(states) for states in both])
    assert abs(with_memory - resumed.losses[0]) > 1e-4
