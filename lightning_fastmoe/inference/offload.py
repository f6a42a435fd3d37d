"""Experts that stay in host memory and visit the GPU layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.chunks import ChunkedBlocks, ChunkSize, check_chunk
from lightning_fastmoe.inference.compressed_layers import CompressedLayers
from lightning_fastmoe.inference.layer import OffloadedLayer
from lightning_fastmoe.inference.offloadable import OFFLOADED, offloadable_layers
from lightning_fastmoe.inference.options import check_groups, check_slots, check_together
from lightning_fastmoe.inference.pass_timer import PassTimer
from lightning_fastmoe.inference.pinned import PinnedMemory, copy_async
from lightning_fastmoe.inference.ring import ExpertRing, RingStatistics
from lightning_fastmoe.nn.experts.grouped import ExpertGroups
from lightning_fastmoe.nn.experts.routed_call import RoutedCall
from lightning_fastmoe.planning.offload_sizes import parse_bytes


class OffloadedExperts:
    """What :func:`offload_experts` has set up; closing it undoes that.

    Attributes:
        slot_bytes: GPU memory of the slots, and of the workspace that compressed experts need.
        host_bytes: the experts' bytes in host memory, without those that are resident.
        resident_bytes: the experts' bytes that stay on the GPU.
        cache_bytes: GPU memory in which single experts are kept.
    """

    def __init__(
        self,
        layers: Sequence[OffloadedLayer],
        resident: Sequence[OffloadedLayer],
        device: torch.device,
        slots: int,
        expert_cache: int = 0,
        groups: int = 1,
        compression: str | None = None,
        make_ring: Callable[..., ExpertRing] = ExpertRing,
    ) -> None:
        self._layers, self._resident, self._groups = layers, resident, groups
        self._compressed: CompressedLayers | None = None
        self.resident_bytes = sum(layer.bytes for layer in resident)
        self.slot_bytes = self.cache_bytes = 0
        self._pinned: PinnedMemory | None = None
        self._ring: ExpertRing | None = None
        self._make_ring = make_ring
        self._hooks: list[RemovableHandle | ExpertGroups] = []
        self._running: tuple[int, int] | None = None  # the thread, and the layer that computes
        self._is_held = False
        self._chunks: ChunkedBlocks | None = None
        try:
            if compression is not None and layers:
                self._compressed = CompressedLayers(layers, compression)
                self._compressed.compress(device)
            self._set_up(device, slots, expert_cache)
        except BaseException:
            self.close()
            raise

    def _set_up(self, device: torch.device, slots: int, expert_cache: int) -> None:
        OFFLOADED.update(layer.module for layer in (*self._layers, *self._resident))
        self.host_bytes = sum(layer.bytes for layer in self._layers)
        if device.type == "cuda":
            self._pinned = PinnedMemory(t for layer in self._layers for t in layer.stored)
        for layer in self._resident:
            layer.put([tensor.to(device) for tensor in layer.host])
        if self._layers:
            stacks = [part for layer in self._layers for part in layer.stacks(self._groups)]
            copy = copy_async if self._pinned is None else self._pinned.copy
            self._ring = self._make_ring(stacks, device, slots, expert_cache, copy)
            self.slot_bytes, self.cache_bytes = self._ring.slot_bytes, self._ring.cache_bytes
            if self._compressed is not None:
                self.slot_bytes += self._compressed.workspace_bytes
        for number, layer in enumerate(self._layers):
            self._hooks += self._hook(number, layer)
            if self._groups > 1:
                groups = ExpertGroups(
                    layer.module, layer.ends(self._groups), partial(self._placed, number)
                )
                groups.install()
                self._hooks.append(groups)

    @property
    def ring(self) -> ExpertRing | None:
        """What copies the experts; None if all are resident."""
        return self._ring

    @property
    def statistics(self) -> RingStatistics:
        """What has been copied so far."""
        return RingStatistics() if self._ring is None else self._ring.statistics

    def time_by(self, timer: PassTimer) -> None:
        """Has copies, and what waits for them, timed by ``timer`` from now on."""
        if self._ring is not None:
            self._ring.timer = timer

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Within it, a layer that runs several times has all its experts copied once."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            if self._running is not None and self._running[0] == threading.get_ident():
                self._finish()

    def compute_in_chunks(self, model: nn.Module, chunk_sequences: ChunkSize) -> None:
        """Makes the blocks of the model compute chunks, for as long as experts are offloaded."""
        self._chunks = ChunkedBlocks(model, chunk_sequences, self.held)

    def close(self) -> None:
        """The experts are ordinary parameters on the CPU again, and no host memory is pinned.

        Experts that were compressed take their memory of before, with the rounded weights; a
        warning says so.
        """
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            if self._ring is not None:
                self._ring.close()
        finally:  # also if the GPU has failed meanwhile
            self._ring = self._running = None
            for layer in (*self._layers, *self._resident):
                layer.take_back()
                OFFLOADED.discard(layer.module)
            if self._pinned is not None:
                self._pinned.close()
                self._pinned = None
            if self._compressed is not None:
                self._compressed.close()
                self._compressed = None
            self._layers = self._resident = ()  # with their weights, which may be replaced now

    def _forget_interrupted(self) -> None:
        """Ctrl-C ends a forward pass without its hooks; the next one tidies up."""
        if self._running is None:
            return
        if self._running[0] != threading.get_ident():
            raise ConfigError("Layers whose experts are offloaded can't run in several threads.")
        self._finish()

    def _finish(self) -> None:
        assert self._running is not None
        assert self._ring is not None
        number = self._running[1]
        self._running = None
        if self._compressed is not None:
            self._compressed.release()
        layer = self._layers[number // self._groups]
        is_kept = layer.take_back()
        self._ring.release(number)
        if not is_kept:
            raise ConfigError(
                f"A pass of few tokens has changed the parameters of {type(layer.module).__name__}"
                " in place, while only the experts that they chose were on the device: change them"
                " between passes."
            )

    def _place(self, number: int, call: RoutedCall | None) -> None:
        """The parameters of a layer are those of a stack on the device, until :meth:`_finish`."""
        assert self._ring is not None
        self._forget_interrupted()
        self._running = (threading.get_ident(), number)
        tensors = self._ring.acquire(number, call, whole=self._is_held)
        holds_all = self._groups == 1 and self._ring.holds_all(number)
        if self._compressed is not None:
            tensors = self._compressed.decompress(number, tensors)
            self._ring.release(number)  # the next copy begins while this layer computes
        self._layers[number // self._groups].put(tensors, holds_all)

    @contextmanager
    def _placed(self, layer: int, group: int, call: RoutedCall) -> Generator[None, None, None]:
        """The parameters of a layer are those of a group of its experts."""
        number = layer * self._groups + group
        self._place(number, call)
        try:
            yield
        finally:
            if self._running == (threading.get_ident(), number):
                self._finish()

    def _hook(self, number: int, layer: OffloadedLayer) -> list[RemovableHandle]:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def before(module: nn.Module, args: Any) -> None:
            if module is not layer.module:  # a copy of the model, which has its own parameters
                if layer.compressed is not None:
                    layer.compressed.refuse("copied")
                return
            if torch.is_grad_enabled():
                raise ConfigError(
                    f"{type(module).__name__} has its experts in host memory, so it can't be"
                    " trained: run it under torch.no_grad() or torch.inference_mode()."
                )
            if self._is_held and self._running == (threading.get_ident(), number):
                return
            if self._groups == 1:
                self._place(number, layer.call(args))
            elif layer.experts is None or layer.experts.routed_call(args) is None:
                raise ConfigError(
                    f"{type(module).__name__} is not computed in groups of experts: use"
                    ' experts_implementation="fastmoe", train no single experts, and do not replace'
                    " its forward; or drop groups."
                )

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is not layer.module or self._is_held:
                return
            if self._running == (threading.get_ident(), number):
                self._finish()

        layer.hook = layer.module.register_forward_pre_hook(before)
        return [
            layer.hook,
            layer.module.register_forward_hook(after, always_call=True),
        ]


@torch.inference_mode(False)
@torch.no_grad()
def offload_experts(
    model: nn.Module,
    device: torch.device | str,
    *,
    slots: int = 2,
    resident_layers: int = 0,
    expert_cache: str | int | None = None,
    groups: int = 1,
    compression: str | None = None,
    chunk_sequences: int | str | None = None,
    make_ring: Callable[..., ExpertRing] = ExpertRing,
) -> OffloadedExperts:
    """Keeps the experts of a model in host memory, and moves the rest to a device.

    The experts of a layer are copied to the device while earlier layers compute, and computed as
    they would be there: the results have the same bits. Copies cost nothing once a pass has so many
    tokens that a layer computes for longer than its experts take to be copied. Outside of their
    forward passes the parameters are those in host memory, so ``state_dict`` and
    ``load_state_dict`` work as usual; only changes made through ``parameter.data`` go unnoticed.

    If a pass has so few tokens that they choose few of a layer's experts, as in generation, only
    those are copied, once the router has chosen them. Inside of such a pass the parameters of the
    others hold anything, which nothing computes with.

    With ``compression`` they are rounded to integers with a scale for each 64 values
    (:mod:`~lightning_fastmoe.ops.group_quantization`), once, and decompressed on the device. That
    halves or quarters copies and host memory, and results are those of the rounded weights;
    :func:`~lightning_fastmoe.inference.compression_meter.compression_error` measures by how much
    they differ. The original weights are freed: while compressed, experts can't be saved, loaded
    or copied, which is refused, and closing leaves the rounded ones. Resident layers, biases and
    adapters are not compressed.

    Args:
        model: on the CPU, with layers of this package or stacked experts of transformers with
            ``experts_implementation="fastmoe"``.
        device: computes.
        slots: GPU memory for the experts of so many layers.
        resident_layers: so many layers, the last ones, keep their experts on the device.
        expert_cache: bytes of GPU memory, such as ``"4GB"``, for experts that passes of few tokens
            have used last; divided between the layers. None keeps none but what is in the slots.
        groups: divides each layer's experts, where those of a whole one are too large for a slot. A
            slot then holds one group, which is copied while another computes. The results may
            differ from those of whole layers by the rounding of sums.
        compression: ``"int8"`` or ``"int4"``; None keeps all bits. Whole layers are decompressed,
            so it goes with neither ``expert_cache`` nor ``groups``.
        chunk_sequences: each block computes so many sequences (rows of dimension 0) at a time, all
            of them while its experts are in their slot, so that activations inside blocks take the
            memory of a chunk. ``"auto"`` makes chunks of about 16 thousand tokens; None computes
            batches as a whole. For decoder layers of transformers, this package's language models,
            and blocks that declare ``row_arguments``: the names of further tensor arguments, with
            their dimension that is the batch, None, or a function of argument, start and stop. It
            doesn't go with ``groups``.
        make_ring: another ring, for several processes.

    Returns:
        An object whose ``close`` undoes it, but leaves the rest of the model on the device.

    Raises:
        ConfigError: if an argument is out of range, the model has no such experts, or they are
            somewhere else than on the CPU, sharded, used by several layers, offloaded already, or
            to be compressed and not finite; if its blocks can't be computed in chunks, as with
            routers that compare tokens; or if options exclude each other.
    """
    check_together(compression, expert_cache, groups, chunk_sequences)
    if chunk_sequences is not None:
        check_chunk(chunk_sequences)
    device = torch.device(device)
    if device == torch.device("cuda"):  # which one must not change later
        device = torch.device("cuda", torch.cuda.current_device())
    layers = offloadable_layers(model)
    check_slots(len(layers), slots, resident_layers)
    cut = len(layers) - resident_layers
    cache = 0 if expert_cache is None else parse_bytes(expert_cache)
    if cache and not cut:
        raise ConfigError(f"expert_cache={cache}: every layer is resident. Leave one of both out.")
    if groups != 1:
        _check_stacked(groups, layers[:cut])
    offloaded = OffloadedExperts(
        layers[:cut], layers[cut:], device, slots, cache, groups, compression, make_ring
    )
    try:
        if chunk_sequences is not None:
            offloaded.compute_in_chunks(model, chunk_sequences)
        _move_rest(model, device, layers)
    except BaseException:
        offloaded.close()
        raise
    return offloaded


def _check_stacked(groups: int, layers: Sequence[OffloadedLayer]) -> None:
    for layer in layers:
        if layer.experts is None:
            raise ConfigError(
                f"groups={groups} divides stacks of experts, but those of"
                f" {type(layer.module).__name__} are modules. Leave it out."
            )
        check_groups(groups, layer.experts.num_experts)


def _move_rest(model: nn.Module, device: torch.device, layers: Sequence[OffloadedLayer]) -> None:
    """Moves the model by its own ``to``, which metrics and Lightning's modules extend."""
    parts = [part for layer in layers for part in layer.module.modules()]
    kept = [part._parameters for part in parts]
    for part in parts:
        part._parameters = {}
    try:
        model.to(device)
    finally:
        for part, parameters in zip(parts, kept, strict=True):
            part._parameters = parameters
