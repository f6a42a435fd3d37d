"""Training in a plain loop on several ranks, and its twin: one process with the whole batch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from distributed.devices import join
from torch import Tensor, nn

from lightning_fastmoe import MoE, SparseUpdate, moe_losses
from lightning_fastmoe.distributed import ExpertDataParallel, ExpertSharder, make_expert_mesh
from lightning_fastmoe.errors import CheckpointError
from lightning_fastmoe.nn.placement import expert_placement

D_IN, D, F = 6, 8, 10
STEPS = 3


@dataclass(frozen=True)
class Case:
    """One run; all topologies of it must give the same numbers.

    Attributes:
        hot: every token chooses the same experts, so the others have none.
        together: balancing losses are of the global batch, which the twin sees in one pass.
        unequal: experts that are modules have different parameters.
    """

    world: int = 1
    ep: Any = 1
    accumulate: int = 1
    tokens: int = 5
    clip: float = 0.05
    dtype: torch.dtype = torch.float64
    bucket_bytes: int = 1000
    dispatcher: str = "auto"
    reduce_dtype: torch.dtype | None = None
    hot: bool = False
    together: bool = False
    nodes: int = 1
    unequal: bool = False
    device_type: str = "cpu"
    seed: int = 7


class Expert(nn.Module):
    """An expert of its own kind, with a parameter of another dtype beside it."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, F), nn.Linear(F, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Dense parts, and layers with stacked, module, shared and unsharded experts."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(D_IN, D), nn.Linear(D, 1)
        self.moes = nn.ModuleList(
            [
                MoE(D, F, 8, top_k=2, bias=True, shared_expert=F, dispatcher=case.dispatcher),
                MoE(D, None, 4, top_k=1, expert=Expert, z_loss=0.02),
                MoE(D, F, 4, dispatcher="local"),
            ]
        )
        if case.unequal:  # two parameters on some ranks, four or none on others
            kinds = [nn.Linear(D, D), nn.Tanh(), Expert(D), nn.Linear(D, D, bias=False)]
            self.moes[1] = MoE(D, None, 4, top_k=2, expert=kinds)
        for moe in self.moes:
            kind = "global_balancing" if case.together else "load_balancing"
            moe.loss_coefficients = {"load_balancing": 0.0, "z_loss": 0.01, kind: 0.05}
        self.together = case.together
        self.sometimes = nn.Linear(D, D)  # its gradient is None on ranks that don't use it
        self.never = nn.Linear(D, D)  # and would decay if it were zeros
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(D, dtype=torch.float32))
        self.register_buffer("shift", torch.randn(D))

    def forward(self, batch: Tensor) -> Tensor:
        h = self.embed(batch) * self.scale + self.shift
        if batch[0, 0, 0] > 0 and not self.together:
            h = h + self.sometimes(h)
        for layer in self.moes:
            h = h + layer(h)
        out = self.head(h + self.frozen(h))
        return (out - torch.sin(3 * batch.sum(-1, keepdim=True))).square().mean()


def build(case: Case, seed: int | None = None) -> Net:
    torch.manual_seed(case.seed if seed is None else seed)
    net = Net(case)
    scale = net.scale
    net = net.to(case.dtype)
    scale.data = scale.data.float()  # parameters of two dtypes
    if case.hot:
        for moe in net.moes:  # ties, which go to the first experts
            nn.init.zeros_(moe.router.weight.requires_grad_(False))
    return net


