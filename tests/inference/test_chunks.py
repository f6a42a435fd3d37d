"""Blocks that compute chunks of sequences, against the same model without chunks."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from huggingface.families import CONFIGS, SIZES
from huggingface.sharding_runs import Run, make_model
from inference.offload_models import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DynamicCache, MixtralConfig, StaticCache

from lightning_fastmoe import MoE, OffloadStrategy
from lightning_fastmoe.demos.byte_lm.model import MoETransformer
from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import Architecture
from lightning_fastmoe.huggingface.batch import read_layout
from lightning_fastmoe.huggingface.decoder import MoEDecoder
from lightning_fastmoe.inference import offload_experts
from lightning_fastmoe.nn.router import ROUTERS

IDS = torch.randint(3, 60, (5, 11), generator=torch.Generator().manual_seed(0))
REFUSED = ("expert_choice", "soft", "gshard", "dc")  # the last two have a capacity
MASK = torch.ones_like(IDS)
for number in range(5):  # each row is padded, so that each chunk has a mask, as the whole batch has
    MASK[number, : 5 - number] = 0


class Block(nn.Module):
    """Attention over the second dimension, then experts; says how it is split."""

    row_arguments: Any = {"bias": None, "scale": 1, "ids": 0}

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.moe = MoE(16, 8, 4, **{"top_k": 2, **options})

    def forward(
        self, x: Tensor, bias: Tensor | None = None, scale: Any = None, ids: Any = None
    ) -> Tensor:
        mixed = torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x
        mixed = mixed if bias is None else mixed + bias
        mixed = mixed if scale is None else mixed * scale.transpose(0, 1)
        out: Tensor = self.moe(mixed, token_ids=ids)
        return out


class Network(nn.Module):
    """Some blocks in a list, or others than :class:`Block`."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks or (Block(), Block(), Block()))
        self.final = nn.LayerNorm(16)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        out: Tensor = self.final(x)
        return out


def by_hand(model: Any, size: int, *args: Tensor) -> Tensor:
    """What the model makes of each chunk by itself."""
    parts = [[arg[n : n + size] for arg in args] for n in range(0, len(args[0]), size)]
    return torch.cat([model(*part) for part in parts])


def a_pass(offloaded: Any) -> int:
    """Bytes that are copied if each layer is once."""
    return sum(stack.slot_bytes for stack in offloaded._ring._stacks)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_bits_of_each_chunk_by_itself(name: str, size: int) -> None:
    """And the numbers of the whole batch; experts are copied once per pass."""
    model = make_model(Run(name)).eval()

    def logits(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
        return out

    with torch.inference_mode():
        expected = [by_hand(logits, size, IDS), by_hand(logits, size, IDS, MASK)]
        alone = logits(IDS[:1])
        offloaded = offload_experts(model, "cpu", slots=1, chunk_sequences=size)
        before = offloaded.statistics.copied
        hidden = [
            model.base_model(IDS, attention_mask=mask, use_cache=False)[0] for mask in (None, MASK)
        ]
        copied = offloaded.statistics.copied - before
        assert copied == (2 * a_pass(offloaded) if len(offloaded._layers) > 1 else 0)
        assert offloaded.statistics.misses == 0
        for found, right in zip(hidden, expected, strict=True):
            assert torch.equal(by_hand(model.lm_head, size, found), right)
        assert torch.equal(logits(IDS[:1]), alone)
        offloaded.close()
        assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_numbers_of_the_whole_batch(name: str) -> None:
    model = make_model(Run(name)).double().eval()
    with torch.inference_mode():
        right = model(IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False)
        offload_experts(model, "cpu", chunk_sequences=2)
        found = model(IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False)
    for a, b in zip(found.hidden_states, right.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.logits, right.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, "auto"])
