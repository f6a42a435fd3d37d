"""The same tokens, weights and routing for every peer, and the right answers in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layer.configs import Config, gated_activations
from layer.errors import BenchmarkError
from layer.routings import draw_expert_ids

LOAD_BALANCING = 0.01
Z_LOSS = 0.001
"""Coefficients of the losses of a whole layer with its router."""


@dataclass(frozen=True)
class Problem:
    """One layer with its batch. Nothing in it is zero, nothing requires gradients.

    The tokens are such that ``softmax(x @ router.T)`` chooses exactly ``expert_ids`` with
    ``weights``: a layer with a router of its own has the same work as one that is given both.

    Attributes:
        config: the sizes.
        routing: name of the routing.
        x: (T, D) tokens.
        router: (E, D) fp32.
        expert_ids: (T, K) int64.
        weights: (T, K) fp32, normalised over K for K > 1.
        up: (E, 2F, D) for gated experts (gate rows first), else (E, F, D).
        down: (E, D, F).
        grad: (T, D), the gradient of the layer's output.
    """

    config: Config
    routing: str
    x: Tensor
    router: Tensor
    expert_ids: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    grad: Tensor

    def load_ratio(self) -> float:
        """The fullest expert's pairs over the mean."""
        counts = torch.bincount(self.expert_ids.flatten(), minlength=self.config.num_experts)
        return float(counts.max() * self.config.num_experts) / self.config.pairs

    def fingerprint(self) -> list[float]:
        """Numbers that agree, up to rounding, in two processes that hold the same problem."""
        places = torch.arange(1, self.expert_ids.numel() + 1, device=self.x.device)
        ids = self.expert_ids.sort(dim=1).values.flatten()
        tensors = (self.x, self.weights, self.up, self.down, self.grad)
        sums = [float(t.abs().sum(dtype=torch.float64)) for t in tensors]
        return [float((ids * (places % 65521)).sum()), *sums]


