"""Counts that the host reads are refused while a CUDA graph is recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops.products.torch import counts_on_host


@pytest.mark.parametrize("captures", [False, True])
def test_while_a_graph_is_recorded(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True, tolist=lambda: [2, 1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    assert counts_on_host(torch.tensor([3, 4])) == [3, 4]
    if not captures:
        assert counts_on_host(on_gpu) == [2, 1]
        return
    with pytest.raises(ConfigError, match=r"experts in bf16 .*cuda_graphs=False"):
        counts_on_host(on_gpu)
