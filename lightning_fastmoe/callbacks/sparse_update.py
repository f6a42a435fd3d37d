"""SparseUpdate: train the last blocks, their experts, some experts or dense parts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fastmoe.callbacks.automatic_selection import MEASURES, AutomaticSelection
from lightning_fastmoe.callbacks.router_bias import RouterBiasBalancing
from lightning_fastmoe.callbacks.single_experts import apply_selection, check_selection, resolve
from lightning_fastmoe.errors import CheckpointError, ConfigError
from lightning_fastmoe.nn import Router, moe_layers
from lightning_fastmoe.nn.expert_layers import expert_layers
from lightning_fastmoe.nn.experts.trained import TRAINED, trained_of
from lightning_fastmoe.nn.placement import settle_placement


class SparseUpdate(pl.Callback):
    """Trains part of a model. The rest gets no gradients and no optimizer state, and never changes.

    With ``last_layers``, all that is registered before the first trained block, such as the
    embedding, is frozen, and that prefix runs without a graph: its activations are not kept. The
    idea is PockEngine's sparse update (Zhu et al. 2023, arXiv 2310.17752); training experts alone,
    all or those that a task uses most (:func:`~lightning_fastmoe.select_experts`), is ESFT's (Wang
    et al. 2024, arXiv 2407.01906).

    A layer of which single experts are trained keeps its stacked parameters, frozen, and gets
    smaller ones, ``NAME.experts.trained.PARAMETER (t, ...)``: only these have gradients, optimizer
    state and weight decay, and ``state_dict()`` and exports hold whole stacks alone.

    A model built in ``__init__`` is frozen before its optimizer is created. At the end of
    ``configure_model`` call :meth:`apply` yourself. Freezing lasts: a later fit trains these
    parameters only after ``requires_grad_(True)``.

    ``experts="by_load"`` and ``"by_gate"`` choose the experts when the fit begins: before the
    optimizer is made, ``training_step`` runs on the first training batches in evaluation mode,
    without gradients. Nothing is used up: the same batches come again, generators draw the same
    numbers, and training equals that with the chosen experts named. All ranks' batches count
    together. A run that resumes takes the selection of its checkpoint. Needs FastMoEStrategy or one
    device, and no :meth:`apply` in ``configure_model``.

    Args:
        last_layers: number of trained blocks, from the end; None for all, and the embedding.
        experts: ``"all"`` trains the experts of trained blocks, ``"none"`` freezes them. A list of
            global ids trains these experts of each layer; a mapping from layers, by name or index
            of their block, to such lists trains those, and freezes the experts of other layers.
            ``"by_load"`` and ``"by_gate"`` choose those that matter most for the training data, as
            :func:`~lightning_fastmoe.select_experts` does by "load" and "gate".
        dense: whether everything else is trained: attention, norms, routers, shared experts, and
            what is registered after the blocks, such as the head.
        layers: name of the ``ModuleList`` of blocks; None for the one that holds the MoE layers.
        batches: of each rank, from which experts are chosen; fewer if there are fewer.
        share: see :func:`~lightning_fastmoe.select_experts`; to choose experts.
        budget: see :func:`~lightning_fastmoe.select_experts`; to choose experts.

    Raises:
        ConfigError: for invalid arguments; at set-up, if blocks, layers or experts are not found,
            a parameter is tied across the border, a frozen module would change by itself, or
            experts have adapters or are modules and are to be trained in part.
        CheckpointError: if a run resumes with another selection than its checkpoint's.
        DataError: if experts are to be chosen and there is no training data, or it could not start
            again after it was looked at.
    """

    def __init__(
        self,
        last_layers: int | None = None,
        experts: Literal["all", "none", "by_load", "by_gate"]
        | dict[str | int, list[int]]
        | list[int] = "all",
        dense: bool = True,
        layers: str | None = None,
        batches: int = 8,
        share: float | None = None,
        budget: int | float | None = None,
    ) -> None:
        if last_layers is not None and (type(last_layers) is not int or last_layers < 1):
            raise ConfigError(f"last_layers={last_layers!r} is invalid: use None, or at least 1.")
        self._automatic: AutomaticSelection | None = None
        if isinstance(experts, str) and experts in MEASURES:
            self._automatic = AutomaticSelection(experts, batches, share, budget)
        elif (batches, share, budget) != (8, None, None):
            raise ConfigError(
                f"batches={batches!r}, share={share!r} and budget={budget!r} choose experts, and"
                f" experts={experts!r} names them: use 'by_load' or 'by_gate', or leave them out."
            )
        elif experts != "all" and experts != "none":
            experts = check_selection(experts)
        if experts == "none" and not dense:
            raise ConfigError("experts='none' with dense=False trains nothing: change one of them.")
        by_index = isinstance(experts, dict) and any(type(key) is int for key in experts)
        if layers is not None and last_layers is None and not by_index:
            raise ConfigError(f"layers={layers!r} has no effect without last_layers: set both.")
        self.last_layers, self.experts, self.dense, self.layers = (
            last_layers,
            experts,
            dense,
            layers,
        )
        self._by_index = by_index
        self._selection: dict[str, Any] = {}
        self._check: RemovableHandle | None = None

    def apply(self, module: nn.Module) -> None:
        """Freezes what is not trained; for the end of ``configure_model``.

        After a fit with ZeRO 3, which leaves the model partitioned, every rank must call it.

        Raises:
            ConfigError: see the class.
        """
        if self._automatic is not None and self._automatic.chosen is None:
            raise ConfigError(
                f"SparseUpdate(experts={self.experts!r}) chooses experts when a fit begins and"
                " applies itself then: don't call apply(), or name the experts."
            )
        *_, selected = self._frozen(module)  # refuses before anything changes
        settle_placement()
        apply_selection(module, selected)
        frozen, *_ = self._frozen(module)
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in frozen]
        if not trained:
            raise ConfigError(
                f"SparseUpdate(last_layers={self.last_layers}, experts={self.experts!r},"
                f" dense={self.dense}) leaves no trainable parameter: choose more."
            )
        for parameter in module.parameters():
            if id(parameter) in frozen:
                parameter.requires_grad_(False)

    @staticmethod
    def release(module: nn.Module) -> None:
        """Ends the training of single experts: their layers' stacks are parameters as before.

        For a later fit without SparseUpdate; one with SparseUpdate does it by itself. After a fit
        with ZeRO 3, which leaves the model partitioned, every rank must call it.
        """
        apply_selection(module, {})

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A model of configure_model does not exist yet: on_fit_start sees whether it was frozen.
        if stage != "fit":
            return
        if self._automatic is not None:
            self._selection = {}
            self._automatic.begin(
                trainer,
                pl_module,
                self.state_key,
                lambda: self._prefix(pl_module)[0],
                lambda: self._apply_chosen(pl_module),
            )
        elif any(True for _ in expert_layers(pl_module)):
            self.apply(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        frozen, first, _ = self._frozen(pl_module)
        for name, parameter in pl_module.named_parameters():
            if id(parameter) in frozen and parameter.requires_grad:
                raise ConfigError(
                    f"SparseUpdate would freeze {name!r}, but it was created, or unfrozen, after"
                    " set-up: call the callback's apply(self) at the end of configure_model()."
                )
        _check_optimizers(trainer, pl_module)
        self._refuse_moving(trainer, pl_module, frozen)
        self._end_check()
        if first is not None:
            self._check = first.register_forward_pre_hook(_check_no_graph, with_kwargs=True)
        rank_zero_info(
            f"SparseUpdate: {sum(p.requires_grad for p in pl_module.parameters())} parameter"
            f" tensors are trained and {len(frozen)} frozen."
        )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_check()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end_check()  # Lightning calls no teardown of callbacks after an error

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._selection)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._automatic is not None and not self._selection:
            self._automatic.restored = dict(state_dict)  # before set-up: not by FastMoEStrategy
            return
        # DeepSpeed's engine exists by now, so that the selection can't change any more.
        self._check_same(state_dict)

    def _apply_chosen(self, module: nn.Module) -> None:
        self.apply(module)
        assert self._automatic is not None
        self._check_same(self._automatic.restored or {})

    def _check_same(self, state_dict: Mapping[str, Any]) -> None:
        if self._selection and state_dict and state_dict != self._selection:
            raise CheckpointError(
                f"The checkpoint was trained with SparseUpdate's selection {state_dict}, and this"
                f" run has {self._selection}. Use the same arguments; to start another selection"
                " from its weights, use lightning_fastmoe.checkpoint.weights.load_weights."
            )

    def _frozen(self, module: nn.Module) -> tuple[set[int], nn.Module | None, dict[str, list[int]]]:
        """Ids of the frozen parameters, and the first trained block if there is a prefix.

        Then, by layers' names, the ids of the experts that are trained alone; empty for all or
        none.
        """
        named = list(module.named_parameters(remove_duplicate=False))
        experts = {id(p) for _, layer in expert_layers(module) for p in layer.experts.parameters()}
        if not experts:
            raise ConfigError("SparseUpdate found no MoE layer in the model: add one, or drop it.")
        frozen, blocks, start = self._prefix(module)
        first: Any = None
        if blocks is not None:
            first = module.get_submodule(f"{blocks}.{start}")
        wanted = self._wanted
        kept = experts if wanted == "all" else set()
        selected: dict[str, list[int]] = {}
        if not isinstance(wanted, str):
            counted = self._blocks(module) if self._by_index else None
            selected = resolve(module, wanted, counted, frozen)
        for name, layer in expert_layers(module):
            part = trained_of(layer.experts.holder)
            if part is not None and list(part.expert_ids) == selected.get(name):
                kept = kept | {id(p) for p in part.parameters()}
        for _, parameter in named:
            if not (id(parameter) in kept if id(parameter) in experts else self.dense):
                frozen.add(id(parameter))
        self._selection = {"blocks": blocks, "first_trained": start} | {
            "experts": selected or wanted,
            "dense": self.dense,
        }
        return frozen, first, selected

    @property
    def _wanted(self) -> Any:
        """``experts``, or what was chosen."""
        return self.experts if self._automatic is None else self._automatic.chosen

    def _prefix(self, module: nn.Module) -> tuple[set[int], str | None, int]:
        """Ids of the parameters before the first trained block, the blocks' name and its index."""
        if self.last_layers is None:
            return set(), None, 0
        named = list(module.named_parameters(remove_duplicate=False))
        blocks = self._blocks(module)
        block_list = module.get_submodule(blocks)
        assert isinstance(block_list, nn.ModuleList)
        start = len(block_list) - self.last_layers
        if start < 0:
            raise ConfigError(
                f"last_layers={self.last_layers} is more than the {len(block_list)} blocks of"
                f" {blocks!r}: choose at most {len(block_list)}."
            )
        border = self._border(named, f"{blocks}.", start)
        frozen = {id(p) for _, p in named[:border]}
        for name, parameter in named[border:]:
            if id(parameter) in frozen:
                raise ConfigError(
                    f"{name!r} is tied to a parameter of the frozen prefix, so it can be"
                    " neither trained nor frozen alone: untie it, or use last_layers=None."
                )
        return frozen, blocks, start

    @staticmethod
    def _border(named: list[tuple[str, nn.Parameter]], prefix: str, start: int) -> int:
        """The position of the first parameter of block ``start``, or after the blocks."""
        inside = [i for i, (name, _) in enumerate(named) if name.startswith(prefix)]
        for i in inside:
            if int(named[i][0][len(prefix) :].split(".", 1)[0]) >= start:
                return i
        return inside[-1] + 1

    def _blocks(self, module: nn.Module) -> str:
        if self.layers is not None:
            if not isinstance(dict(module.named_modules()).get(self.layers), nn.ModuleList):
                raise ConfigError(f"layers={self.layers!r} is not the name of a ModuleList.")
            if not any(n.startswith(f"{self.layers}.") for n, _ in expert_layers(module)):
                raise ConfigError(f"layers={self.layers!r} holds no MoE layer: name the blocks.")
            return self.layers
        lists = [n for n, m in module.named_modules() if isinstance(m, nn.ModuleList)]
        found: set[str] = set()
        for name, _ in expert_layers(module):
            found.add(next((n for n in lists if name.startswith(f"{n}.")), ""))
        if len(found) != 1 or found == {""}:
            raise ConfigError(
                "last_layers, and indices of blocks, need one ModuleList, and the MoE layers are in"
                f" {sorted(n or 'none' for n in found)}: name one by layers='...'."
            )
        return found.pop()

    def _refuse_moving(self, trainer: pl.Trainer, module: nn.Module, frozen: set[int]) -> None:
        """Refuses frozen modules whose buffers training changes."""
        for name, part in module.named_modules():
            own = list(part.parameters(recurse=False))
            is_frozen = bool(own) and all(id(p) in frozen for p in own)
            if is_frozen and isinstance(part, _BatchNorm) and part.track_running_stats:
                raise ConfigError(
                    f"{name!r} is frozen, but its running statistics would still change: use a"
                    " norm without statistics, or train its block."
                )
        callbacks: Any = trainer
        for callback in () if isinstance(self._wanted, str) else callbacks.callbacks:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ConfigError(
                    f"{type(callback).__name__} would average the experts that SparseUpdate trains,"
                    " but not their rows in the frozen stacks. Remove it, or train whole layers:"
                    " experts='all'."
                )
        if any(isinstance(c, RouterBiasBalancing) for c in callbacks.callbacks):
            for name, layer in moe_layers(module):
                router = layer.router
                biased = isinstance(router, Router) and router.load_since_update is not None
                if biased and any(id(p) in frozen for p in router.parameters()):
                    raise ConfigError(
                        f"RouterBiasBalancing would move the balance bias of {name!r}, whose router"
                        " is frozen: remove the callback, or train that router."
                    )

    def _end_check(self) -> None:
        if self._automatic is not None:
            self._automatic.end()
        if self._check is not None:
            self._check.remove()
            self._check = None


def _check_optimizers(trainer: pl.Trainer, module: nn.Module) -> None:
    """Refuses optimizers that were made before single experts became parameters of their own."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if f".{TRAINED}." in name and parameter.requires_grad and id(parameter) not in held:
            raise ConfigError(
                f"The optimizer doesn't have {name!r}, which SparseUpdate trains, so it would stay"
                " as it is: make the optimizer in configure_optimizers(), of all parameters."
            )


def _check_no_graph(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a graph in the frozen prefix: it would keep the activations that this saves."""
    if torch.compiler.is_compiling():
        return
    if any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
        raise ConfigError(
            "The input of SparseUpdate's first trained block requires gradients, so the frozen"
            " prefix keeps its activations. Register what is trained after the blocks, and don't"
            " call enable_input_require_grads(): use checkpoints with use_reentrant=False."
        )
