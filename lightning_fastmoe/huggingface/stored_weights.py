"""What a checkpoint has of each weight of a model: itself, its form in 4 bits, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_fastmoe.checkpoint.format.reader import CheckpointReader
from lightning_fastmoe.checkpoint.format.tensor_names import repeats_rows, weight_name
from lightning_fastmoe.huggingface.nf4 import stored_stacks
from lightning_fastmoe.huggingface.peft_modules import stored_names
from lightning_fastmoe.nn.experts.lora import LORA_A, LORA_B


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a checkpoint, as if PEFT had not renamed any.

    Args:
        names: name of a weight -> its name in the checkpoint.
        shapes: name of a weight -> its shape.
        adapters: name of a weight -> the names of A and B in the checkpoint.
        packed: name of a weight in 4 bits -> the names of its tensors in the checkpoint. In
            ``names`` and ``shapes`` it is the first of them.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    adapters: Mapping[str, tuple[str, str]]
    packed: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, reader: CheckpointReader) -> StoredWeights:
        """The weights of a checkpoint, whose tensors aren't read."""
        start = weight_name("")
        found = {
            name.removeprefix(start): tuple(record.shape)
            for name, record in reader.manifest.tensors.items()
            if name.startswith(start) and not repeats_rows(name)
        }
        experts = {name for name in found if name.endswith((LORA_A, LORA_B))}
        packed = stored_stacks(found)
        parts = {part for tensors in packed.values() for part in tensors}
        names, adapters = stored_names(found.keys() - experts - parts)
        names |= {name: tensors[0] for name, tensors in packed.items()}
        for name in sorted(one.removesuffix(LORA_A) for one in experts if one.endswith(LORA_A)):
            adapters[name] = f"{name}{LORA_A}", f"{name}{LORA_B}"
        shapes = {name: found[there] for name, there in names.items()}
        return cls(names, shapes, adapters, packed)