def test_our_decoder(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded and packed rows, and a table of positions that has as many parts as the batch rows."""
    monkeypatch.setattr("lightning_fastmoe.inference.chunks.AUTO_TOKENS", 25)
    torch.manual_seed(1)
    config = {**SIZES, **CONFIGS["qwen3_moe"][1], "model_type": "qwen3_moe"}
    model = MoEDecoder(Architecture.from_config(config)).double().eval()
    packed = torch.arange(11).expand(5, 11).clone()
    packed[:, 6:] -= 6
    packed[2] = torch.arange(11)
    layouts: list[Any] = [
        None,
        read_layout(IDS, {"attention_mask": MASK}),
        read_layout(IDS, {"position_ids": packed}),
    ]
    real = [torch.ones_like(IDS, dtype=torch.bool), MASK.bool(), torch.ones_like(IDS).bool()]
    with torch.inference_mode():
        expected = [model(IDS, layout) for layout in layouts]
        loss = model(IDS, layouts[1], IDS[:, 1:])
        pair = model(IDS[:2])
        offloaded = offload_experts(model, "cpu", slots=1, chunk_sequences=size)
        for layout, right, where in zip(layouts, expected, real, strict=True):
            found = model(IDS, layout)
            torch.testing.assert_close(found[where], right[where], rtol=0, atol=1e-11)
        assert offloaded.statistics.copied == a_pass(offloaded) * 3 + offloaded.slot_bytes
        torch.testing.assert_close(model(IDS, layouts[1], IDS[:, 1:]), loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(model(IDS[:2]), pair, rtol=0, atol=1e-11)


def test_the_byte_model() -> None:
    """Its blocks also get the bytes, for routers that hash them."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ffn": 8}
    sizes |= {"num_experts": 4, "top_k": 1, "load_balancing": None, "z_loss": None}
    network = MoETransformer(**sizes, router="hash", moe=None, init_std=0.3)
    model = network.double().eval()
    with torch.inference_mode():
        for rows in (2, 5):  # a table (2, ...) is not one of two rows
            expected = model(IDS[:rows])
            offloaded = offload_experts(model, "cpu", chunk_sequences=1)
            torch.testing.assert_close(model(IDS[:rows]), expected, rtol=0, atol=1e-12)
            offloaded.close()


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router(router: str) -> None:
    """What a token's experts are doesn't depend on the chunk, or the router is refused."""
    torch.manual_seed(2)
    top_k = 1 if router in ("switch", "hash", "base") else 2
    if router in ("expert_choice", "soft"):
        top_k = None
    model = Network(Block(router=router, top_k=top_k), Block()).double().eval()
    x = torch.randn(5, 7, 16).double()
    ids: Any = IDS[:, :7] if router == "hash" else None
    with torch.inference_mode():
        expected = model(x, ids=ids)
        try:
            offload_experts(model, "cpu", chunk_sequences=2)
        except ConfigError as error:
            assert "depend on the whole batch" in str(error)  # noqa: PT017
            assert router in REFUSED
        else:
            assert router not in REFUSED
            torch.testing.assert_close(model(x, ids=ids), expected, rtol=0, atol=1e-13)


def test_blocks_of_ones_own() -> None:
    torch.manual_seed(2)
    model = Network().double().eval()
    x, bias, scale = torch.randn(5, 7, 16), torch.randn(7, 16), torch.randn(7, 5, 16)
    x, bias, scale = x.double(), bias.double(), scale.double()
    with torch.inference_mode():
        expected = [model(x), model(x, bias=bias), model(x, bias, scale=scale), model(x[:0])]
        rows: list[int] = []
        model.blocks[0].moe.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        offloaded = offload_experts(model, "cpu", slots=1, chunk_sequences=2)
        found = [model(x), model(x, bias=bias), model(x, bias, scale=scale), model(x[:0])]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
        assert rows == [2, 2, 1] * 3 + [0]
        assert offloaded.statistics.copied == a_pass(offloaded) * 4 + offloaded.slot_bytes
        with pytest.raises(ConfigError, match=r"part of scale \(Tensor \(5, 7, 16\)\) .* 1 isn't"):
            model(x, scale=scale.transpose(0, 1))
        model.blocks[0].row_arguments = {"scale": 1}
        with pytest.raises(ConfigError, match=r"Block can't be .* of bias .* a sequence is unk"):
            model(x, bias)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_strategy(precision: Any) -> None:
    """The bits of each chunk; the last batch has fewer sequences than a chunk."""

    class Scorer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.network = Network()

        def predict_step(self, x: Tensor, batch_idx: int) -> Tensor:
            out: Tensor = self.network(x)
            return out

    module = Scorer()
    data: Any = torch.randn(13, 7, 16)
    chunks = trainer("auto", precision=precision).predict(module, DataLoader(data, batch_size=3))
    own = trainer(OffloadStrategy(chunk_sequences=3), precision=precision)
    found = own.predict(module, DataLoader(data, batch_size=6))
    assert [len(part) for part in found] == [6, 6, 1]
    assert torch.equal(torch.cat(found), torch.cat(chunks))
    assert not any("forward" in vars(part) for part in module.modules())


def test_a_compiled_block_stays_compiled() -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph(*args)

        return run

    torch.manual_seed(2)
    model = Network().eval()
    x = torch.randn(4, 3, 16)
    with torch.no_grad():
        expected = by_hand(model, 2, x)
        for whole in (True, False):
            if whole:
                model.blocks[0] = torch.compile(model.blocks[0], backend=backend)  # type: ignore[assignment]
            else:
                model.blocks[1].compile(backend=backend)
            offloaded = offload_experts(model, "cpu", chunk_sequences=2)
            calls.clear()
            assert torch.equal(model(x), expected)
            assert len(calls) >= 2
            offloaded.close()


def test_an_error_or_interrupt_in_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network().eval()
    x = torch.randn(4, 3, 16)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with torch.inference_mode():
        offloaded = offload_experts(model, "cpu", slots=1, chunk_sequences=2)
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1].moe.experts, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
        host = [layer.host[0].data_ptr() for layer in offloaded._layers]
        assert [next(b.moe.experts.parameters()).data_ptr() for b in model.blocks] == host
        assert torch.equal(model(x), expected)


