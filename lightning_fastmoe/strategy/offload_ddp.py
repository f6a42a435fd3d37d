"""OffloadDDPStrategy: several GPUs of one host share the experts that its memory holds once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.inference.gathered import PARTS, GatheringRing
from lightning_fastmoe.inference.offload import OffloadedExperts
from lightning_fastmoe.inference.offloadable import offloadable_parameters
from lightning_fastmoe.inference.options import check_several_gpus
from lightning_fastmoe.inference.pinned import PinnedMemory
from lightning_fastmoe.inference.shared import Shared, SharedExperts
from lightning_fastmoe.planning.observed import OffloadReport
from lightning_fastmoe.strategy.checkpointing.whole_model import LoadsDirectories
from lightning_fastmoe.strategy.loaders.uneven import UnevenData
from lightning_fastmoe.strategy.offload import OffloadStrategy
from lightning_fastmoe.strategy.quiet import quiet_warnings


class OffloadDDPStrategy(LoadsDirectories, DDPStrategy):
    """Evaluates and predicts on several GPUs of one host, whose memory holds the experts once.

    As :class:`OffloadStrategy`, but each process has its own GPU and its share of the batches. The
    experts are those of the first process, in memory that all of them map. Each copies a part of a
    layer over the link of its own GPU, and gathers the others' parts from their GPUs, so that N of
    them copy N times as fast.

    ``configure_model`` runs in one process after the other, each of which then gives its experts
    up: host memory has room for two models at most. A model that is built in ``__init__`` is first
    there once for each process. Everything that isn't an expert is the first process's, too.

    Every process runs the same number of passes; one with fewer batches repeats its last, whose
    results don't count.

    Args:
        gpu_memory: bytes that each process may use on its GPU, such as ``"24GB"``; None for all.
        slots: GPU memory for the experts of so many layers, through which all pass.
        resident_layers: so many layers, the last ones, keep their experts on each GPU.
        report: whether passes are timed, and the first process's printed at the end.
        expert_cache: bytes of each GPU's memory for experts that passes of few tokens used last.
        chunk_sequences: sequences that a block computes at a time; see :class:`OffloadStrategy`.
        gather: whether the processes copy parts of layers and exchange them. Without, each copies
            whole layers, which suits GPUs that can't reach each other faster than host memory.
        kwargs: of Lightning's ``DDPStrategy``.

    Raises:
        ConfigError: if an argument is invalid, or one of :class:`OffloadStrategy` that several
            processes can't share experts with: ``compression`` and ``groups``.
    """

    strategy_name = "fastmoe_offload_ddp"

    def __init__(
        self,
        gpu_memory: str | int | None = None,
        slots: int = 2,
        resident_layers: int = 0,
        expert_cache: str | int | None = None,
        chunk_sequences: int | str | None = None,
        report: bool = True,
        gather: bool = True,
        **kwargs: Any,
    ) -> None:
        # Lightning's strategy would keep them for DistributedDataParallel, which never sees them.
        check_several_gpus(kwargs.pop("compression", None), kwargs.pop("groups", 1))
        super().__init__(**kwargs)
        self.gather = gather
        self._own = OffloadStrategy(
            gpu_memory,
            slots,
            resident_layers,
            expert_cache=expert_cache,
            chunk_sequences=chunk_sequences,
            report=report,
        )
        self._uneven = UnevenData(self)
        self._undo_quiet: Callable[[], None] = _nothing
        self._shared: SharedExperts | None = None
        self._pinned: PinnedMemory | None = None
        self._on_host: Any = None  # a group for the CPU, and one that gathers layers
        self._gathering: Any = None

    @property
    def offloaded(self) -> OffloadedExperts | None:
        """What copies this process's experts, during a call."""
        return self._own.offloaded

    @property
    def last_report(self) -> OffloadReport | None:
        """What this process's passes took in the last call; None with ``report=False``."""
        return self._own.last_report

    @property
    @override
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """The experts."""
        if self._shared is None or self.world_size == 1:
            return ()
        return (p for layer in self._shared.layers for p in layer)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """``configure_model`` builds on the CPU, where experts stay."""
        with super().tensor_init_context(empty_init), torch.device("cpu"):
            yield

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Around ``configure_model``: in one process after the other."""
        with super().model_sharded_context(), self._sharing_in_turn():
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._own.check_use(trainer.state.fn, self.accelerator)
        self._undo_quiet = quiet_warnings()
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None:
        model, device = self.model, self.root_device
        assert model is not None
        shared = self._shared is not None and self._shared.holds(offloadable_parameters(model))
        if not all(self._exchange(shared)):  # built in __init__, or converted or replaced since
            with self._sharing_in_turn():
                pass
        assert self._shared is not None
        if device.type == "cuda":  # as one; what can't be, OffloadedExperts tries and copies
            self._pinned = PinnedMemory([self._shared.memory], None, bounces=False)
        if self.gather and self.world_size > 1:
            self._gathering = dist.new_group()
        self._own.model, self._own.parallel_devices = model, [device]
        self._own.make_ring = partial(
            GatheringRing, regions=self._shared.regions, group=self._gathering
        )
        self._own.model_to_device()
        self._take_rest_of_first(model)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return self._uneven.wrap(super().process_dataloader(dataloader))

    @override
    def on_validation_start(self) -> None:
        self._uneven.fill_up("validation_step")

    @override
    def on_test_start(self) -> None:
        self._uneven.fill_up("test_step")

    @override
    def on_predict_start(self) -> None:
        self._uneven.fill_up("predict_step")

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._one_pass():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._one_pass():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._one_pass():
            return super().predict_step(*args, **kwargs)

    @override
    def on_validation_end(self) -> None:
        self._own.say_report()

    @override
    def on_test_end(self) -> None:
        self._own.say_report()

    @override
    def on_predict_end(self) -> None:
        self._own.say_report()

    @override
    def teardown(self) -> None:
        try:
            self._own.close()
        finally:
            self._undo_quiet()
            self._undo_quiet = _nothing
            pinned, self._pinned = self._pinned, None
            if pinned is not None:
                pinned.close()
            if self._shared is not None and self._shared.regions:
                self._shared.part()
            groups = (self._gathering, self._on_host)
            self._gathering = self._on_host = None
            for group in groups:
                if group is not None:  # which also ends those who wait for this process
                    dist.destroy_process_group(group)
            super().teardown()

    @contextmanager
    def _one_pass(self) -> Iterator[None]:
        ring = None if self.offloaded is None else self.offloaded.ring
        joined = ring.one_pass() if isinstance(ring, GatheringRing) else nullcontext()
        with self._own.one_pass(), joined:
            yield

    @contextmanager
    def _sharing_in_turn(self) -> Iterator[None]:
        """Around what builds a model, in one process after the other; then its experts are shared.

        Raises:
            ConfigError: in all other processes, if one fails.
        """
        if self.num_nodes > 1:
            raise ConfigError(
                f"num_nodes={self.num_nodes} is not supported: OffloadDDPStrategy's processes share"
                " the memory of one host. Run one Trainer on each, with a part of the data."
            )
        failure: BaseException | None = None
        where: Any = None
        for turn in range(self.world_size):
            if turn == self.global_rank:
                try:
                    yield
                    module = self.lightning_module
                    assert module is not None
                    self._share(offloadable_parameters(module), where)
                    where = self._shared.shared  # type: ignore[union-attr]
                except BaseException as error:  # noqa: BLE001  the others must know, whatever it is
                    failure = error
            states = self._exchange((where, None if failure is None else repr(failure)))
            where, problem = states[turn]
            if failure is not None:
                raise failure
            if problem is not None:
                raise ConfigError(f"Rank {turn} could not set up its model: {problem}")

    def _share(self, layers: list[list[nn.Parameter]], where: Shared | None) -> None:
        """Puts experts into the memory of the first process, or this one's, if it is the first."""
        old, first = self._shared, where is None
        if old is not None and (first or where == old.shared):
            kept = old.holds(layers) or old.resume(layers, changed=not first)
        else:
            kept = False
        if not kept:
            self._shared = SharedExperts(layers, PARTS * self.world_size, where)

    def _exchange(self, value: Any) -> list[Any]:
        """The value of each process, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        if self._on_host is None:
            self._on_host = dist.new_group(backend="gloo")
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._on_host)
        return found

    @torch.no_grad()
    def _take_rest_of_first(self, model: nn.Module) -> None:
        """Everything but experts is the first process's.

        Raises:
            ConfigError: if processes have built different models.
        """
        assert self._shared is not None
        experts = {id(p) for layer in self._shared.layers for p in layer}
        rest = {
            name: tensor.data
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if id(tensor) not in experts
        }
        all_shapes = self._exchange([(n, tuple(t.shape), str(t.dtype)) for n, t in rest.items()])
        for rank, shapes in enumerate(all_shapes):
            if shapes != all_shapes[0]:
                other = next(iter(set(shapes) ^ set(all_shapes[0])), "their order")
                raise ConfigError(
                    f"Rank {rank} has built another model than rank 0; they differ in {other}. Each"
                    " process must build the same one."
                )
        if self.world_size > 1:
            for tensor in rest.values():
                group = self._on_host if tensor.device.type == "cpu" else None
                same = tensor.contiguous()
                dist.broadcast(same, 0, group=group)
                if same is not tensor:
                    tensor.copy_(same)


def _nothing() -> None:
    pass
