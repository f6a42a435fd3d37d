"""Which tokens of a chat the assistant wrote.

A chat template is a program: nothing but running it says where an answer begins and ends. So it is
rendered up to each answer, with the prompt for it, and through it; what differs is the answer, with
the marker that ends it. Templates that render a past answer differently from the latest one (those
of models that think drop the thoughts) make an example of each such answer: a model sees it like
that when it generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_fastmoe.errors import ConfigError, DataError

IGNORED = -100
"""The label of a token that isn't learned."""


class Example(NamedTuple):
    """Tokens to train on.

    Attributes:
        ids: token ids.
        labels: the same for the tokens of answers, :data:`IGNORED` for others; not shifted.
    """

    ids: list[int]
    labels: list[int]


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], max_tokens: int
) -> list[Example]:
    """The examples of one chat: one, or more if its template changes past answers.

    Args:
        tokenizer: a fast tokenizer of transformers that has a chat template.
        messages: dicts with "role" and "content", and whatever else the template reads.
        max_tokens: examples are cut off after so many tokens.

    Returns:
        Those examples of which some answer is left.

    Raises:
        ConfigError: if the tokenizer has no chat template, or can't say where its tokens are.
        DataError: if the template refuses the messages, or an answer can't be told from its prompt.
    """
    check_tokenizer(tokenizer)
    whole = _render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    examples = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if i == 0:
            raise DataError("the first message is an answer; there must be one that it answers.")
        prompt = _render(tokenizer, messages[:i], add_generation_prompt=True)
        through = _render(tokenizer, messages[: i + 1])
        if not through.startswith(prompt):
            raise DataError(
                f"message {i}: the chat template renders the prompt for an answer differently once"
                " the answer is there, so that it can't be told which tokens are the answer."
            )
        span = (len(prompt), len(through))
        if whole.startswith(through):
            spans.append(span)
        else:
            examples.append(_tokenize(tokenizer, through, [span], max_tokens))
    if spans:
        examples.append(_tokenize(tokenizer, whole, spans, max_tokens))
    # The first token is predicted from nothing.
    return [one for one in examples if any(label != IGNORED for label in one.labels[1:])]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer with which answers can't be found.

    Raises:
        ConfigError: see :func:`encode_chat`.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The tokenizer has no chat template; set tokenizer.chat_template to that of the model"
            " (base models have none: take their instruct version's), and save it."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: only these tell which characters"
            " a token stands for. Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # whatever the template's program raises
        raise DataError(f"the chat template refuses the messages: {error}") from error
    return str(text)


def _tokenize(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], max_tokens: int
) -> Example:
    # The template has put special tokens into the text.
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"][:max_tokens]
    places = found["offset_mapping"][:max_tokens]
    labels = [
        token if any(start < last and end > first for first, last in spans) else IGNORED
        for token, (start, end) in zip(ids, places, strict=True)
    ]
    return Example(ids, labels)
