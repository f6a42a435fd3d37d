"""Chooses the experts that a task uses most, to train them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.nn.router import Routing
from lightning_fastmoe.planning.sizes import numel

By = Literal["load", "gate"]


def select_experts(
    model: nn.Module,
    batches: Iterable[Any],
    by: By = "load",
    share: float | None = None,
    budget: int | float | None = None,
    *,
    run: Callable[[Any], Any] | None = None,
) -> dict[str, list[int]]:
    """The experts of each layer that matter most for some batches, for ``SparseUpdate(experts=)``.

    The idea and both measures are ESFT's (Wang et al. 2024, arXiv 2407.01906). The model runs in
    evaluation mode without gradients. If a process group exists, all ranks call this with batches
    of their own; the result is that of all batches together, identical on every rank.

    Args:
        model: runs here: with all its experts, or sharded during a run of FastMoEStrategy, as in
            ``on_validation_start``.
        batches: a few, on the model's device; padding counts as any token.
        by: an expert's relevance within its layer: "load" is its share of the (token, expert)
            pairs, "gate" its share of the weights that they are combined with.
        share: each layer's experts in descending relevance, until theirs adds up to this: in
            (0, 1]. ESFT takes 0.1 to 0.2.
        budget: at most so many experts of all layers, or with a float in (0, 1) experts with at
            most this fraction of all experts' parameters; the most relevant, among those of
            ``share`` if both are given.
        run: called with each batch; None calls the model, with a dict's values by name.

    Returns:
        Layer's name in ``model`` -> ids of its experts, ascending; without layers of which none
        was chosen.

    Raises:
        ConfigError: if an argument is out of range, there are no layers or no tokens, experts are
            modules, the routing is soft, or the budget allows no expert.
    """
    check_options(by, share, budget)
    layers = dict(expert_layers(model))
    if not layers:
        raise ConfigError(f"select_experts({type(model).__name__}): there is no MoE layer.")
    return select_among(model, layers, batches, by, share, budget, run)


def select_among(
    model: nn.Module,
    layers: dict[str, ExpertLayer],
    batches: Iterable[Any],
    by: By,
    share: float | None,
    budget: int | float | None,
    run: Callable[[Any], Any] | None,
) -> dict[str, list[int]]:
    """:func:`select_experts` from some of the model's layers."""
    for name, layer in layers.items():
        if not layer.experts.is_stacked:
            raise ConfigError(
                f"select_experts: the experts of layer {name!r} are modules, of which SparseUpdate"
                " trains all or none."
            )
    relevance = _relevance(model, layers, batches, by, run)
    ranked = [
        (float(values[i]), name, int(i))
        for name, values in relevance.items()
        for i in _most_relevant(values, share)
    ]
    if budget is not None:
        ranked = _within(ranked, layers, budget)
    result: dict[str, list[int]] = {}
    for name in layers:
        if ids := sorted(i for _, layer, i in ranked if layer == name):
            result[name] = ids
    return result


def check_options(by: Any, share: Any, budget: Any) -> None:
    """Checks the arguments of :func:`select_experts`.

    Raises:
        ConfigError: if one is out of range, or both ``share`` and ``budget`` are missing.
    """
    if by not in get_args(By):
        raise ConfigError(f"by={by!r} is unknown: use one of {', '.join(get_args(By))}.")
    if share is None and budget is None:
        raise ConfigError("select_experts needs a share of tokens, a budget of experts, or both.")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"share={share!r} must be in (0, 1].")
    is_fraction = isinstance(budget, float)
    if budget is not None and (
        isinstance(budget, bool) or not (0 < budget < 1 if is_fraction else budget >= 1)
    ):
        raise ConfigError(
            f"budget={budget!r} must be a number of experts, or a float in (0, 1): the fraction of"
            " their parameters."
        )


def _relevance(
    model: nn.Module,
    layers: dict[str, ExpertLayer],
    batches: Iterable[Any],
    by: By,
    run: Callable[[Any], Any] | None,
) -> dict[str, Tensor]:
    """Layer's name -> (E,) fp64 on the CPU that sums to 1, over the batches of all ranks."""
    totals = {n: torch.zeros(layer.num_experts, dtype=torch.float64) for n, layer in layers.items()}

    def observer(name: str) -> Callable[[Any, Routing], None]:
        def add(_: Any, routing: Routing) -> None:
            totals[name] += _of_pairs(name, routing, by)

        return add

    with ExitStack() as stack, torch.no_grad(), _evaluating(model):
        for name, layer in layers.items():
            handle = layer.register_routing_observer(observer(name))
            stack.callback(handle.remove)
        for batch in batches:
            if run is not None:
                run(batch)
            else:
                model(**batch) if isinstance(batch, dict) else model(batch)
    if dist.is_available() and dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, totals)
        # In the order of ranks, so that rounding is identical on all of them.
        totals = {name: torch.stack([one[name] for one in everyone]).sum(0) for name in layers}
    for name, values in totals.items():
        if not float(values.sum()) > 0:
            raise ConfigError(f"select_experts: no token reached layer {name!r}: give batches.")
    return {name: values / values.sum() for name, values in totals.items()}


def _of_pairs(name: str, routing: Routing, by: By) -> Tensor:
    """(E,) fp64: the sums of the pairs that reach an expert."""
    if routing.dispatch_mix is not None:
        raise ConfigError(
            f"select_experts: layer {name!r} has soft routing, in which each expert gets as much of"
            " each token as any other."
        )
    ids, weights = routing.expert_ids.cpu().reshape(-1), torch.ones((), dtype=torch.float64)
    if by == "gate":
        weights = routing.weights.detach().cpu().reshape(-1).double()
    if routing.dispatched is not None:
        weights = weights * routing.dispatched.cpu().reshape(-1)
    return torch.bincount(
        ids, weights.expand(ids.shape), minlength=routing.logits.shape[1]
    )  # on the CPU, where it adds in a fixed order


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _most_relevant(values: Tensor, share: float | None) -> list[int]:
    """Ids in descending relevance, of equal ones the lower first; none that no token uses."""
    order = torch.sort(values, descending=True, stable=True).indices
    number = int((values > 0).sum())
    if share is not None:
        # A hair less than the share, as sums of shares are rounded.
        reached = torch.cumsum(values[order], 0) >= share - 1e-9
        number = min(number, int(reached.to(torch.int8).argmax()) + 1)
    return order[:number].tolist()


def _within(
    ranked: list[tuple[float, str, int]], layers: dict[str, ExpertLayer], budget: int | float
) -> list[tuple[float, str, int]]:
    """The most relevant experts that the budget allows; of equal ones the first layers' first."""
    sizes = {name: _parameters(layer) for name, layer in layers.items()}
    total = sum(sizes[name] * layer.num_experts for name, layer in layers.items())
    allowed = budget * total if isinstance(budget, float) else budget
    chosen: list[tuple[float, str, int]] = []
    used = 0
    for one in sorted(ranked, key=lambda one: -one[0]):
        used += sizes[one[1]] if isinstance(budget, float) else 1
        if used > allowed:
            break
        chosen.append(one)
    if not chosen:
        raise ConfigError(
            f"budget={budget} of {total} parameters allows no expert: the most relevant has"
            f" {sizes[ranked[0][1]]}."
        )
    return chosen


def _parameters(layer: ExpertLayer) -> int:
    """Parameters of one expert."""
    return sum(map(numel, layer.experts.whole_parameters())) // layer.num_local_experts
