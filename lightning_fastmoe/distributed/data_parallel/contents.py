"""Which parameters, buffers and names of a model belong to sharded experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.expert_layers import ExpertLayer


@dataclass(frozen=True)
class Item:
    """A parameter or buffer of the model, once whatever its names.

    Attributes:
        name: its first name, identical on every rank that has it.
        tensor: the parameter or buffer.
        is_expert: whether only the ranks of an expert data parallel group have it.
    """

    name: str
    tensor: Tensor
    is_expert: bool


class Contents:
    """The parameters and buffers of a model whose experts are sharded.

    Args:
        model: the model, after sharding.
        layers: name -> MoE layer, of all its MoE layers.

    Attributes:
        parameters: in the model's order.
        buffers: in the model's order, those that aren't persistent included.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, ExpertLayer]) -> None:
        self.model = model
        # Of each layer the modules with its experts, which has them under any of the layer's names.
        self._owners = {
            id(module): layer
            for layer in layers.values()
            if layer.is_sharded
            for module in layer.experts.modules()
        }
        experts = {
            id(tensor)
            for layer in layers.values()
            if layer.is_sharded
            for tensor in (*layer.experts.parameters(), *layer.experts.buffers())
        }
        self._paths = {
            path: self._owners[id(module)]
            for path, module in model.named_modules(remove_duplicate=False)
            if id(module) in self._owners
        }
        self.parameters, self.buffers = (
            [Item(name, tensor, id(tensor) in experts) for name, tensor in named]
            for named in (model.named_parameters(), model.named_buffers())
        )

    def expert_layer(self, name: str) -> ExpertLayer | None:
        """The layer to whose sharded experts a name of the state dict belongs, if to any."""
        return self._paths.get(name.rpartition(".")[0])

    def new_parameters(self) -> Iterator[str]:
        """Names of trainable parameters that the model didn't have when it was wrapped."""
        known = {id(item.tensor) for item in self.parameters}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                yield name


def check_contents(model: nn.Module, sharded: Mapping[str, ExpertLayer]) -> None:
    """Refuses a model that can't be trained here.

    Args:
        model: the model.
        sharded: name -> MoE layer, of those whose experts are sharded, or will be.

    Raises:
        ConfigError: naming a parameter or a module.
    """
    inside = {id(module) for layer in sharded.values() for module in layer.experts.modules()}
    parameters = {id(p) for layer in sharded.values() for p in layer.experts.parameters()}
    for path, module in model.named_modules():
        if id(module) in inside:
            if isinstance(module, MoE):
                raise ConfigError(
                    f"{path} is a MoE layer inside a sharded expert, which exists only on the"
                    " ranks of that expert, so not every rank would join its exchanges. Keep"
                    " all experts of the outer layer on each rank: MoE(dispatcher='local')."
                )
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in parameters:
                raise ConfigError(
                    f"{path}.{name} is also a parameter of sharded experts, so ranks would"
                    " train different copies of it. Give the experts parameters of their own,"
                    " or keep them on each rank with MoE(dispatcher='local')."
                )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"{name} is a DTensor, which fully_shard() or tensor parallelism makes."
                " ExpertDataParallel keeps dense parameters whole on each rank: wrap the model"
                " without them, or use FastMoEStrategy(stage=3), which partitions them."
            )