def make_optimizer(net: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


def make_batches(case: Case) -> Tensor:
    """(steps, accumulate, world, B, T, D_IN); what a rank uses differs between ranks."""
    shape = (2 * STEPS, case.accumulate, case.world, 2, case.tokens, D_IN)
    batches = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    first = batches[..., 0, 0, 0].abs()
    first[..., ::2] *= -1  # ranks 0 and 2 don't use `sometimes`
    batches[..., 0, 0, 0] = first
    return batches.to(case.dtype)


@dataclass
class Trace:
    """What a run did: whole tensors, experts by global id."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def twin(case: Case, start: int = 0, stop: int = STEPS) -> Trace:
    """One process in plain PyTorch, with balancing losses added by hand."""
    net, trace = build(replace(case, dispatcher="auto")), Trace()
    optimizer = make_optimizer(net)
    for number, step in enumerate(make_batches(case)[:stop]):
        mean = 0.0
        for micro in step:
            chunks = [micro.flatten(0, 1)] if case.together else list(micro)
            for chunk in chunks:
                loss = net(chunk)
                mean += loss.item() / (len(chunks) * case.accumulate)
                total = loss + sum(moe_losses(net).values())
                (total / (len(chunks) * case.accumulate)).backward()
        if number >= start:
            trace.gradients.append(gradients(net))
        norm = nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        if number >= start:
            trace.losses.append(mean)
            trace.norms.append(float(norm))
            trace.weights.append({n: p.detach().clone() for n, p in net.named_parameters()})
    return trace


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def whole_gradients(parallel: ExpertDataParallel) -> dict[str, Tensor]:
    """Gathered like weights: put in their place for a moment."""
    net = parallel.model
    own = {n: p for n, p in net.named_parameters() if p.grad is not None}
    values = {n: p.data for n, p in own.items()}
    for p in own.values():
        p.data = p.grad.clone()
    whole = parallel.full_state_dict()
    for n, p in own.items():
        p.data = values[n]
    names = {n.split(".experts.")[0] for n in own}
    return {n: t for n, t in whole.items() if n.split(".experts.")[0] in names}


def train(case: Case, states: Any = None, start: int = 0, stop: int = STEPS) -> Any:
    """A rank's run; (trace, states) on rank 0, with everything that all ranks must agree about."""
    device = join(case.device_type)[0] if case.world > 1 else torch.device("cpu")
    rank = dist.get_rank() if case.world > 1 else 0
    # Other values on the other ranks: the wrapper has to copy rank 0's. Experts' are each rank's
    # own where it has other experts than rank 0, so those start equal.
    net = build(case).to(device)
    if rank:
        with torch.no_grad():
            for name, p in [*net.named_parameters(), *net.named_buffers()]:
                if ".experts." not in name or rank >= (case.ep if case.ep != "auto" else 99):
                    p.add_(1.0)
    parallel = ExpertDataParallel(
        net, case.ep, bucket_bytes=case.bucket_bytes, reduce_dtype=case.reduce_dtype
    )
    optimizer, trace = make_optimizer(net), Trace()
    if states is not None:
        parallel.load_full_state_dict(states[0])
        parallel.load_full_optimizer_state_dict(optimizer, states[1])
    for step in make_batches(case)[start:stop]:
        mean = 0.0
        for micro in step:
            loss = net(micro[rank].to(device))
            mean += loss.item() / case.accumulate
            parallel.backward(loss, divisor=case.accumulate)
        parallel.reduce_gradients()
        trace.gradients.append(whole_gradients(parallel))
        norm = parallel.clip_grad_norm_(case.clip)
        optimizer.step()
        optimizer.zero_grad()
        weights = parallel.full_state_dict()
        trace.norms.append(float(norm))
        trace.losses.append(mean)
        trace.weights.append({n: w for n, w in weights.items() if n != "shift"})
    states = parallel.full_state_dict(), parallel.full_optimizer_state_dict(optimizer)
    held = {n: p.detach().cpu() for n, p in net.named_parameters()}
    dense = {n: p for n, p in held.items() if ".experts." not in n}
    experts = {n: p for n, p in held.items() if ".experts." in n}
    return trace, states, dense, experts


def assert_same(found: Trace, right: Trace, tolerance: float = 1e-6) -> None:
    """Relative to each tensor's largest entry."""
    for what in ("losses", "norms"):
        for own, twin in zip(getattr(found, what), getattr(right, what), strict=True):
            assert abs(own - twin) <= tolerance * abs(twin), f"{what}: {own} != {twin}"
    for what in ("gradients", "weights"):
        for step, (own, twin) in enumerate(
            zip(getattr(found, what), getattr(right, what), strict=True)
        ):
            assert own.keys() == twin.keys()
            for name, value in twin.items():
                error = (own[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
                assert error <= tolerance, f"{what} of {name}, step {step}: {float(error):.1e}"


def check(case: Case, results: list[Any]) -> None:
    """That what :func:`train` returned on each rank is what one process does."""
    traces = [trace for trace, *_ in results]
    traces[0].losses = torch.tensor([t.losses for t in traces]).mean(0).tolist()
    assert_same(traces[0], twin(case))
    assert len({tuple(t.norms) for t in traces}) == 1  # to the bit
    for _, states, dense, _ in results[1:]:
        assert states == ({}, {})
        assert all(torch.equal(dense[n], p) for n, p in results[0][2].items())
    size = case.world if case.ep == "auto" else case.ep
    for rank, (*_, experts) in enumerate(results):
        replica = results[rank % size][3]
        assert all(torch.equal(p, replica[n]) for n, p in experts.items())


def save(case: Case, path: str) -> None:
    """Trains three steps and writes what a script would, from rank 0."""
    _, (model, optimizer), *_ = train(case)
    if dist.get_rank() == 0:
        torch.save({"model": model, "optimizer": optimizer}, path)


def resume(case: Case, path: str) -> Trace:
    """Three more steps."""
    state = torch.load(path, mmap=True, weights_only=True)
    trace, *_ = train(case, (state["model"], state["optimizer"]), STEPS, 2 * STEPS)
    return trace


def clip(case: Case, norm_type: float) -> tuple[float, dict[str, Tensor]]:
    """The norm of a step's gradients, and these, clipped."""
    join("cpu")
    net = build(case)
    parallel = ExpertDataParallel(net, case.ep)
    parallel.backward(net(make_batches(case)[0, 0, dist.get_rank()]))
    parallel.reduce_gradients()
    norm = parallel.clip_grad_norm_(0.05, norm_type)
    return float(norm), whole_gradients(parallel)


def reduce_bf16(dtype: torch.dtype | None) -> Tensor:
    """The averaged gradient, of 256, 1, 300 and 1."""
    join("cpu")
    model = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    parallel = ExpertDataParallel(model, reduce_dtype=dtype)
    value = (256.0, 1.0, 300.0, 1.0)[dist.get_rank()]
    model.weight.grad = torch.full_like(model.weight, value)
    parallel.reduce_gradients()
    return model.weight.grad[0]


def reduce_complex(dtype: torch.dtype | None) -> tuple[complex, float]:
    """The averaged gradient of a complex parameter, of 3j and 1+1j, and its norm."""
    join("cpu")
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    parallel = ExpertDataParallel(model, reduce_dtype=dtype)
    model.phase.grad = torch.tensor([(3j, 1 + 1j)[dist.get_rank()]])
    parallel.reduce_gradients()
    average = model.phase.grad.item()
    return average, float(parallel.clip_grad_norm_(1.0))


def placed() -> dict[str, Tensor]:
    """The whole state of a model of which each rank has built its own experts only."""
    join("cpu")
    case = Case(world=2, ep=2)
    sharder = ExpertSharder(make_expert_mesh(2, "cpu"))
    with expert_placement(sharder.placement):
        net = build(case)
    assert net.moes[0].experts.up_proj.shape[0] == 4
    parallel = ExpertDataParallel(net)  # "auto": as it is
    assert parallel.mesh.ep_size == 2
    return parallel.full_state_dict()


def load_too_few() -> str:
    """The error of a state of two experts."""
    join("cpu")
    net = build(Case(world=2))
    parallel = ExpertDataParallel(net, 2)
    state = build(Case()).state_dict()
    state["moes.0.experts.up_proj"] = state["moes.0.experts.up_proj"][:2]
    try:
        parallel.load_full_state_dict(state)
    except CheckpointError as error:
        return str(error)
    return ""


def _qwen() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 12, "moe_intermediate_size": 12}
    sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 31}
    config = transformers.AutoConfig.for_model("qwen3_moe", **sizes, initializer_range=0.2)
    config._experts_implementation = "fastmoe"
    return transformers.AutoModelForCausalLM.from_config(config)


def _steps() -> Tensor:
    """(steps, world, B, T)"""
    return torch.randint(31, (2, 4, 2, 5), generator=torch.Generator().manual_seed(1))


def transformers_run() -> dict[str, Tensor]:
    """The weights of a model of transformers after two steps of SGD on four ranks."""
    join("cpu")
    model = _qwen()
    parallel = ExpertDataParallel(model, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in _steps():
        own = step[dist.get_rank()]
        parallel.backward(model(input_ids=own, labels=own, use_cache=False).loss)
        parallel.reduce_gradients()
        parallel.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 4
    return parallel.full_state_dict()


def transformers_twin() -> dict[str, Tensor]:
    """The same in one process, in transformers' own code."""
    model = _qwen()
    model.set_experts_implementation("eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in _steps():
        for own in step:
            (model(input_ids=own, labels=own, use_cache=False).loss / len(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def save_unequal_optimizers() -> str:
    """The error where only rank 0 trains the experts."""
    join("cpu")
    net = build(Case(world=2))
    parallel = ExpertDataParallel(net, 2)
    trained = [net.embed.weight, *([net.moes[0].experts.up_proj] if dist.get_rank() == 0 else [])]
    optimizer = torch.optim.AdamW(trained)
    parallel.backward(net(make_batches(Case(world=2))[0, 0, dist.get_rank()]))
    parallel.reduce_gradients()
    optimizer.step()
    try:
        parallel.full_optimizer_state_dict(optimizer)
    except CheckpointError as error:
        return str(error)
    return ""


def bytes_of_loaded_state() -> tuple[int, int]:
    """Of a state of four of eight experts (4, D): its own bytes, and those of its storage."""
    case = Case(world=2, ep=2)
    _, (_, state), *_ = train(case)
    everyone = [state]
    dist.broadcast_object_list(everyone, 0)
    net = build(case)
    parallel = ExpertDataParallel(net, 2)
    optimizer = make_optimizer(net)
    parallel.load_full_optimizer_state_dict(optimizer, everyone[0])
    moment = optimizer.state[net.moes[0].experts.down_bias]["exp_avg"]
    return moment.numel() * moment.element_size(), moment.untyped_storage().nbytes()


def whole_state_of_single_experts(
    ids: list[int], others: list[int]
) -> tuple[dict[str, Any], bool, str]:
    """The optimizer's state of some trained experts, whether it loads, what others say of it."""
    join("cpu")
    states = []
    for chosen in (ids, ids, others):
        torch.manual_seed(0)
        net = nn.Sequential(MoE(D, F, 4, top_k=2, load_balancing=0.0)).double()
        SparseUpdate(experts=chosen, dense=False).apply(net)
        parallel = ExpertDataParallel(net, dist.get_world_size())
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        if states:
            try:
                parallel.load_full_optimizer_state_dict(optimizer, deepcopy(states[0]))
            except CheckpointError as error:
                return states[0], True, str(error)
        generator = torch.Generator().manual_seed(1)
        batch = torch.randn(2, 12, D, dtype=torch.float64, generator=generator)
        mine = batch.flatten(0, 1).chunk(dist.get_world_size())[dist.get_rank()]
        if not states:
            parallel.backward(net(mine).square().mean())
            parallel.reduce_gradients()
            optimizer.step()
        state = [parallel.full_optimizer_state_dict(optimizer)]
        dist.broadcast_object_list(state, 0)
        states.append(state[0])
        if len(states) == 2:
            for name, values in states[0]["state"].items():
                assert all(torch.equal(v, states[1]["state"][name][k]) for k, v in values.items())
            parallel.backward(net(mine).square().mean())
            parallel.reduce_gradients()
            optimizer.step()  # with the shapes that were loaded
    return states[0], False, ""
