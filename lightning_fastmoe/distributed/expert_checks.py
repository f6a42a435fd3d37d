"""Refuses experts that would train wrongly or hang when they are sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import ExpertLayer


def check_batch_norms(layers: Mapping[str, ExpertLayer]) -> None:
    """Refuses experts with modules that synchronise all ranks, such as SyncBatchNorm.

    Raises:
        ConfigError: naming the layer and the module.
    """
    for name, layer in layers.items():
        for path, module in layer.experts.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise ConfigError(
                    f"{name}.experts.{path} is a SyncBatchNorm, which waits for every rank, but"
                    " ranks hold different experts and an expert may get no tokens: training would"
                    " hang or mix the statistics of different experts. Convert only modules outside"
                    " of MoE layers, and use LayerNorm or RMSNorm in experts."
                )


def check_not_tied(layers: Mapping[str, ExpertLayer]) -> None:
    """Refuses layers that share expert parameters: each layer keeps its own rows of them.

    Raises:
        ConfigError: naming two layers.
    """
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in layer.experts.parameters():
            other = owners.setdefault(id(parameter), name)
            if other != name and not name.startswith(f"{other}."):  # a layer in an expert
                raise ConfigError(
                    f"Layers {other!r} and {name!r} share parameters of their experts, which can't"
                    " be sharded. Use one layer in both places, or expert_parallel_size=1."
                )


def divided_experts(layers: Iterable[tuple[str, ExpertLayer]]) -> dict[str, int]:
    """Name -> ``num_experts`` of the layers whose experts are divided over ranks."""
    return {n: m.num_experts for n, m in layers if m.dispatcher_name != "local"}
