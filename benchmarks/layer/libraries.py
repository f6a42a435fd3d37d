"""Peers from other libraries. Each is used as its own documentation or its own layer uses it."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from layer.configs import Config
from layer.peers import Layer, Peer, given_leaves, leaf, missing, routing_leaves
from layer.problem import Problem, activate
from layer.router import Routing, add_losses, route, score


def _gated_only(config: Config | None) -> str | None:
    if config is not None and config.activation != "swiglu":
        return f"offers SwiGLU, not {config.activation}"
    return None


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


class Transformers(Peer):
    """``Qwen3MoeExperts`` with ``experts_implementation="grouped_mm"``."""

    name = "transformers"
    title = "transformers grouped_mm"
    note = "Qwen3MoeExperts, experts_implementation='grouped_mm', weights in bf16 as its router's"
    package = "transformers"

    def unavailable(self, config: Config | None, device: torch.device) -> str | None:
        modeling = "transformers.models.qwen3_moe.modeling_qwen3_moe"
        return _gated_only(config) or missing(modeling)

    def build(self, problem: Problem) -> Layer:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        sizes = problem.config
        config = Qwen3MoeConfig(
            hidden_size=sizes.d_model,
            moe_intermediate_size=sizes.d_ffn,
            num_experts=sizes.num_experts,
            num_experts_per_tok=sizes.top_k,
            hidden_act="silu",
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj = nn.Parameter(problem.up)
        experts.down_proj = nn.Parameter(problem.down)
        x, weights = leaf(problem.x), leaf(problem.weights)
        leaves = {"x": x, "weights": weights}
        leaves |= {"up": experts.gate_up_proj, "down": experts.down_proj}

        def forward() -> Tensor:
            return experts(x, problem.expert_ids, weights.to(x.dtype))

        return Layer(forward, leaves)


class Liger(Peer):
    """Liger's fused MoE (Triton), autotuned per shape as it ships."""

    name = "liger"
    title = "Liger fused MoE"
    note = "LigerFusedMoEFunction; autotunes each new shape (LIGER_FUSED_MOE_AUTOTUNE=0: does not)"
    package = "liger-kernel"
    compiles = True

    def unavailable(self, config: Config | None, device: torch.device) -> str | None:
        modules = "liger_kernel.ops.fused_moe"
        return _gated_only(config) or _needs_cuda(device) or missing(modules)

    def build(self, problem: Problem) -> Layer:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        leaves = given_leaves(problem)
        ids = problem.expert_ids.to(torch.int32)

        def forward() -> Tensor:
            x, weights, up, down = (leaves[n] for n in ("x", "weights", "up", "down"))
            return LigerFusedMoEFunction.apply(x, up, down, ids, weights)

        return Layer(forward, leaves)


