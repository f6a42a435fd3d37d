"""A rank's share of a ZeRO optimizer's state, as plain tensors; the private API in one place."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_fastmoe.errors import CheckpointError

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroState(Protocol):
    """Reads and writes what ZeRO keeps on this rank."""

    partitions_parameters: bool

    def parameters(self) -> dict[str, Tensor]:
        """ZeRO 3: name -> this rank's partition."""
        ...

    def load_parameters(self, saved: dict[str, Tensor], strict: bool, without: list[str]) -> None:
        """Restores :meth:`parameters`; those in ``without`` were not saved and stay as they are."""
        ...

    def layout(self, names: dict[int, str]) -> list[list[list[Any]]]:
        """Name and shape of each parameter, in the order of each flat group of this rank.

        Args:
            names: ``id(parameter)`` -> name.
        """
        ...

    def optimizer(self) -> dict[str, Any]:
        """fp32 master weights, the inner optimizer's state and the loss scaler's."""
        ...

    def load_optimizer(self, saved: dict[str, Any]) -> None:
        """Restores :meth:`optimizer`, and the model's weights from the master weights."""
        ...


def zero_state_of(engine: Any) -> ZeroState:
    """The reader for the engine's ZeRO stage."""
    if engine.zero_optimization_partition_weights():
        return _Zero3(engine)
    return _Zero12(engine)


class _Zero12:
    partitions_parameters = False

    def __init__(self, engine: Any) -> None:
        self.zero = engine.optimizer

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def load_parameters(self, saved: dict[str, Tensor], strict: bool, without: list[str]) -> None:
        raise NotImplementedError("ZeRO 1 and 2 load whole parameters through the module")

    def layout(self, names: dict[int, str]) -> list[list[list[Any]]]:
        return [[[names[id(p)], *p.shape] for p in group] for group in self.zero.bit16_groups]

    def optimizer(self) -> dict[str, Any]:
        self.zero._wait_for_offload_copies()
        return {
            "inner": self.zero.optimizer.state_dict(),
            "master": [t.detach() for t in self.zero.single_partition_of_fp32_groups],
            "scaler": _scaler_state(self.zero.loss_scaler),
        }

    def load_optimizer(self, saved: dict[str, Any]) -> None:
        self.zero._wait_for_offload_copies()
        self.zero.optimizer.load_state_dict(saved["inner"])
        _copy_all(self.zero.single_partition_of_fp32_groups, saved["master"])
        _load_scaler(self.zero.loss_scaler, saved["scaler"])
        # The weights of the model are copies of the master weights; without this the old ones
        # would train on.
        self.zero.update_lp_params()
        self.zero._link_all_hp_params()


class _Zero3:
    partitions_parameters = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.zero = engine.optimizer

    def parameters(self) -> dict[str, Tensor]:
        return {n: p.ds_tensor.detach().clone() for n, p in self.engine.module.named_parameters()}

    def load_parameters(self, saved: dict[str, Tensor], strict: bool, without: list[str]) -> None:
        own = dict(self.engine.module.named_parameters())
        if strict and (missing := (own.keys() ^ saved.keys()) - set(without)):
            raise CheckpointError(
                f"Parameters {sorted(missing)} are in only one of checkpoint and model. Set"
                " strict_loading=False on the LightningModule to load what matches."
            )
        for name in own.keys() & saved.keys():
            parameter = own[name]
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
            parameter.ds_tensor.copy_(saved[name])

    def layout(self, names: dict[int, str]) -> list[list[list[Any]]]:
        return [[[names[id(p)], *p.ds_shape] for p in group] for group in self.zero.fp16_groups]

    def optimizer(self) -> dict[str, Any]:
        self.zero._set_fp32_optimizer_param_groups()
        inner = self.zero.optimizer.state_dict()
        self.zero._clear_fp32_optimizer_param_groups()
        return {
            "inner": inner,
            "master": [t.detach() for t in self.zero.fp32_partitioned_groups_flat],
            "scaler": _scaler_state(self.zero.loss_scaler),
        }

    def load_optimizer(self, saved: dict[str, Any]) -> None:
        zero = self.zero
        zero.checkpoint_event_prologue()
        zero._set_fp32_optimizer_param_groups()
        zero.optimizer.load_state_dict(saved["inner"])
        zero._clear_fp32_optimizer_param_groups()
        _copy_all(zero.fp32_partitioned_groups_flat, saved["master"])
        _load_scaler(zero.loss_scaler, saved["scaler"])
        for i in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        zero.checkpoint_event_epilogue()


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.data.copy_(source)


def _scaler_state(scaler: Any) -> dict[str, float]:
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def _load_scaler(scaler: Any, saved: dict[str, float]) -> None:
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
