"""Loads models of transformers so that each rank reads only its own experts.

transformers does the work: it builds the model without memory for its weights, reads the files'
tensors as late as possible, renames and converts them. In between, this module narrows the experts
to the rank's own, and shows transformers only their rows of the files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface.experts_class import NAME, parameter_names
from lightning_fastmoe.huggingface.experts_interface import register_experts
from lightning_fastmoe.huggingface.nf4 import check_scheme
from lightning_fastmoe.huggingface.nf4 import functions as quantising_functions
from lightning_fastmoe.huggingface.quantizing import finish as finish_quantising
from lightning_fastmoe.huggingface.quantizing import quantised_as_assigned
from lightning_fastmoe.huggingface.sharded_experts import TransformersLayer, kind
from lightning_fastmoe.nn.placement import current_placement, is_placing

_PER_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROWWISE = ("Concatenate", "Interleave", "Chunk")
"""Conversions that leave each expert to itself unless their ``dim`` is 0."""
_SHOWN = 3
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Options of transformers that say where a ``config.json`` is."""


def from_pretrained(
    path: Any,
    *args: Any,
    auto_class: Any = None,
    quantize_experts: str | None = None,
    **options: Any,
) -> Any:
    """``from_pretrained`` of transformers with this package's experts.

    Called in ``configure_model``, while FastMoEStrategy shards experts, a rank reads and holds its
    own experts only. Elsewhere it is transformers' own function.

    Args:
        path: a directory with safetensors files, or a name on the Hub.
        args: transformers' own.
        auto_class: the class whose ``from_pretrained`` is called; None is ``AutoModelForCausalLM``.
        quantize_experts: a scheme of :func:`~lightning_fastmoe.huggingface.quantize_experts`, such
            as "nf4". Experts are then in memory in 4 bits, but for one layer at a time, and the
            model is frozen.
        options: transformers' own, such as ``dtype``.

    Raises:
        ConfigError: if experts of the model can't be sharded or read one by one, weights are
            missing or of another shape, the files have weights that the model has no parameter
            for, or they are quantised and experts are being sharded or quantised. Every rank
            raises it.
        MissingPackageError: if transformers is missing or too old.
    """
    register_experts()
    if auto_class is None:
        from transformers import AutoModelForCausalLM

        auto_class = AutoModelForCausalLM
    asked = options.setdefault("experts_implementation", NAME)
    if asked != NAME:
        raise ConfigError(
            f"from_pretrained(experts_implementation={asked!r}): this function loads models for"
            f' "{NAME}". For another one call transformers\' own.'
        )
    wants_info = options.pop("output_loading_info", False)
    # Shapes are reported below, by name; transformers' own error refers to its log.
    options["ignore_mismatched_sizes"] = True
    if quantize_experts is not None:
        check_scheme(quantize_experts)
        quantising_functions()
    if is_placing() or quantize_experts is not None:
        _check_quantised(path, options, quantize_experts)
    with _own_loading(quantize_experts):
        model, info = auto_class.from_pretrained(path, *args, output_loading_info=True, **options)
    _check_loaded(path, model, info)
    if quantize_experts is not None:
        finish_quantising(model)
    return (model, info) if wants_info else model


def _check_quantised(path: Any, options: Mapping[str, Any], scheme: str | None) -> None:
    """Refuses quantised weights before transformers asks for the packages that they need."""
    from transformers import BitsAndBytesConfig, PreTrainedConfig

    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        told = {name: value for name, value in options.items() if name in _WHERE}
        config, _ = PreTrainedConfig.get_config_dict(path if config is None else config, **told)
    else:
        config = config.to_dict()
    if scheme is not None and config.get("quantization_config"):
        raise ConfigError(
            f"from_pretrained(quantize_experts={scheme!r}): the weights of {path} are quantised"
            " already (quantization_config). Load a version with weights of 16 bits or more, or"
            " leave the option out."
        )
    wanted = options.get("quantization_config")
    if wanted is not None and scheme is not None and not is_placing():
        if isinstance(wanted, BitsAndBytesConfig):  # of linear layers alone
            return
        raise ConfigError(
            f"from_pretrained(quantize_experts={scheme!r}, quantization_config="
            f"{type(wanted).__name__}): it might quantise the experts, too. Use BitsAndBytesConfig,"
            " which quantises linear layers alone."
        )
    if config.get("quantization_config") or wanted:
        raise ConfigError(
            f"The weights of {path} are quantised, or would be (quantization_config): they can't"
            " be trained, nor read expert by expert. Load an unquantised version."
        )


