"""Model sizes from a ``config.json``, and the mapping between Hugging Face's tensors and ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.families import FAMILIES, NOT_ALL_READ, Family

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 2**24


@dataclass(frozen=True)
class Architecture:
    """The sizes and conventions of a model.

    Attributes:
        family: a key of :data:`FAMILIES`.
        vocab_size: number of tokens, V.
        d_model: width of the residual stream, D.
        num_layers: number of blocks.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values; each serves ``num_heads / num_kv_heads`` queries.
        head_dim: width of a head.
        d_ffn: inner width of one expert, F.
        num_experts: E.
        top_k: experts per token, K.
        normalize_weights: whether a token's K weights are divided by their sum.
        norm_eps: epsilon of all RMSNorms.
        rope_theta: base of the rotary embedding.
        qk_norm: "none", "head" or "width".
        attention_bias: whether the attention's projections have biases.
        attention_dropout: probability.
        clip_qkv: limit of queries, keys and values, or None.
        dense_layers: index of a layer without experts -> the inner width of its MLP.
        init_std: standard deviation of initial weights.
    """

    family: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ffn: int
    num_experts: int
    top_k: int
    normalize_weights: bool
    norm_eps: float
    rope_theta: float
    qk_norm: str
    attention_bias: bool
    attention_dropout: float
    clip_qkv: float | None
    dense_layers: Mapping[int, int]
    init_std: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Reads the content of a ``config.json``.

        Raises:
            ConfigError: if the family is unknown, or the model has an unsupported feature.
        """
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            raise ConfigError(
                f"config.json has model_type={config.get('model_type')!r}. Supported are"
                f" {', '.join(FAMILIES)}."
            )
        unread = NOT_ALL_READ - family.reads
        given = {name: v for name, v in modernised(config).items() if name not in unread}
        fields = {**family.defaults, **given}
        rope = config.get("rope_parameters") or {}
        theta = rope.get("rope_theta", fields["rope_theta"])
        _check_supported(family, fields, rope)
        try:
            layers, heads = int(fields["num_hidden_layers"]), int(fields["num_attention_heads"])
            skipped = set(fields["mlp_only_layers"] or ())
            step = int(fields["decoder_sparse_step"])
            dense = {i for i in range(layers) if i in skipped or (i + 1) % step}
            return cls(
                family=family.name,
                vocab_size=int(fields["vocab_size"]),
                d_model=int(fields["hidden_size"]),
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=int(fields["num_key_value_heads"] or heads),
                head_dim=int(fields["head_dim"] or int(fields["hidden_size"]) // heads),
                d_ffn=int(fields[family.width]),
                num_experts=int(fields[family.experts]),
                top_k=int(fields["num_experts_per_tok"]),
                normalize_weights=bool(fields["norm_topk_prob"]),
                norm_eps=float(fields["rms_norm_eps"]),
                rope_theta=float(theta),
                qk_norm=family.qk_norm,
                attention_bias=bool(fields["attention_bias"]),
                attention_dropout=float(fields["attention_dropout"]),
                clip_qkv=None if fields["clip_qkv"] is None else float(fields["clip_qkv"]),
                dense_layers={i: int(fields["intermediate_size"]) for i in dense},
                init_std=float(fields["initializer_range"]),
            )
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"config.json has a value of the wrong type: {error}") from error

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with experts."""
        return [i for i in range(self.num_layers) if i not in self.dense_layers]


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a Hugging Face file, and where in our tensor its elements are stored.

    Attributes:
        key: name in the file.
        shape: shape in the file.
        name: name of our tensor.
        start: offset of its first element in our tensor, in elements.
    """

    key: str
    shape: tuple[int, ...]
    name: str
    start: int = 0


def weight_shapes(about: Architecture) -> dict[str, tuple[int, ...]]:
    """Our names of a model's weights -> their shapes.

    Names are those of transformers' modules, except that the router is ``mlp.router.weight`` and
    the experts are ``mlp.experts.up_proj (E, 2F, D)``, gate first, and
    ``mlp.experts.down_proj (E, D, F)``.
    """
    return {name: shape for name, shape, _ in _layout(about)}


def file_tensors(about: Architecture) -> list[FileTensor]:
    """All tensors of the files, in the order of the model."""
    return [part for _, _, parts in _layout(about) for part in parts]