def test_a_copy_of_a_chunked_model_is_an_ordinary_one() -> None:
    model = Network().eval()
    x = torch.randn(4, 3, 16)
    offloaded = offload_experts(model, "cpu", chunk_sequences=3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = offloaded.statistics.copied
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(x).any()
        assert offloaded.statistics.copied == before
        assert model(x).any()


def test_what_chunks_would_change_is_refused() -> None:
    model = make_model(Run("mixtral")).eval()
    offload_experts(model, "cpu", chunk_sequences=2)
    with torch.inference_mode():
        with pytest.raises(ConfigError, match="output_router_logits=True: MixtralDecoderLayer"):
            model(IDS, output_router_logits=True)
        model.config.output_router_logits = True
        with pytest.raises(ConfigError, match="output_router_logits=True"):
            model.base_model(IDS)
        model.config.output_router_logits = False
        with pytest.raises(ConfigError, match=r"of cu_seq_lens_q \(Tensor \(6,\)\) belongs"):
            model(IDS, cu_seq_lens_q=torch.arange(6))
        with pytest.raises(ConfigError, match=r"StaticCache can't be split into chunks"):
            model(IDS, past_key_values=StaticCache(model.config, max_cache_len=20))
        model.train()
        with pytest.raises(ConfigError, match=r"MixtralDecoderLayer is training"):
            model(IDS)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Network(Block(router="expert_choice", top_k=None)), "compares tokens with each"),
        (lambda: Network(Block(capacity_factor=1.5)), r"capacity factor is 1\.5, so a token's"),
        (lambda: Network(nn.Sequential(MoE(16, 8, 4, 2))), r"Whether Sequential computes each seq"),
        (lambda: nn.Sequential(Block()), "are not in blocks of an nn.ModuleList"),
        (lambda: nn.ModuleList([Network(), Network(Two())]), r"Two has 2 layers with ex"),
        (lambda: Network(Two()), r"Two has 2 layers with experts \(moe, more\)"),
    ],
)
def test_models_that_can_not_be_chunked(model: Any, reason: str) -> None:
    built = model()
    with pytest.raises(ConfigError, match=reason):
        offload_experts(built, "cpu", chunk_sequences=2)
    offload_experts(built, "cpu").close()  # nothing is left behind


class Two(Block):
    """A block with two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.more = MoE(16, 8, 4, 2)


@pytest.mark.parametrize("size", [0, -1, True, "many", 1.5])
def test_chunk_sizes(size: Any) -> None:
    with pytest.raises(ConfigError, match=r'must be a positive number, "auto" or None'):
        offload_experts(Network(), "cpu", chunk_sequences=size)
    with pytest.raises(ConfigError, match=r'must be a positive number, "auto" or None'):
        OffloadStrategy(chunk_sequences=size)


class Tupled(Block):
    """Returns more than hidden states."""

    def forward(self, x: Tensor, bias: Any = None, scale: Any = None) -> Any:
        return super().forward(x), None


class Shorter(Block):
    """Returns fewer positions."""

    def forward(self, x: Tensor, bias: Any = None, scale: Any = None) -> Any:
        return super().forward(x)[:, 1:]


def test_outputs_that_can_not_be_joined() -> None:
    for block, reason in ((Tupled(), "returns a tuple"), (Shorter(), r"returns \(2, 2, 16\) for")):
        model = Network(block).eval()
        offload_experts(model, "cpu", chunk_sequences=2)
        with torch.inference_mode(), pytest.raises(ConfigError, match=reason):
            model(torch.randn(4, 3, 16))


@pytest.mark.parametrize("window", [None, 4])
def test_the_ordinary_cache(window: int | None) -> None:
    """transformers' own, on the device: a sliding window, too."""
    model = make_model(Run("mixtral")).double().eval()
    model.config.sliding_window = window
    assert isinstance(model.config, MixtralConfig)
    with torch.inference_mode():
        caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
        right = [
            model(ids, past_key_values=caches[0]).logits for ids in (IDS[:, :7], IDS[:, 7:8], IDS)
        ]
        offload_experts(model, "cpu", chunk_sequences=2)
        found = [
            model(ids, past_key_values=caches[1]).logits for ids in (IDS[:, :7], IDS[:, 7:8], IDS)
        ]
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-12)


def test_a_pass_leaves_nothing_that_waits_for_a_garbage_collection() -> None:
    """Otherwise GPU memory of earlier passes, and registered memory of caches, pile up."""
    network = Network().eval().requires_grad_(False)
    offload_experts(network, "cpu", chunk_sequences=2)
    hidden = torch.randn(5, 3, 16)
    left = weakref.ref(hidden)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            network(hidden)
        del hidden
        assert left() is None
    finally:
        gc.enable()
