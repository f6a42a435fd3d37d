"""OffloadStrategy under Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from inference.compressed_models import ROUNDED, rounded
from inference.offload_models import KINDS, Scorer, loader, trainer
from pytorch_lightning.loggers import CSVLogger

from lightning_fastmoe import OffloadStrategy
from lightning_fastmoe.callbacks import CompressionErrorMonitor
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import compression_error
from lightning_fastmoe.planning.offload_sizes import OffloadSizes, parse_bytes


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


def test_compressed_experts() -> None:
    """The results of the rounded model, which is what stays; a second call gives the same."""
    module = Scorer({})
    module.configure_model()
    whole = trainer("auto", precision="bf16-true").predict(
        rounded(module.bfloat16(), "int8"), loader()
    )
    own = trainer(OffloadStrategy(compression="int8"), precision="bf16-true")
    for _ in range(2):
        with pytest.warns(UserWarning, match=ROUNDED):
            found = own.predict(module, loader())
        for a, b in zip(found, whole, strict=True):
            assert torch.equal(a, b)
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    with pytest.raises(ConfigError, match="compression='int3' is unknown: use int8 or int4"):
        OffloadStrategy(compression="int3")  # type: ignore[arg-type]


@pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")
def test_a_checkpoint_is_loaded_before_experts_are_compressed(tmp_path: Path) -> None:
    trained, module = Scorer({}), Scorer({})
    for one in (trained, module):
        one.configure_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    whole = trainer("auto")
    whole.predict(trained, loader())
    whole.save_checkpoint(tmp_path / "trained.ckpt", weights_only=True)
    right = trainer("auto").predict(rounded(trained, "int4"), loader())
    own = trainer(OffloadStrategy(compression="int4"))
    found = own.predict(module, loader(), ckpt_path=tmp_path / "trained.ckpt")
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batches", [1, None])
def test_errors_that_compression_would_make(
    batches: int | None, caplog: Any, tmp_path: Path
) -> None:
    module = Scorer({})
    (right,) = trainer("auto").validate(module, loader(), verbose=False)
    monitor = CompressionErrorMonitor("int4", batches)
    own = trainer(OffloadStrategy(), callbacks=[monitor])
    own.logger = CSVLogger(tmp_path, version=0)
    with caplog.at_level("INFO"):
        assert own.validate(module, loader(), verbose=False) == [right]
    assert module.network is not None
    wanted = compression_error(module.network, list(loader())[:batches], "int4")
    assert monitor.errors is not None
    for name, error in wanted.layers.items():
        assert monitor.errors.layers[f"network.{name}"] == pytest.approx(error, rel=1e-5)
    assert monitor.errors.text() in caplog.text
    own.logger.save()
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert f"compression_error/network.{name}" in logged
    assert str(monitor.errors.layers[f"network.{name}"]) in logged
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises(ConfigError, match=r"batches=0 is invalid"):
        CompressionErrorMonitor(batches=0)


@pytest.mark.filterwarnings(f"ignore:.*{ROUNDED}")
def test_errors_of_compressed_experts_are_refused() -> None:
    monitor = CompressionErrorMonitor()
    own = trainer(OffloadStrategy(compression="int8"), callbacks=[monitor])
    with pytest.raises(ConfigError, match="are compressed, and what they were is gone"):
        own.test(Scorer({}), loader(), verbose=False)


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