def _layout(about: Architecture) -> Iterator[tuple[str, tuple[int, ...], list[FileTensor]]]:
    """Yields (our name, our shape, the files' tensors that it consists of)."""
    family, d = FAMILIES[about.family], about.d_model

    def same(name: str, *shape: int) -> tuple[str, tuple[int, ...], list[FileTensor]]:
        return name, shape, [FileTensor(name, shape, name)]

    yield same("model.embed_tokens.weight", about.vocab_size, d)
    for i in range(about.num_layers):
        layer = f"model.layers.{i}"
        yield same(f"{layer}.input_layernorm.weight", d)
        yield from (same(f"{layer}.self_attn.{n}", *s) for n, s in _attention(about))
        yield same(f"{layer}.post_attention_layernorm.weight", d)
        if i in about.dense_layers:
            width = about.dense_layers[i]
            yield same(f"{layer}.mlp.gate_proj.weight", width, d)
            yield same(f"{layer}.mlp.up_proj.weight", width, d)
            yield same(f"{layer}.mlp.down_proj.weight", d, width)
        else:
            yield from _moe(about, family, layer)
    yield same("model.norm.weight", d)
    yield same("lm_head.weight", about.vocab_size, d)


def _attention(about: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    q, kv = about.num_heads * about.head_dim, about.num_kv_heads * about.head_dim
    sizes = {"q_proj": (q, about.d_model), "k_proj": (kv, about.d_model)}
    sizes |= {"v_proj": (kv, about.d_model), "o_proj": (about.d_model, q)}
    for name, shape in sizes.items():
        yield f"{name}.weight", shape
        if about.attention_bias:
            yield f"{name}.bias", shape[:1]
    if about.qk_norm != "none":
        whole = about.qk_norm == "width"
        yield "q_norm.weight", (q if whole else about.head_dim,)
        yield "k_norm.weight", (kv if whole else about.head_dim,)


def _moe(
    about: Architecture, family: Family, layer: str
) -> Iterator[tuple[str, tuple[int, ...], list[FileTensor]]]:
    e, f, d = about.num_experts, about.d_ffn, about.d_model
    block, (gate, up, down) = f"{layer}.{family.block}", family.projections
    router, experts = f"{layer}.mlp.router.weight", f"{layer}.mlp.experts"
    yield router, (e, d), [FileTensor(f"{block}.gate.weight", (e, d), router)]
    ups, downs = [], []
    for i in range(e):
        expert = f"{block}.experts.{i}"
        first = i * 2 * f * d
        ups.append(FileTensor(f"{expert}.{gate}.weight", (f, d), f"{experts}.up_proj", first))
        ups.append(FileTensor(f"{expert}.{up}.weight", (f, d), f"{experts}.up_proj", first + f * d))
        downs.append(
            FileTensor(f"{expert}.{down}.weight", (d, f), f"{experts}.down_proj", i * f * d)
        )
    yield f"{experts}.up_proj", (e, 2 * f, d), ups
    yield f"{experts}.down_proj", (e, d, f), downs


def read_config(path: Path | str) -> dict[str, Any]:
    """The content of a ``config.json``.

    Args:
        path: the path of the file, or of the directory that holds it.

    Raises:
        ConfigError: if there is none, or it is not a JSON object.
    """
    path = Path(path)
    file = path / CONFIG if path.is_dir() else path
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{file} is too large for a config.json.")
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{file} can't be read: {error.strerror}. A Hugging Face model is a directory with"
            f" {CONFIG} and safetensors files."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a JSON object.")
    return config


def modernised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the number of experts under both names that transformers versions use."""
    names = ("num_experts", "num_local_experts")
    counts = [config[name] for name in names if name in config]
    if len(set(counts)) > 1:
        raise ConfigError(f"config.json has {counts} experts: {' and '.join(names)} differ.")
    return {**config, **{name: counts[0] for name in names if counts}}


def _check_supported(family: Family, fields: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuses settings that the decoder doesn't implement."""
    scaling = fields.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type", scaling.get("type", "default"))
    wrong = {
        "rope_type": kind != "default" and kind,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "hidden_act": fields["hidden_act"] != "silu" and fields["hidden_act"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "sliding_window": fields["use_sliding_window"] and fields["sliding_window"],
        "router_jitter_noise": fields["router_jitter_noise"],
        "quantization_config": bool(fields.get("quantization_config")),
    }
    for name, value in wrong.items():
        if value:
            raise ConfigError(
                f"config.json of this {family.name} model has {name}={value!r}, which this"
                " package's decoder does not implement: its results would be wrong."
            )
