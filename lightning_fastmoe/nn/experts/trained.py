"""Single experts of a layer that are trained while the others of its stack are frozen.

A parameter that stacks all experts is trained or frozen as a whole, with gradients and optimizer
state for each. So the stack is frozen, and the trained experts' slices become smaller parameters:
all that an optimizer and ZeRO see. Passes put them back in their places, see
:mod:`~lightning_fastmoe.ops.sparse_layer`; so do state dicts, which hold whole stacks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.ops import put_in_place

TRAINED = "trained"
"""The name of :class:`TrainedExperts` in the module that holds the stacks."""


class TrainedExperts(nn.Module):
    """The trained experts on this rank: a parameter (t, ...) for each stack, with its name.

    A rank without any has parameters of one element that is not used, of which :func:`padding_in`
    tells: ZeRO needs something in each group on each rank.

    Args:
        stacks: name -> the stack (e, ...); its rows are copied.
        held: global ids of the e experts, ascending.
        expert_ids: global ids of the layer's trained experts on all ranks, ascending.

    Attributes:
        expert_ids: the same.
        local_ids: those on this rank.
        rows: the places of this rank's in the stacks.
        shapes: name -> the shape of one expert's slice.
    """

    def __init__(
        self, stacks: Mapping[str, nn.Parameter], held: Sequence[int], expert_ids: Iterable[int]
    ) -> None:
        super().__init__()
        self.expert_ids = tuple(expert_ids)
        self.shapes = {name: tuple(stack.shape[1:]) for name, stack in stacks.items()}
        self.local_ids, self.rows = self._held(held)
        for name, stack in stacks.items():
            own = nn.Parameter(stack.detach()[list(self.rows)].clone(), stack.requires_grad)
            self.register_parameter(name, own)
            self._pad(own)

    def _held(self, held: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        trained = set(self.expert_ids)
        rows = tuple(row for row, i in enumerate(held) if i in trained)
        return tuple(held[row] for row in rows), rows

    def _pad(self, own: nn.Parameter) -> None:
        if not self.rows:
            own.data = own.new_zeros((1,) * own.dim())

    @torch.no_grad()
    def keep(self, held: Sequence[int]) -> None:
        """Drops all but the experts of ``held``, whose rows alone the stacks have now."""
        before = self.local_ids
        self.local_ids, self.rows = self._held(held)
        places = [before.index(i) for i in self.local_ids]
        for own in self.parameters():
            if before:
                own.data = own.detach()[places].clone()
            own.grad = None
            for mark in [mark for mark in vars(own) if mark.startswith("ds_")]:
                delattr(own, mark)  # DeepSpeed's, of an earlier run, about the whole
            self._pad(own)

    def slices(self, name: str) -> Tensor | None:
        """The trained slices of a stack, (t, ...), differentiable; None if there is no stack."""
        own = self._parameters.get(name)
        if own is None or self.rows:
            return own
        return own.reshape(-1)[:0].view(0, *self.shapes[name])

    def forward(self, compute: Callable[..., Tensor], *tensors: Any) -> Tensor:
        """``compute(self, *tensors)``: a forward pass of its own, for which ZeRO 3 gathers."""
        return compute(self, *tensors)

    def extra_repr(self) -> str:
        """The arguments, for ``print(model)``."""
        return f"experts {', '.join(map(str, self.expert_ids))}"


def padding_in(module: nn.Module) -> set[int]:
    """``id`` of the parameters that stand for the trained experts of a rank that has none.

    Asked of the modules, as copies of parameters, such as those of deepcopy, keep no marks.
    """
    return {
        id(parameter)
        for part in module.modules()
        if isinstance(part, TrainedExperts) and not part.rows
        for parameter in part.parameters()
    }


def trained_of(module: nn.Module) -> TrainedExperts | None:
    """The trained experts of a module with stacks; None if these are trained or frozen whole."""
    found = module._modules.get(TRAINED)
    return found if isinstance(found, TrainedExperts) else None


def train_rows(
    module: nn.Module,
    names: Iterable[str],
    held: Sequence[int],
    expert_ids: Iterable[int],
    guards: Iterable[RemovableHandle] = (),
) -> None:
    """Freezes the stacks of a module and makes parameters of some experts' slices.

    Args:
        module: has the stacks.
        names: their names, each (len(held), ...).
        held: global ids of the experts whose rows they are.
        expert_ids: global ids of those to train, ascending; of the whole layer.
        guards: what :func:`dissolve` removes, too.
    """
    stacks = {name: module.get_parameter(name) for name in names}
    module.add_module(TRAINED, TrainedExperts(stacks, held, expert_ids))
    for stack in stacks.values():
        stack.requires_grad_(False)
        stack.grad = None
    hooks = [
        module.register_state_dict_pre_hook(_before_saving),
        module.register_state_dict_post_hook(_after_saving),
        module.register_load_state_dict_pre_hook(_before_loading),
        *guards,
    ]
    vars(module)[_HOOKS] = hooks


def dissolve(module: nn.Module) -> None:
    """Undoes :func:`train_rows` once the stacks hold everything; they are trained if parts were."""
    trained = trained_of(module)
    assert trained is not None
    for name, own in trained.named_parameters():
        module.get_parameter(name).requires_grad_(own.requires_grad)
    for hook in vars(module).pop(_HOOKS):
        hook.remove()
    delattr(module, TRAINED)


_HOOKS = "_fastmoe_trained_hooks"


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Copies trained experts to their places in the stacks, unless ZeRO 3 has partitioned them."""
    trained = trained_of(module)
    if trained is None or not trained.rows:
        return
    for name, own in trained.named_parameters():
        stack = module.get_parameter(name)
        is_here = own.shape == (len(trained.rows), *stack.shape[1:]) and not own.is_meta
        if is_here:
            put_in_place([stack], trained.rows, [own])


def check_frozen(module: nn.Module, trained: TrainedExperts) -> None:
    """Refuses stacks that were unfrozen: only the rows of trained experts would get gradients.

    Raises:
        ConfigError: naming the stack.
    """
    for name, _ in trained.named_parameters():
        if getattr(module, name).requires_grad:  # a tensor within functional_call
            raise ConfigError(
                f"{name} of {type(module).__name__} requires gradients, but SparseUpdate trains"
                f" experts {list(trained.expert_ids)} alone. Call SparseUpdate.release(model)"
                " before requires_grad_(True)."
            )


def _before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    merge(module)


def _after_saving(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name in [n for n in state_dict if n.startswith(f"{prefix}{TRAINED}.")]:
        del state_dict[name]


def _before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    trained = trained_of(module)
    assert trained is not None
    for name, own in trained.named_parameters():
        stack, key = state_dict.get(prefix + name), f"{prefix}{TRAINED}.{name}"
        if isinstance(stack, Tensor) and key not in state_dict:
            whole = stack.shape[:1] != module.get_parameter(name).shape[:1]
            rows = list(trained.local_ids if whole else trained.rows)
            state_dict[key] = stack[rows] if rows else own.detach()