class SonicMoE(Peer):
    """SonicMoE without its own router, with QuACK's default tiles."""

    name = "sonicmoe"
    title = "SonicMoE"
    note = "its layer after the router: metadata, up and down projection; QuACK's default tiles"
    package = "sonic-moe"
    compiles = True

    def unavailable(self, config: Config | None, device: torch.device) -> str | None:
        return _gated_only(config) or _needs_cuda(device) or missing("sonicmoe")

    def start(self, device: torch.device) -> None:
        self.functional = importlib.import_module("sonicmoe.functional")
        self.swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
        use_default_tiles()

    def build(self, problem: Problem) -> Layer:
        leaves = given_leaves(problem) | {"up": leaf(_interleave(problem.up))}
        ids = problem.expert_ids.to(torch.int32)

        def forward() -> Tensor:
            x, weights, up, down = (leaves[n] for n in ("x", "weights", "up", "down"))
            return self.run_experts(problem.config, x, ids, weights, up, down)[0]

        return Layer(forward, leaves, {"up": _separate})

    def run_experts(
        self, config: Config, x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output (T, D) and tokens per expert (E,), for ids in int32 and interleaved ``up``."""
        functional = self.functional
        tokens, experts, top_k, pairs = len(x), config.num_experts, config.top_k, config.pairs

        def index(n: int) -> Tensor:
            return torch.empty(n, dtype=torch.int32, device=x.device)

        counts, ends = index(experts), index(experts + 1)
        gather, scatter, reverse = index(pairs), index(pairs), index(pairs)
        functional.TC_topk_router_metadata_triton(
            ids, experts, counts, ends, gather, scatter, reverse
        )
        indices = (gather, scatter, reverse, None, False, self.swiglu)
        a, h = functional._UpProjection.apply(
            x, up.permute(1, 2, 0), None, ends, pairs, top_k, *indices, False, False
        )
        w2 = down.permute(1, 2, 0)
        out = functional._DownProjection.apply(
            a, h, w2, None, weights, ends, tokens, top_k, *indices
        )
        return out, counts


class SonicMoERouter(SonicMoE):
    """SonicMoE behind the same router as this package's module."""

    name = "sonicmoe-router"
    title = "SonicMoE, router"
    note = (
        "as SonicMoE, behind a router of plain torch: product in fp32, softmax, top-k; both losses"
        " with SonicMoE's counts. Its own module multiplies in bf16, and has no z-loss"
    )
    with_router = True

    def build(self, problem: Problem) -> Layer:
        leaves = routing_leaves(problem) | {"up": leaf(_interleave(problem.up))}
        config = problem.config

        def forward() -> Tensor:
            x, router, up, down = (leaves[n] for n in ("x", "router", "up", "down"))
            found = self.route(x, router, config.top_k)
            ids = found.expert_ids.to(torch.int32)
            out, counts = self.run_experts(config, x, ids, found.weights, up, down)
            return add_losses(out, found, counts)

        return Layer(forward, leaves, {"up": _separate})

    def route(self, x: Tensor, router: Tensor, top_k: int) -> Routing:
        """``x (T, D)``, ``router (E, D)`` -> the routing."""
        return route(x, router, top_k)


class SonicMoETopK(SonicMoERouter):
    """The same with SonicMoE's own softmax and top-k, which are one kernel."""

    name = "sonicmoe-topk"
    title = "SonicMoE, router, its top-k"
    note = "as SonicMoE, router, but with SonicMoE's fused softmax and top-k on the fp32 logits"

    def route(self, x: Tensor, router: Tensor, top_k: int) -> Routing:
        """See :class:`SonicMoERouter`."""
        logits, scores = score(x, router)
        # A softmax over the K chosen logits, as in SonicMoE's own module, is the normalised one.
        # Of a single one it would always be 1.
        choose = self.functional.TC_Softmax_Topk_Router_Function.apply
        weights, expert_ids = choose(logits, router.shape[0], top_k, top_k > 1, False)
        return Routing(logits, scores, weights, expert_ids)


def use_default_tiles() -> None:
    """Lets SonicMoE use QuACK's default tiles, rather than try all of them at each new shape."""
    for name in ("sonicmoe.functional.forward", "sonicmoe.functional.backward"):
        module = importlib.import_module(name)
        for gemm in ("gemm", "gemm_gated", "gemm_dgated"):
            if hasattr(module, gemm):
                setattr(module, gemm, functools.partial(getattr(module, gemm), tuned=False))


def _interleave(up: Tensor) -> Tensor:
    """(E, 2F, D), gate rows first -> gate and up rows in turn."""
    experts, rows, width = up.shape
    halves = up.view(experts, 2, rows // 2, width)
    return halves.transpose(1, 2).reshape(experts, rows, width)


def _separate(up: Tensor) -> Tensor:
    """The inverse of :func:`_interleave`."""
    experts, rows, width = up.shape
    return up.view(experts, rows // 2, 2, width).transpose(1, 2).reshape(experts, rows, width)


class DeepSpeed(Peer):
    """DeepSpeed's ``MOELayer`` (expert parallel size 1) behind a gate that follows the routing."""

    name = "deepspeed"
    title = "DeepSpeed MoE"
    note = (
        "its MOELayer, drop_tokens=False; its TopKGate is replaced by one that takes the given"
        " expert ids and weights and finds places and capacity as topkgating does"
    )
    package = "deepspeed"

    def unavailable(self, config: Config | None, device: torch.device) -> str | None:
        return missing("deepspeed.moe.sharded_moe")

    def build(self, problem: Problem) -> Layer:
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer

        experts = problem.config.num_experts
        x, weights = leaf(problem.x), leaf(problem.weights)
        with torch.device("meta"):
            stack = Experts(_Ffn(problem.config), experts)
        parameters: dict[str, list[Tensor]] = {"up": [], "down": []}
        for expert, up, down in zip(
            stack.deepspeed_experts, problem.up.unbind(0), problem.down.unbind(0), strict=True
        ):
            expert.up.weight, expert.down.weight = nn.Parameter(up), nn.Parameter(down)
            parameters["up"].append(expert.up.weight)
            parameters["down"].append(expert.down.weight)
        gate = _GivenGate(problem.expert_ids, weights, experts)
        layer = MOELayer(gate, stack, "ep_size_1", 1, experts)
        leaves: dict[str, Any] = {"x": x, "weights": weights, **parameters}
        return Layer(lambda: layer(x, None), leaves)


class _Ffn(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        rows = (2 if config.gated else 1) * config.d_ffn
        self.up = nn.Linear(config.d_model, rows, bias=False)
        self.down = nn.Linear(config.d_ffn, config.d_model, bias=False)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))


class _GivenGate(nn.Module):
    """Stands for DeepSpeed's ``TopKGate`` without dropped tokens, after its top-k."""

    def __init__(self, expert_ids: Tensor, weights: Tensor, num_experts: int) -> None:
        super().__init__()
        self.expert_ids, self.num_experts = expert_ids, num_experts
        self.given = (weights,)  # in a tuple: the leaf stays the problem's, not a parameter

    def forward(self, x: Tensor, *_: Any) -> tuple[Any, ...]:
        shape = (x.shape[0], self.num_experts)
        mask = torch.zeros(shape, dtype=torch.bool, device=x.device)
        mask.scatter_(1, self.expert_ids, True)
        counts = mask.sum(dim=0)
        places = (torch.cumsum(mask, dim=0) - 1).gather(1, self.expert_ids)
        columns = (self.expert_ids.T.int(), places.T.int(), self.given[0].T)
        routes = [column.contiguous() for column in columns]
        return None, counts.max(), self.num_experts, *routes, counts
