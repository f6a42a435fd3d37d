"""``checkpoint verify`` says of what runs save what loading says, on every stage and topology."""

from __future__ import annotations

import shutil

import pytest
import pytorch_lightning as pl
from checkpoint.format.forgeries import DAMAGES, damage
from checkpoint.samples import read_manifest, write_manifest_again, write_state
from strategy.midway_runs import ACCUMULATE, EPOCHS, ModuleCase, Watch, WithDropout
from strategy.models import Case
from strategy.tracing import make_trainer

from lightning_fastmoe.checkpoint.tools.verify import Audit
from lightning_fastmoe.cli import main


def save_midway(case: Case, path: str) -> None:
    """Saves with half of a step's batches done."""
    pl.seed_everything(7, verbose=False)
    trainer = make_trainer(case, max_epochs=1, max_steps=-1, callbacks=[Watch({2: path})])
    trainer.fit(WithDropout(case, 0.0))


def verdicts_on(case: Case, paths: list[str]) -> list[str | None]:
    """What resuming from each fails with; None if it trains on."""
    result: list[str | None] = []
    for path in paths:
        module = WithDropout(case, 0.0)
        trainer = make_trainer(case, max_epochs=EPOCHS, max_steps=1)
        try:
            trainer.fit(module, ckpt_path=path)
        except Exception as error:
            result.append(f"{type(error).__name__}: {error}")
        else:
            assert module.batch_losses
            result.append(None)
    return result


def case_of(ep, stage, kind=Case, **extra) -> Case:
    return kind(2, ep, stage, ACCUMULATE, extra=extra)


GOOD = {
    "stage 1": case_of(1, 1),
    "stage 1, EP 2": case_of(2, 1),
    "stage 2": case_of(1, 2),
    "stage 2, EP 2, in background": case_of(2, 2, async_checkpoint=True),
    "stage 3, EP 2": case_of(2, 3),
    "modules, stage 1, EP 2": case_of(2, 1, ModuleCase),
    "modules, stage 3": case_of(1, 3, ModuleCase),
}


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD.keys())
def test_both_accept_half_a_step(rank_pool, tmp_path, capsys, case):
    path = tmp_path / "a.ckpt"
    rank_pool.run(save_midway, 2, case, str(path))
    assert main(["checkpoint", "verify", str(path)]) == 0, capsys.readouterr().out
    assert any(name.startswith("gradients/") for name in read_manifest(path)["tensors"])
    assert rank_pool.run(verdicts_on, 2, case, [str(path)]) == [[None]] * 2


def experts_of_another_number(content) -> None:
    content["moe_layers"]["net.moes.0"] += 1


def experts_that_are_missing(content) -> None:
    del content["tensors"]["weights/net.moes.0.experts.up_proj"]["pieces"][-1]


def replicas_that_do_not_fit(content) -> None:
    gradient = content["tensors"]["gradients/local/net.head.bias"]
    gradient["shape"] = [gradient["shape"][0] * 3, *gradient["shape"][1:]]


FORGED = (experts_of_another_number, experts_that_are_missing, replicas_that_do_not_fit)


def test_both_refuse_what_is_damaged(rank_pool, tmp_path):
    good, case = tmp_path / "good.ckpt", GOOD["stage 1, EP 2"]
    rank_pool.run(save_midway, 2, case, str(good))
    paths = []
    for i, name in enumerate(["weights_00001.safetensors", "state.json", "manifest.json"]):
        for how in (DAMAGES[i], DAMAGES[i + 3]):
            paths.append(tmp_path / f"{name} {how}")
            shutil.copytree(good, paths[-1])
            damage(paths[-1], name, how)
    for change in FORGED:
        paths.append(tmp_path / change.__name__)
        shutil.copytree(good, paths[-1])
        content = read_manifest(good)
        change(content)
        write_manifest_again(paths[-1], content)
    paths.append(tmp_path / "no engine")
    shutil.copytree(good, paths[-1])
    write_state(paths[-1], engine=None)
    verdicts = rank_pool.run(verdicts_on, 2, case, [str(path) for path in [*paths, good]])
    for of_rank in verdicts:
        for path, verdict in zip(paths, of_rank, strict=False):
            assert list(Audit(path).damages()), path.name
            assert verdict is not None, path.name
            assert verdict.startswith("CheckpointError"), verdict
        assert of_rank[-1] is None