def make_problem(
    config: Config,
    routing: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:
    """Draws a problem; the same arguments on the same kind of device give the same one.

    Args:
        config: the sizes.
        routing: a name that :func:`~layer.routings.draw_expert_ids` knows.
        device: the device of all tensors.
        dtype: dtype of tokens and experts.
        seed: seed of the random numbers.

    Raises:
        BenchmarkError: if the routing doesn't fit the sizes.
    """
    if config.num_experts > config.d_model:
        raise BenchmarkError(f"{config.name}: more experts than d_model; tokens can't be steered")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        out = torch.empty(shape, device=device, dtype=dtype)
        return out.normal_(0.0, std, generator=generator)

    tokens, width, inner = config.tokens, config.d_model, config.d_ffn
    experts, top_k = config.num_experts, config.top_k
    wanted = draw_expert_ids(routing, tokens, experts, top_k, generator)
    router = torch.empty(experts, width, device=device).normal_(
        0.0, width**-0.5, generator=generator
    )
    x = _steered_tokens(router, wanted, generator).to(dtype)
    weights, expert_ids = route(x, router, top_k)
    if not torch.equal(expert_ids.sort(dim=1).values, wanted.sort(dim=1).values):
        raise BenchmarkError(f"{config.name}, {routing}: the tokens miss the wanted routing")
    up_rows = 2 * inner if config.gated else inner
    return Problem(
        config=config,
        routing=routing,
        x=x,
        router=router,
        expert_ids=expert_ids,
        weights=weights,
        up=normal(experts, up_rows, width, std=width**-0.5),
        down=normal(experts, width, inner, std=inner**-0.5),
        grad=normal(tokens, width, std=1.0),
    )


def _steered_tokens(router: Tensor, expert_ids: Tensor, generator: torch.Generator) -> Tensor:
    """Random tokens, moved within the span of the router's rows to the logits we want.

    The chosen experts' logits lie in [4, 5], all others in [-1, 1]: rounding to bf16 moves a logit
    by about 0.01, so the choice is safe, while the weights stay far from one-hot.
    """
    tokens, (experts, width) = expert_ids.shape[0], router.shape
    device = router.device
    x = torch.empty(tokens, width, device=device).normal_(generator=generator)
    logits = torch.rand(tokens, experts, generator=generator, device=device) * 2 - 1
    chosen = torch.rand(expert_ids.shape, generator=generator, device=device) + 4
    logits.scatter_(1, expert_ids, chosen)
    logits -= x @ router.T
    gram = (router @ router.T).double()
    x += torch.linalg.solve(gram, logits.T.double()).T.float() @ router
    return x


def route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax top-k in fp32: ``weights (T, K)``, normalised for K > 1, and ``expert_ids``."""
    scores = torch.softmax(x.float() @ router.T, dim=-1)
    weights, expert_ids = scores.topk(top_k, dim=-1)
    if top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, expert_ids


@dataclass(frozen=True)
class Answers:
    """Output and gradients in fp32.

    Attributes:
        out: (T, D).
        gradients: gradients of ``x``, ``weights``, ``up`` and ``down`` when the routing is given;
            of ``x``, ``router``, ``up`` and ``down`` when the layer does the routing.
    """

    out: Tensor
    gradients: dict[str, Tensor]


def activate(h: Tensor, name: str) -> Tensor:
    """``h (N, 2F) -> (N, F)`` for gated names (gate half first), else elementwise."""
    gated = gated_activations()
    if name in gated:
        gate, up = h.chunk(2, dim=-1)
        return activate(gate, gated[name]) * up
    functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    return functions[name](h)


def solve(problem: Problem, with_router: bool = False) -> Answers:
    """The right answers, one expert after the other, all in fp32 (fp64 for fp64 problems).

    Args:
        problem: what to solve.
        with_router: whether the weights come from the router, which then gets a gradient, and the
            load-balancing loss and the z-loss are added.
    """
    config = problem.config
    dtype = torch.float64 if problem.x.dtype == torch.float64 else torch.float32
    flat = problem.expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=config.num_experts).tolist()
    x, grad = problem.x.to(dtype), problem.grad.to(dtype)
    weights = problem.weights.to(dtype).flatten()
    out, d_x = torch.zeros_like(x), torch.zeros_like(x)
    d_weights = torch.zeros_like(weights)
    d_up = torch.zeros(problem.up.shape, dtype=dtype, device=x.device)
    d_down = torch.zeros(problem.down.shape, dtype=dtype, device=x.device)
    for expert, pairs in enumerate(order.split(counts)):
        if pairs.numel() == 0:
            continue
        tokens = pairs // config.top_k
        leaves = [x[tokens], weights[pairs], problem.up[expert].to(dtype)]
        leaves.append(problem.down[expert].to(dtype))
        rows, w, up, down = (leaf.detach().requires_grad_() for leaf in leaves)
        y = w.unsqueeze(1) * (activate(rows @ up.T, config.activation) @ down.T)
        found = torch.autograd.grad(y, (rows, w, up, down), grad[tokens])
        # The K experts of a token differ, so no index occurs twice within one expert.
        out[tokens] += y.detach()
        d_x[tokens] += found[0]
        d_weights[pairs] = found[1]
        d_up[expert], d_down[expert] = found[2], found[3]
    d_weights = d_weights.view_as(problem.weights)
    gradients = {"x": d_x, "up": d_up, "down": d_down}
    if not with_router:
        return Answers(out, gradients | {"weights": d_weights})
    through_x, d_router = _through_router(problem, d_weights)
    gradients["x"] = d_x + through_x
    return Answers(out, gradients | {"router": d_router})


def _through_router(problem: Problem, d_weights: Tensor) -> tuple[Tensor, Tensor]:
    """What x and the router get through the weights and through the losses."""
    experts = problem.config.num_experts
    x = problem.x.to(d_weights.dtype, copy=True).requires_grad_()
    router = problem.router.to(d_weights.dtype, copy=True).requires_grad_()
    logits = x @ router.T
    scores = torch.softmax(logits, dim=-1)
    weights = scores.gather(1, problem.expert_ids)
    if problem.config.top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    counts = torch.bincount(problem.expert_ids.flatten(), minlength=experts)
    balance = experts * ((counts / problem.config.pairs) * scores.mean(dim=0)).sum()
    z = torch.logsumexp(logits, dim=-1).square().mean()
    losses = LOAD_BALANCING * balance + Z_LOSS * z
    found = torch.autograd.grad(
        (weights, losses), (x, router), (d_weights, torch.ones_like(losses))
    )
    return found[0], found[1]


def relative_error(value: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of the right answer; infinite for NaN."""
    value, right = value.detach(), right.detach()
    norm = torch.linalg.vector_norm
    error = float(norm(value.to(right.dtype) - right) / norm(right))
    return error if error == error else float("inf")