def _check_loaded(path: Any, model: Any, info: Mapping[str, Any]) -> None:
    """Refuses a model other than that of the files, about which transformers only warns."""
    name = type(model).__name__
    advice = "For a model with other parts call transformers' own from_pretrained."
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{path} has no weights for {len(missing)} parameters of {name} ({_some(missing)}),"
            f" which would train from random numbers. {advice}"
        )
    if differ := sorted(info["mismatched_keys"]):
        told = [f"{key} is {tuple(have)}, not {tuple(want)}" for key, have, want in differ]
        raise ConfigError(
            f"{path} has weights of other shapes than {name} with its config.json: {_some(told)}."
            f" {advice}"
        )
    extra = sorted(info["unexpected_keys"])
    if model.base_model is model:  # files of a model with a head, which the caller doesn't want
        inside = {model.base_model_prefix, *(child for child, _ in model.named_children())}
        extra = [key for key in extra if key.split(".")[0] in inside]
    if extra:
        raise ConfigError(
            f"{path} has weights that {name} has no parameter for, so that it would be another"
            f" model: {_some(extra)}. Check its config.json. {advice}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@contextmanager
def _own_loading(scheme: str | None) -> Iterator[None]:
    """Within it, transformers loads a model's experts as the placement of the moment says.

    Args:
        scheme: in which they are quantised as soon as they are read; None if they are not.
    """
    from transformers import PreTrainedModel

    owner: Any = PreTrainedModel
    original: Callable[..., Any] = owner._load_pretrained_model

    def load(
        model: Any, state_dict: Any, files: Any, config: Any, expected_keys: Any = None
    ) -> Any:
        narrowed = _narrow(model)
        with ExitStack() as opened:
            if scheme is not None:
                opened.enter_context(quantised_as_assigned(model, scheme))
            if not narrowed:
                return original(model, state_dict, files, config, expected_keys)
            _check(state_dict, files, config)
            tensors = _own_rows(_lazy_tensors(files, opened), model, config, narrowed)
            return original(model, tensors, files, config, expected_keys)

    owner._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        owner._load_pretrained_model = staticmethod(original)


def _narrow(model: nn.Module) -> dict[str, TransformersLayer]:
    """Leaves this rank's experts in a model without memory: name of a parameter -> its layer."""
    layers = [one for one in kind.layers(model) if one[1].dispatcher_name != "local"]
    # A later layer may need a smaller expert parallel size: the last answer holds for all.
    placements = [current_placement(layer.num_experts) for _, layer in layers]
    last = placements[-1] if placements else None
    if last is None:
        return {}
    kind.check(model)
    narrowed: dict[str, TransformersLayer] = {}
    ranks = layers[-1][1].num_experts // len(last.expert_ids)
    place = last.expert_ids[0] // len(last.expert_ids)
    for path, layer in layers:
        each = layer.num_experts // ranks
        unloaded = _Unloaded(layer)
        layer.experts.keep(range(place * each, (place + 1) * each))
        if last.remember is not None:
            last.remember(layer, unloaded)
        for name in parameter_names(layer.module):
            narrowed[f"{path}.experts.{name}"] = layer
    return narrowed


class _Unloaded:
    """Makes experts without weights, for a placement that changes its mind.

    It can't once they are loaded: the placement then reports what would be lost.
    """

    def __init__(self, layer: TransformersLayer) -> None:
        self._all = tuple(range(layer.num_experts))
        names = parameter_names(layer.module)
        parameters = {name: layer.module.get_parameter(name) for name in names}
        self._like = {name: (p.shape[1:], p.dtype) for name, p in parameters.items()}

    def __call__(self, ids: tuple[int, ...] | None) -> nn.Module:
        made: Any = nn.Module()
        made.local_ids = self._all if ids is None else ids
        for name, (shape, dtype) in self._like.items():
            rows = torch.empty(len(made.local_ids), *shape, dtype=dtype, device="meta")
            made.register_parameter(name, nn.Parameter(rows))
        return made  # type: ignore[no-any-return]


def _check(state_dict: Any, files: Any, config: Any) -> None:
    """Refuses what this module doesn't read row by row."""
    why = None
    if config.device_mesh is not None:
        why = "tp_plan= shards it as well; leave that to the strategy"
    elif len({str(device) for device in (config.device_map or {}).values()}) > 1:
        why = "device_map= distributes it over devices; leave that to the strategy"
    elif state_dict is not None:
        why = "state_dict= was given; load it into a model that is built in __init__"
    elif not files or not all(str(file).endswith(".safetensors") for file in files):
        why = "its weights are not in safetensors files; convert them with save_pretrained"
    if why is not None:
        raise ConfigError(f"Each rank can't load its own experts only: {why}.")


def _lazy_tensors(files: Iterable[str], opened: ExitStack) -> dict[str, Any]:
    """Name in the files -> a tensor that is read when it is indexed."""
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for file in files:
        source = opened.enter_context(safe_open(file, framework="pt"))
        tensors |= {name: source.get_slice(name) for name in source.keys()}  # noqa: SIM118
    return tensors


class Rows:
    """Some rows of a tensor in a file, as transformers reads one: by ``[...]``.

    Args:
        tensor: safetensors' slice of the whole.
        rows: the first one, and the one after the last.
    """

    def __init__(self, tensor: Any, rows: tuple[int, int]) -> None:
        self._tensor, self._rows = tensor, rows

    def __getitem__(self, index: Any) -> Tensor:
        begin, end = self._rows
        rows: Tensor = self._tensor[begin:end]
        return rows[index]

    def get_dtype(self) -> str:
        """The dtype's name in safetensors' header."""
        return str(self._tensor.get_dtype())

    def get_shape(self) -> list[int]:
        """The shape of the rows."""
        begin, end = self._rows
        return [end - begin, *self._tensor.get_shape()[1:]]


def _own_rows(
    tensors: Mapping[str, Any], model: Any, config: Any, narrowed: Mapping[str, TransformersLayer]
) -> dict[str, Any]:
    """What of ``tensors`` this rank reads."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = config.weight_mapping or []
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    there = model.state_dict()
    own: dict[str, Any] = {}
    seen: dict[tuple[str, str], list[tuple[int, str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, there
        )
        if target not in there and name in there:
            target, pattern = name, None
        layer = narrowed.get(target)
        if layer is None:
            own[name] = tensor
            continue
        operations = by_pattern[pattern].operations if pattern is not None else []
        ids = layer.experts.local_ids
        expert = _PER_EXPERT.search(name)
        _check_conversion(name, target, operations, merges=expert is not None)
        if expert is not None:
            number = int(expert[1])
            shape = tuple(tensor.get_shape())
            seen.setdefault((target, str(pattern)), []).append((number, name, shape))
            if number in ids:
                own[name] = tensor
        elif tensor.get_shape()[:1] == [layer.num_experts]:
            own[name] = Rows(tensor, (ids[0], ids[-1] + 1))
        else:
            raise ConfigError(
                f"{name} in the files has shape {tuple(tensor.get_shape())}, which is not a row for"
                f" each of the {layer.num_experts} experts of {target}."
            )
    for (target, pattern), experts in seen.items():
        numbers = sorted(number for number, _, _ in experts)
        if numbers != list(range(narrowed[target].num_experts)):
            raise ConfigError(
                f"The files have experts {numbers} of {target} ({pattern}); the model has"
                f" {narrowed[target].num_experts}."
            )
        # By each rank about all of them: the owner alone would leave the others waiting for it.
        usual = Counter(shape for _, _, shape in experts).most_common(1)[0][0]
        for _, name, shape in sorted(experts):
            if shape == usual:
                continue
            raise ConfigError(
                f"{name} in the files has shape {shape}, and other experts' have {usual}."
            )
    return own


def _check_conversion(name: str, target: str, operations: Iterable[Any], *, merges: bool) -> None:
    """Refuses a conversion that might mix experts.

    Args:
        name: in the files.
        target: in the model.
        operations: transformers' own, in their order.
        merges: whether the files have a tensor for each expert.
    """
    kinds = [type(one).__name__ for one in operations]
    rest = list(zip(kinds, operations, strict=True))
    fits = not merges
    if merges and kinds[:1] == ["MergeModulelist"] and rest[0][1].dim == 0:
        fits, rest = True, rest[1:]
    for called, one in rest:
        dims = [one.dim0, one.dim1] if called == "Transpose" else [getattr(one, "dim", 0)]
        fits &= (called == "Transpose" or called in _ROWWISE) and min(dims) >= 1
    if not fits:
        raise ConfigError(
            f"{name} becomes {target} by {kinds or 'a new name'}, of which it isn't known that it"
            " leaves each expert to itself. Load the model with transformers' from_pretrained in"
            " __init__; the strategy then shards it."
        )
