"""OffloadStrategy under Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from inference.offload_models import KINDS, Scorer, loader, trainer

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.offload import OffloadSizes, parse_bytes


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", ["softmax", "shared", "modules"])
def test_predict_validate_and_test(kind: str, precision: Any) -> None:
    """The last batch is smaller; a second call starts anew."""
    module = Scorer(KINDS[kind])
    whole = trainer("auto", precision=precision).predict(module, loader())
    (right,) = trainer("auto", precision=precision).validate(module, loader(), verbose=False)
    own = trainer(OffloadStrategy(), precision=precision)
    for _ in range(2):
        found = own.predict(module, loader())
        assert len(found) == len(whole) == 3
        for a, b in zip(found, whole, strict=True):
            assert torch.equal(a, b)
    assert own.validate(module, loader(), verbose=False) == [right]
    assert own.test(module, loader(), verbose=False) == [right]
    assert own.strategy.offloaded is None
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_by_name() -> None:
    own = trainer("fastmoe_offload")
    assert isinstance(own.strategy, OffloadStrategy)
    (whole, *_) = trainer("auto").predict(Scorer({}), loader())
    assert torch.equal(own.predict(Scorer({}), loader())[0], whole)


def test_a_cache_of_single_experts() -> None:
    module = Scorer({"num_experts": 8})
    batches = torch.utils.data.DataLoader(torch.randn(3, 16), batch_size=1)  # type: ignore[arg-type, var-annotated]
    whole = trainer("auto").predict(module, batches)
    strategy = OffloadStrategy(slots=1, expert_cache="20KB")
    own = trainer(strategy)
    seen: list[Any] = []

    def look() -> None:  # before it is closed
        assert strategy.offloaded is not None
        seen.extend([strategy.offloaded.cache_bytes, strategy.offloaded.statistics])

    module.on_predict_end = look  # type: ignore[method-assign]
    for a, b in zip(own.predict(module, batches), whole, strict=True):
        assert torch.equal(a, b)
    assert 15_000 < seen[0] <= 20_000
    assert seen[1].expert_misses > 0


def test_groups_of_experts() -> None:
    module = Scorer({"num_experts": 8})
    whole = trainer("auto").predict(module, loader())
    own = trainer(OffloadStrategy(groups=4))
    for a, b in zip(own.predict(module, loader()), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert own.strategy.offloaded is None


def test_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"OffloadStrategy can't train"):
        trainer(OffloadStrategy(), max_steps=1).fit(Scorer({}), loader())


def test_configure_model_builds_on_the_cpu() -> None:
    """Not on the GPU, as other strategies do, where the experts would not fit."""
    strategy = OffloadStrategy(device="meta")
    module = Scorer({})
    with strategy.tensor_init_context():
        module.configure_model()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_the_device_is_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not GPU 0, which may be somebody else's; also that of a second Trainer."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    strategy = OffloadStrategy()
    options: Any = {"logger": False, "enable_checkpointing": False}
    for number in (2, 1):
        pl.Trainer(devices=[number], strategy=strategy, **options)
        assert strategy.root_device == torch.device("cuda", number)
    own = OffloadStrategy(device="cuda:3")
    pl.Trainer(devices=[1], strategy=own, **options)
    assert own.root_device == torch.device("cuda", 3)


def test_more_devices_than_one_are_not_used() -> None:
    own = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=OffloadStrategy(),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    with pytest.warns(UserWarning, match="uses one of the 2 devices: cpu"):
        own.predict(Scorer({}), loader())


def test_bytes() -> None:
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes(77) == 77
    for wrong in ("24G", "GB", "-1GB", "0"):
        with pytest.raises(ConfigError, match="is not a number of bytes"):
            parse_bytes(wrong)
    module = Scorer({})
    module.configure_model()
    sizes = OffloadSizes.of(module)
    layer = 4 * (2 * 8 + 8) * 16 * 4
    rest = sum(p.numel() * 4 for n, p in module.named_parameters() if ".experts." not in n)
    assert sizes.weights_on_gpu(2, 0) == rest + 2 * layer
    assert sizes.weights_on_gpu(2, 3) == rest + 4 * layer
    assert sizes.weights_on_gpu(2, 4) == rest + 4 * layer
    assert sizes.weights_on_gpu(9, 1) == rest + 4 * layer
