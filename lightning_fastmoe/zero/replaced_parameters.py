"""Refuses modules that ZeRO 3 can't train, because they replace parameters in each forward pass."""

from __future__ import annotations

from torch import nn

from lightning_fastmoe.errors import ConfigError

_WRAPPER = "ParamWrapper"
"""PEFT's class around the owner of a parameter that ``target_parameters`` names."""


def refuse_replaced_parameters(model: nn.Module) -> None:
    """Refuses PEFT's adapters of parameters, which stacked experts get by ``target_parameters``.

    PEFT (0.21) puts ``W + BA`` in the place of W while the owner runs, where ZeRO 3 looks for the
    parameter that it has partitioned.

    Raises:
        ConfigError: naming the first.
    """
    for name, module in model.named_modules():
        target = getattr(module, "parameter_name", None)
        if type(module).__name__ == _WRAPPER and isinstance(target, str):
            raise ConfigError(
                f"{name} adapts its parameter {target} by PEFT's target_parameters, which replaces"
                " it in each forward pass; ZeRO stage 3 has partitioned it. For experts leave"
                " target_parameters out and call lightning_fastmoe.huggingface.add_lora(model,"
                " rank, alpha) after get_peft_model, or use stage 2."
            )
