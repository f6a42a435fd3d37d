"""What int8 or int4 would change, measured on a user's batches before anything is compressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.compression import is_compressed
from lightning_fastmoe.nn.expert_layers import ExpertLayer, expert_layers
from lightning_fastmoe.nn.experts.grouped import groups_of
from lightning_fastmoe.ops.group_quantization import bits_of, dequantize_groups, quantize_groups
from lightning_fastmoe.planning.compressed import compressed_parameters


@dataclass(frozen=True)
class CompressionErrors:
    """Relative errors: the norm of a difference over the norm of what is exact.

    Attributes:
        compression: ``"int8"`` or ``"int4"``.
        layers: of each layer's experts, given the inputs of the exact model; NaN if no token
            reached them.
        output: of the model's output with all layers compressed; None if it was not measured.
    """

    compression: str
    layers: dict[str, float]
    output: float | None = None

    def text(self) -> str:
        """A table for people."""
        rows = dict(self.layers)
        if self.output is not None:
            rows["the model's output"] = self.output
        width = max(map(len, rows))
        title = f"Relative error with experts in {self.compression}"
        return "\n".join([title, *(f"{name:<{width}}  {e:.2e}" for name, e in rows.items())]) + "\n"


class Difference:
    """Sums of squares, over calls, of a difference and of what is exact."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, exact: Any, other: Any) -> None:
        """Adds tensors, or structures of them; differences are in fp32, sums in fp64."""
        pairs = zip(pytree.tree_leaves(exact), pytree.tree_leaves(other), strict=True)
        for a, b in pairs:
            wide = torch.promote_types(a.dtype, torch.float32)
            norms = [torch.linalg.vector_norm(t) for t in (a.to(wide) - b.to(wide), a.to(wide))]
            squares = torch.stack(norms).double().square()
            self._sums = squares if self._sums is None else self._sums + squares

    def relative(self) -> float:
        """The root of their ratio; NaN of zero over zero."""
        if self._sums is None:
            return math.nan
        return float((self._sums[0] / self._sums[1]).sqrt())


