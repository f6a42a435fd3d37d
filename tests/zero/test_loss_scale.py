"""A checkpoint's loss scale is for a scaler that would have found it itself."""

from __future__ import annotations

from types import SimpleNamespace

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from lightning_fastmoe.zero.state import ZeroState


def loaded(scaler, saved: dict[str, float]) -> dict[str, float]:
    state = ZeroState.__new__(ZeroState)
    state.zero = SimpleNamespace(loss_scaler=scaler)
    state.load_scaler(saved)
    return state.scaler()


def test_a_constant_scale_is_the_runs_own():
    """That of fp32 and bf16 is 1; in a checkpoint it looks like one that was given for fp16."""
    for own, saved in ((8192.0, 1.0), (1.0, 1024.0)):
        assert loaded(LossScaler(own), {"cur_scale": saved}) == {"cur_scale": own}


def test_a_dynamic_scale_goes_on():
    saved = loaded(DynamicLossScaler(64.0, 2.0, 500, 1.0, 2, False, True), {})
    saved = {name: value + 3 for name, value in saved.items()}
    assert loaded(DynamicLossScaler(2.0, 2.0, 500, 1.0, 2, False, True), saved) == saved
