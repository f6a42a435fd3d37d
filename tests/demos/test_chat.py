"""Chats for fine-tuning: labels are the answers, and chats of a row do not see each other."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from demos.chat_tokenizer import CHATML, THINKING, tokenizer_with
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_fastmoe.demos.chat import ChatFiles, check_separation, encode_chat, pack
from lightning_fastmoe.demos.chat.answers import IGNORED
from lightning_fastmoe.errors import ConfigError, DataError


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content, "thought": f"about {content}"}
        for i, content in enumerate(contents)
    ]
    return ([{"role": "system", "content": system}] if system else []) + messages


def learned(tokenizer, example) -> str:
    assert len(example.ids) == len(example.labels)
    assert all(b in (IGNORED, a) for a, b in zip(example.ids, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def test_labels_are_the_answers_and_their_ends():
    tokenizer = tokenizer_with()
    messages = chat("Hi", "Hello, wörld!", "2 + 2?", "4", "and?", system="assistant\n")
    (example,) = encode_chat(tokenizer, messages, 1000)
    assert learned(tokenizer, example) == "Hello, wörld!<|im_end|>\n4<|im_end|>\n"
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_that_drops_thoughts_makes_an_example_of_each_answer():
    tokenizer = tokenizer_with(THINKING)
    found = encode_chat(tokenizer, chat("a?", "A", "b?", "B"), 1000)
    assert [learned(tokenizer, one) for one in found] == [
        "<think>about A</think>A<|im_end|>\n",
        "<think>about B</think>B<|im_end|>\n",
    ]
    text = tokenizer.decode(found[1].ids)
    assert "<|im_start|>assistant\nA<|im_end|>" in text  # without its thought


def test_what_is_cut_off_is_not_learned():
    tokenizer = tokenizer_with()
    messages = chat("Hi", "Hello")
    whole = encode_chat(tokenizer, messages, 1000)[0]
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORED)
    (cut,) = encode_chat(tokenizer, messages, first + 2)
    assert learned(tokenizer, cut) == "He"
    assert encode_chat(tokenizer, messages, first) == []
    assert encode_chat(tokenizer, chat("Hi"), 1000) == []


def test_what_can_not_be_told_apart_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(tokenizer_with(None), chat("Hi", "Hello"), 10)
    late = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="message 1: the chat template renders the prompt"):
        encode_chat(tokenizer_with(late), chat("Hi", "Hello"), 10)
    with pytest.raises(DataError, match="first message is an answer"):
        encode_chat(tokenizer_with(), chat("Hi", "Hello")[1:], 10)
    refusing = tokenizer_with("{{ raise_exception('no tools') }}")
    with pytest.raises(DataError, match="refuses the messages: no tools"):
        encode_chat(refusing, chat("Hi", "Hello"), 10)


def test_rows_are_filled():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 61, (500,), generator=generator).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.05 * sum(lengths) / 64
    assert pack([3, 5, 4, 2], 7) == [[1, 3], [2, 0]]
    assert pack([], 7) == []
    with pytest.raises(ValueError, match="8 tokens doesn't fit into a row of 7"):
        pack([8], 7)


def write(path, *chats):
    path.write_text("".join(json.dumps({"messages": one}) + "\n\n" for one in chats))
    return path


CHATS = [chat("a" * n, "b" * (2 * n), "c?", "d") for n in (1, 5, 9, 30)]


def model_of(family: str) -> Any:
    """A small random one, in fp64 with this package's experts."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 24, "vocab_size": 300}
    sizes |= {"num_experts_per_tok": 2, "pad_token_id": None}
    experts = "num_experts" if family in ("qwen3_moe", "olmoe") else "num_local_experts"
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **{experts: 4})
    return AutoModelForCausalLM.from_config(config, experts_implementation="fastmoe").double()


def summed_loss(model: Any, **batch: Any) -> tuple[Any, int]:
    """The loss of transformers' model times its number of predictions, and that number."""
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    return model(**batch, use_cache=False).loss.detach() * count, count


@pytest.mark.parametrize(
    ("family", "packed"),
    [("qwen3_moe", True), ("mixtral", True), ("olmoe", True), ("mixtral", False)]
    + [("gpt_oss", False)],
)
def test_rows_have_the_loss_of_their_chats(family, packed, tmp_path):
    model, tokenizer = model_of(family), tokenizer_with()
    data = ChatFiles(write(tmp_path / "chats.jsonl", *CHATS), tokenizer, seq_len=200, packed=packed)
    rows = data._train
    assert len(rows) == (2 if packed else 4)
    found = [summed_loss(model, **{n: t[None] for n, t in row.items()}) for row in rows]
    alone = []
    for messages in CHATS:
        (one,) = encode_chat(tokenizer, messages, 200)
        ids, labels = (torch.tensor([numbers]) for numbers in one)
        alone.append(summed_loss(model, input_ids=ids, labels=labels))
    assert sum(n for _, n in found) == sum(n for _, n in alone) == 110
    # transformers computes its loss in fp32.
    total = float(sum(loss for loss, _ in alone))
    assert float(sum(loss for loss, _ in found)) == pytest.approx(total, rel=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_mix_texts_of_a_row_are_refused(dtype):
    for family in ("qwen3_moe", "mixtral", "olmoe"):
        model = model_of(family).to(dtype).train()
        check_separation(model)
        assert model.training
    with pytest.raises(ConfigError, match=r"GptOssForCausalLM.*packed=False"):
        check_separation(model_of("gpt_oss").to(dtype))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1: not JSON"),
        ('{"text": "a"}', 'line 1: "messages" must be a list'),
        ('{"messages": [{"content": "a"}]}', 'line 1: "messages" must be a list'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answers of the role 'assistant'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: the first message"),
        ("", "no answers"),
    ],
)
def test_files_that_are_no_chats(text, reason, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        ChatFiles(path, tokenizer_with())


def test_arguments(tmp_path):
    with pytest.raises(DataError, match="can't be read"):
        ChatFiles(tmp_path / "missing.jsonl", tokenizer_with())
    path = write(tmp_path / "chats.jsonl", *CHATS)
    for name in ("seq_len", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            ChatFiles(path, tokenizer_with(), **{name: 0})
    data = ChatFiles(path, tokenizer_with(), seq_len=200, batch_size=3)
    with pytest.raises(DataError, match="makes 2 rows of 200 tokens.*takes 3"):
        data.setup("fit")