class CompressionMeter:
    """Runs each layer's experts a second time, with weights that are rounded for it.

    The model may be anywhere, also offloaded, but not compressed: a layer's weights are rounded
    where it computes, in memory for one layer, by what compresses them later. Nothing of the model
    changes.

    Args:
        model: has layers with experts.
        compression: ``"int8"`` or ``"int4"``.

    Attributes:
        replaces: False measures layers; True lets the model go on with what the rounded experts
            return, and measures nothing.

    Raises:
        ConfigError: if there is no such compression, or the model has no layers with experts, or
            some that are sharded, compressed or offloaded in groups.
    """

    def __init__(self, model: nn.Module, compression: str) -> None:
        self._compression, self._bits = compression, bits_of(compression)
        self.replaces = False
        self._differences: dict[str, Difference] = {}
        self._handles: list[RemovableHandle] = []
        layers = list(expert_layers(model))
        for name, layer in layers:
            if layer.is_sharded:
                raise ConfigError(f"{name} holds only some of its experts: use the whole model.")
            if any(map(is_compressed, layer.experts.holder.parameters())):
                raise ConfigError(
                    f"The experts of {name} are compressed, and what they were is gone. Measure"
                    " the error without compression=, before."
                )
            if groups_of(layer.experts.holder) is not None:
                raise ConfigError(
                    f"The experts of {name} are never on the GPU as a whole, so the error that"
                    f" {compression} would make can't be measured there: offload them without"
                    " groups."
                )
        if not layers:
            raise ConfigError(f"{type(model).__name__} has no experts that could be compressed.")
        # Graphs that have the experts inside would not call the hooks.
        self._stance: Any = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        for name, layer in layers:
            self._differences[name] = Difference()
            # Before the hook of an offloaded layer, which takes the weights away.
            self._handles.append(
                layer.experts.holder.register_forward_hook(
                    partial(self._compare, name, layer), prepend=True, with_kwargs=True
                )
            )

    def errors(self, output: float | None = None) -> CompressionErrors:
        """What has been measured so far."""
        layers = {name: one.relative() for name, one in self._differences.items()}
        return CompressionErrors(self._compression, layers, output)

    def close(self) -> None:
        """Leaves the model alone."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._stance.__exit__(None, None, None)
        self._handles.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _compare(
        self, name: str, layer: ExpertLayer, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if module is not layer.experts.holder:
            return None  # a copy of the model
        parameters = list(module.parameters())
        exact = [parameter.data for parameter in parameters]
        # Those of transformers' experts are called by this forward; they have seen these tokens.
        observers = getattr(layer, "_observers", {})
        seen = dict(observers)
        observers.clear()
        try:
            with torch.inference_mode(False):  # parameters can't be inference tensors
                tensors = self._rounded(layer, exact)
            for parameter, tensor in zip(parameters, tensors, strict=True):
                parameter.data = tensor
            other = module.forward(*args, **kwargs)
        finally:
            observers.update(seen)
            for parameter, tensor in zip(parameters, exact, strict=True):
                parameter.data = tensor
        if self.replaces:
            return other
        self._differences[name].add(output, other)
        return None

    def _rounded(self, layer: ExpertLayer, exact: Sequence[Tensor]) -> list[Tensor]:
        tensors = []
        for tensor, chosen in zip(exact, compressed_parameters(layer, self._bits), strict=True):
            if chosen:
                codes, scales = quantize_groups(tensor, self._bits)
                dequantize_groups(codes, scales, tensor := torch.empty_like(tensor), self._bits)
            tensors.append(tensor)
        return tensors


@torch.no_grad()
def compression_error(
    model: nn.Module,
    batches: Iterable[Any],
    compression: str,
    *,
    run: Callable[[Any], Tensor] | None = None,
) -> CompressionErrors:
    """Measures by how much compressed experts would change a model's results on some batches.

    Each batch runs twice: with exact weights, where each layer's experts are compared with rounded
    ones on the same inputs, and with rounded experts in all layers. The model is not changed. It
    may be offloaded (:func:`~lightning_fastmoe.inference.offload_experts` without ``compression``)
    and then needs GPU memory for the experts of one more layer.

    Args:
        model: with layers of this package or stacked experts of transformers; runs in evaluation
            mode.
        batches: a few, on the model's device. Random tokens say little of real ones.
        compression: ``"int8"`` or ``"int4"``.
        run: called with each batch, returns logits, a loss or another floating tensor; None calls
            the model, with a dict's values by name, and takes the tensor or ``logits`` it returns.

    Returns:
        Errors of the layers, which show where compression hurts, and of the output, which is that
        of all layers together.

    Raises:
        ConfigError: if there is no such compression, no batch or no tensor, or the model has no
            experts, or some that are sharded, compressed or offloaded in groups.
    """
    call = partial(_call, model) if run is None else run
    was_training = model.training
    meter = CompressionMeter(model, compression)
    difference, count = Difference(), 0
    try:
        model.eval()
        for batch in batches:
            meter.replaces = False
            exact = _checked(call(batch))
            meter.replaces = True
            difference.add(exact, _checked(call(batch)))
            count += 1
    finally:
        meter.close()
        model.train(was_training)
    if not count:
        raise ConfigError("compression_error got no batches, so there is nothing to measure.")
    return meter.errors(difference.relative())


def _call(model: nn.Module, batch: Any) -> Any:
    returned = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(returned, "logits", returned)


def _checked(returned: Any) -> Tensor:
    if not isinstance(returned, Tensor) or not returned.is_floating_point():
        raise ConfigError(
            f"The model returned a {type(returned).__name__}, which can't be compared: pass"
            " run=, a function of a batch that returns logits or a loss."
        )
    return returned
