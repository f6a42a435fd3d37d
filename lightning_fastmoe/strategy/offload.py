"""OffloadStrategy: evaluation and prediction with experts that don't fit on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference import OffloadedExperts, offload_experts
from lightning_fastmoe.inference.chunks import check_chunk
from lightning_fastmoe.inference.options import check_groups, check_slots, check_together
from lightning_fastmoe.inference.pass_timer import PassTimer
from lightning_fastmoe.inference.ring import ExpertRing
from lightning_fastmoe.planning.observed import OffloadReport, observed
from lightning_fastmoe.planning.offload_sizes import OffloadSizes, parse_bytes
from lightning_fastmoe.planning.units import bytes_text
from lightning_fastmoe.strategy.checkpointing.whole_model import LoadsDirectories


class OffloadStrategy(LoadsDirectories, SingleDeviceStrategy):
    """Evaluates and predicts on one GPU, with experts in host memory.

    For ``Trainer.validate``, ``test`` and ``predict``, not for ``fit``. The experts of a layer are
    copied to the GPU while earlier layers compute. The results have the bits of the same model that
    is on the GPU as a whole; :func:`~lightning_fastmoe.inference.offload_experts` says more.

    The model is built on the CPU, by ``__init__`` or ``configure_model``, and stays there but for
    everything that isn't an expert. Large batches hide the copies: from 54 thousand tokens on, an
    H200 computes a layer of Qwen3-30B-A3B's sizes for longer than its experts are copied. At the
    end, two lines say what passes took and what they waited for, beside what their plan predicts
    with the costs seen.

    Args:
        gpu_memory: bytes that this process may use on the GPU, such as ``"24GB"`` or ``"24GiB"``;
            None for all that is there.
        slots: GPU memory for the experts of so many layers, through which all pass.
        resident_layers: so many layers, the last ones, keep their experts on the GPU.
        device: the device; None is the first of the Trainer's ``devices``.
        expert_cache: bytes of GPU memory, such as ``"4GB"``, for single experts that passes of few
            tokens have used last, as steps of generation are; None keeps none.
        groups: divides each layer's experts, of which a slot then holds one group, where a whole
            layer is too large. Results may then differ by the rounding of sums.
        compression: ``"int8"`` or ``"int4"`` rounds experts, which halves or quarters what is
            copied; afterwards the model has the rounded weights. Measure on your data what that
            changes: :class:`~lightning_fastmoe.callbacks.CompressionErrorMonitor`. None is exact.
            It goes with neither ``expert_cache`` nor ``groups``.
        chunk_sequences: sequences that a block computes at a time, which limits activations; "auto"
            for about 16 thousand tokens, None for whole batches. It doesn't go with ``groups``.
        report: whether passes are timed, by events on the device, and those lines printed.

    Attributes:
        last_report: what the last call's passes took; None before and with ``report=False``.

    Raises:
        ConfigError: if an argument is invalid, or two exclude each other.
    """

    strategy_name = "fastmoe_offload"

    def __init__(
        self,
        gpu_memory: str | int | None = None,
        slots: int = 2,
        resident_layers: int = 0,
        device: str | torch.device | None = None,
        expert_cache: str | int | None = None,
        groups: int = 1,
        compression: Literal["int8", "int4"] | None = None,
        chunk_sequences: int | str | None = None,
        report: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(device="cpu", **kwargs)
        self._device = None if device is None else torch.device(device)
        self._devices = [torch.device("cpu")]
        self.gpu_memory = None if gpu_memory is None else parse_bytes(gpu_memory)
        self.slots, self.resident_layers = slots, resident_layers
        self.groups = groups
        self.expert_cache = None if expert_cache is None else parse_bytes(expert_cache)
        check_together(compression, expert_cache, groups, chunk_sequences)
        if chunk_sequences is not None:
            check_chunk(chunk_sequences)
        self.chunk_sequences = chunk_sequences
        self.compression = compression
        self.offloaded: OffloadedExperts | None = None
        self.make_ring: Callable[..., ExpertRing] = ExpertRing  # OffloadDDPStrategy has another
        self.report = report
        self.last_report: OffloadReport | None = None
        self._timer: PassTimer | None = None

    @property
    @override
    def root_device(self) -> torch.device:
        if self._device is not None:
            return self._device
        return self._devices[0]

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Empty, so that each Trainer with this strategy sets its own."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        """The Trainer sets what its ``devices`` are, of which the first is used."""
        self._devices = devices

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """``configure_model`` builds on the CPU, where experts stay; a device's would not fit."""
        with super().tensor_init_context(empty_init), torch.device("cpu"):
            yield

    def check_use(self, function: Any, accelerator: Any) -> None:
        """Refuses what is not supported.

        Args:
            function: of the Trainer, of type ``TrainerFn``.
            accelerator: the Trainer's.

        Raises:
            ConfigError: for ``fit``, and for other accelerators than a GPU and the CPU.
        """
        if function == TrainerFn.FITTING:
            raise ConfigError(
                "OffloadStrategy can't train: it is for Trainer.validate, test and predict. Train"
                " with FastMoEStrategy, whose stage_3_offload variant keeps parameters on the host."
            )
        if not isinstance(accelerator, CUDAAccelerator | CPUAccelerator):
            raise ConfigError(
                f"accelerator={type(accelerator).__name__} is not supported: OffloadStrategy"
                " runs on 'cuda' and 'cpu'."
            )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self.check_use(trainer.state.fn, self.accelerator)
        if self._device is None and len(self._devices) > 1:
            rank_zero_warn(
                f"OffloadStrategy uses one of the {len(self._devices)} devices: {self.root_device}."
                " OffloadDDPStrategy uses all."
            )
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        device = self.root_device
        if device.type == "cuda":
            self._limit_memory(self.model, device)
        self.offloaded = offload_experts(
            self.model,
            device,
            slots=self.slots,
            resident_layers=self.resident_layers,
            expert_cache=self.expert_cache,
            groups=self.groups,
            compression=self.compression,
            chunk_sequences=self.chunk_sequences,
            make_ring=self.make_ring,
        )
        if self.report:
            self._timer = PassTimer(device)
            self._timer.watch(self.model)
            self.offloaded.time_by(self._timer)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        rank_zero_info(
            f"OffloadStrategy: {bytes_text(self.offloaded.host_bytes)} of experts in host memory"
            f"{'' if self.compression is None else f' as {self.compression}'};"
            f" {bytes_text(self.offloaded.slot_bytes)} of slots and"
            f" {bytes_text(self.offloaded.resident_bytes)} of resident experts on {device}."
        )

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.one_pass():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.one_pass():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.one_pass():
            return super().predict_step(*args, **kwargs)

    @override
    def on_validation_end(self) -> None:
        self.say_report()

    @override
    def on_test_end(self) -> None:
        self.say_report()

    @override
    def on_predict_end(self) -> None:
        self.say_report()

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around a step, which is timed."""
        with nullcontext() if self._timer is None else self._timer.one_pass():
            yield

    def say_report(self) -> None:
        """Prints what the passes took, and keeps it as ``last_report``."""
        timer = self._timer
        if timer is None or self.model is None:
            return
        timer.add_up(wait=True)
        device = self.root_device
        self.last_report = observed(
            timer.passes,
            timer.copies,
            OffloadSizes.of(self.model, compression=self.compression),
            slots=self.slots,
            resident=self.resident_layers,
            groups=self.groups,
            expert_cache=self.expert_cache or 0,
            gpu_memory=self.gpu_memory or 0,
            peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )
        if self.last_report is not None:
            rank_zero_info(f"OffloadStrategy: {self.last_report.text()}")

    def close(self) -> None:
        """The model is an ordinary one on the CPU again, and all GPU memory may be used."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()
        offloaded, self.offloaded = self.offloaded, None
        if offloaded is not None:
            offloaded.close()
        if self.gpu_memory is not None and self.root_device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.root_device)

    @override
    def teardown(self) -> None:
        self.close()
        super().teardown()

    def _limit_memory(self, model: nn.Module, device: torch.device) -> None:
        """Applies ``gpu_memory``, and refuses it if the model alone needs more.

        Raises:
            ConfigError: with the missing bytes.
        """
        total = torch.cuda.get_device_properties(device).total_memory
        limit = total if self.gpu_memory is None else min(total, self.gpu_memory)
        sizes = OffloadSizes.of(model, compression=self.compression)
        check_slots(len(sizes.experts), self.slots, self.resident_layers)
        check_groups(self.groups, min(number for number, _ in sizes.choices))
        needed = sizes.weights_on_gpu(self.slots, self.resident_layers, self.groups)
        needed += self.expert_cache or 0
        if needed > limit:
            raise ConfigError(
                f"The model needs {bytes_text(needed)} of GPU memory before any activation"
                f" (slots={self.slots}, resident_layers={self.resident_layers}), and there are"
                f" {bytes_text(limit)}: {bytes_text(needed - limit)} are missing. Use fewer"
                " slots or resident layers, a smaller expert_cache, or more groups."
            )
        if self.gpu_memory is not None:
            torch.cuda.set_per_process_memory_fraction(limit / total, device)
