"""Turns the FFNs of a dense model into mixtures of experts that start as the dense model.

Sparse upcycling (Komatsuzaki et al. 2022): every expert is a copy of the FFN, and only the router
is new. Copies can be cut into fine-grained experts with a virtual group initialisation (He et al.
2024), or added to the FFN, which stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.dense_ffn import DenseFFN, read_ffn
from lightning_fastmoe.nn import MoE, StackedExperts
from lightning_fastmoe.nn.conversion import convert
from lightning_fastmoe.nn.experts import expert_generator
from lightning_fastmoe.nn.placement import settle_placement

_NOT_HERE = {
    "activation",
    "bias",
    "d_ffn",
    "d_model",
    "expert",
    "router",
    "shared_expert",
    "shared_expert_gate",
}
"""Arguments of the layer that the FFN decides, or that must be as they are."""


def upcycle(
    model: nn.Module,
    num_experts: int,
    top_k: int = 2,
    *,
    match: Callable[[str, nn.Module], bool] | None = None,
    granularity: int = 1,
    keep_dense: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    **moe: Any,
) -> dict[str, MoE]:
    """Replaces FFNs of a dense model by :class:`~lightning_fastmoe.MoE` layers, in place.

    Without noise, and without a capacity that drops tokens, the model computes the same as before,
    up to rounding: the weights of a token's experts sum to one. Under FastMoEStrategy call it at
    the end of ``configure_model``: each rank copies only its own experts.

    FFNs with an activation that the layer has (SiLU, exact GELU, ReLU, gated or not) become stacked
    experts. Others, such as GPT-2's with its approximate GELU and its dropout, become experts that
    are copies of the module, which is slower.

    Args:
        model: a model of transformers, or any whose FFNs have the same parts.
        num_experts: copies of each FFN, E.
        top_k: copies that a token uses, K, at least 2 unless ``keep_dense``.
        match: called with the name of a module and the module: whether to replace it. None takes
            every module that is recognised as an FFN.
        granularity: pieces, G, into which each copy is cut. The layer then has E G experts with a
            G-th of the width, of which a token uses K G. At first the pieces of a copy have the
            same router weights, so they are chosen together.
        keep_dense: keep the FFN as a shared expert; the copies' last projections are zero at first.
        noise: standard deviation of what is added to each copy's weight matrices, as a fraction of
            that of the matrix. Copies that are equal learn differences only through the router.
        seed: of the noise; the same on any number of ranks.
        moe: further arguments of the layer, such as ``load_balancing``.

    Returns:
        Name -> new layer.

    Raises:
        ConfigError: if nothing is recognised, or an argument can't be honoured.
    """
    _check(num_experts, top_k, granularity, keep_dense, noise, moe)
    ffns: list[tuple[MoE, DenseFFN]] = []
    owners: dict[int, nn.Module] = {}

    def make(module: nn.Module) -> MoE:
        ffn = read_ffn(module)
        if ffn is None:
            raise ConfigError(
                f"upcycle: {type(module).__name__} matches, but isn't recognised as an FFN. Use"
                " lightning_fastmoe.nn.convert with a factory of your own."
            )
        for parameter in module.parameters():
            if owners.setdefault(id(parameter), module) is not module:
                raise ConfigError(
                    f"upcycle: two FFNs ({type(module).__name__}) share parameters, and their"
                    " copies would not. Choose FFNs with match=, or make them one module."
                )
        layer = _layer(module, ffn, num_experts, top_k, granularity, keep_dense, moe)
        ffns.append((layer, ffn))
        return layer

    found = convert(model, match or (lambda name, module: read_ffn(module) is not None), make)
    settle_placement()
    with torch.no_grad():
        for index, (layer, ffn) in enumerate(ffns):
            _fill(layer, ffn, granularity, keep_dense)
            if noise:
                _perturb(layer.experts, noise, seed, index)
    return {name: layer for name, layer in found.items() if isinstance(layer, MoE)}


def _check(
    num_experts: int,
    top_k: int,
    granularity: int,
    keep_dense: bool,
    noise: float,
    moe: Mapping[str, Any],
) -> None:
    if taken := sorted(_NOT_HERE & moe.keys()):
        raise ConfigError(f"upcycle doesn't take {', '.join(taken)}: the FFN decides.")
    if moe.get("normalize_weights") is False and not keep_dense:
        raise ConfigError(
            "upcycle: with normalize_weights=False the weights of a token's experts don't sum to"
            " one, so the model would not start as the dense one. Leave it out, or use"
            " keep_dense=True."
        )
    if not 1 <= top_k <= num_experts or (top_k == 1 and not keep_dense):
        raise ConfigError(
            f"upcycle: top_k={top_k} of {num_experts} copies. It must be at least 2 and at most"
            " num_experts: the weight of a single expert isn't one, so the model would not start"
            " as the dense one. With keep_dense=True it may be 1."
        )
    if granularity < 1 or noise < 0:
        raise ConfigError(
            f"upcycle: granularity={granularity}, noise={noise}: granularity must be at least 1,"
            " and noise not negative."
        )


def _layer(
    module: nn.Module,
    ffn: DenseFFN,
    num_experts: int,
    top_k: int,
    granularity: int,
    keep_dense: bool,
    moe: Mapping[str, Any],
) -> MoE:
    kind: dict[str, Any] = {"expert": lambda *_: copy.deepcopy(module)}
    if ffn.activation is not None:
        if ffn.d_ffn % granularity:
            raise ConfigError(
                f"upcycle: granularity={granularity} doesn't divide the FFN's width of {ffn.d_ffn}."
            )
        kind = {"activation": ffn.activation, "bias": ffn.up_bias is not None}
        if (ffn.up_bias is None) != (ffn.down_bias is None):
            raise ConfigError(
                f"upcycle: only one projection of {type(module).__name__} has a bias; the layer has"
                " both or none."
            )
    elif granularity > 1 or keep_dense:
        raise ConfigError(
            f"upcycle: {type(module).__name__} has an activation or a forward pass that the layer"
            " doesn't have, so its copies stay whole modules. granularity and keep_dense need to"
            " know their parts."
        )
    with torch.device(ffn.up.device):
        layer = MoE(
            ffn.d_model,
            ffn.d_ffn // granularity if ffn.activation is not None else None,
            num_experts * granularity,
            top_k * granularity,
            shared_expert=module if keep_dense else None,
            **kind,
            **moe,
        )
    layer.experts.requires_grad_(any(p.requires_grad for p in module.parameters()))
    return layer.to(ffn.up.dtype).train(module.training)


def _fill(layer: MoE, ffn: DenseFFN, granularity: int, keep_dense: bool) -> None:
    """Makes the experts on this rank copies of the FFN, or pieces of copies."""
    weight: Any = layer.router.weight
    weight.copy_(weight[::granularity].repeat_interleave(granularity, 0))
    experts = layer.experts
    if not isinstance(experts, StackedExperts):
        return
    width = experts.d_ffn
    # The pieces of a copy share its weight equally, so each counts G times.
    scale = 0.0 if keep_dense else float(granularity)
    gates = ffn.up.shape[0] // ffn.d_ffn  # 2 if it is gated
    for place, expert in enumerate(experts.local_ids):
        piece = expert % granularity
        rows = slice(piece * width, (piece + 1) * width)
        experts.up_proj[place] = _rows(ffn.up, gates, rows)
        experts.down_proj[place] = ffn.down[:, rows] * scale
        if experts.up_bias is not None:
            assert ffn.up_bias is not None
            assert ffn.down_bias is not None
            assert experts.down_bias is not None
            experts.up_bias[place] = _rows(ffn.up_bias, gates, rows)
            experts.down_bias[place] = ffn.down_bias * (0.0 if keep_dense else 1.0)


def _rows(up: Tensor, gates: int, rows: slice) -> Tensor:
    """A piece's rows of ``up``, of its gate first."""
    piece: Tensor = up.unflatten(0, (gates, -1))[:, rows].flatten(0, 1)
    return piece


def _perturb(experts: nn.Module, noise: float, seed: int, layer: int) -> None:
    """Adds noise to the weight matrices of the experts on this rank, drawn by global id."""
    if isinstance(experts, StackedExperts):
        matrices = [
            (expert, name, getattr(experts, name)[place])
            for place, expert in enumerate(experts.local_ids)
            for name in ("up_proj", "down_proj")
        ]
    else:
        matrices = [
            (int(expert), name, parameter)
            for expert, module in experts.named_children()
            for name, parameter in module.named_parameters()
            if parameter.dim() > 1
        ]
    for expert, name, matrix in matrices:
        generator = expert_generator(seed, f"{layer}.{name}", expert)
        drawn = torch.randn(matrix.shape, generator=generator)
        matrix.add_((drawn * (noise * float(matrix.std()))).to(matrix))
