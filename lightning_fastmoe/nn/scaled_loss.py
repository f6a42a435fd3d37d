"""Whether Lightning scales the loss of a training step without telling the layers.

Under ``FastMoEStrategy`` layers know by which factor. Other strategies divide the loss after
``training_step`` has returned it, and a layer's losses join the backward pass undivided.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def hidden_scale() -> str | None:
    """How the loss of the training step that is running will be scaled; None if it won't be.

    Looks for the step among the callers, so it must be called from the forward pass.
    """
    lightning = sys.modules.get("pytorch_lightning")
    if lightning is None:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "training_step" and frame.f_code.co_argcount:
            # The strategy's, which calls the module's, whatever that is called where it is defined.
            owner: Any = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(owner, lightning.strategies.Strategy):
                owner = owner.lightning_module
            if isinstance(owner, lightning.LightningModule):
                return _scale_of(owner)
        frame = frame.f_back
    return None


def _scale_of(module: Any) -> str | None:
    trainer = module._trainer
    if trainer is None or _is_ours(trainer.strategy):
        return None
    if module.automatic_optimization and trainer.accumulate_grad_batches > 1:
        return f"divides the loss by accumulate_grad_batches={trainer.accumulate_grad_batches}"
    is_deepspeed = "DeepSpeed" in type(trainer.strategy).__name__
    if trainer.precision == "16-mixed" or (trainer.precision == "16-true" and is_deepspeed):
        return f"scales the loss for precision={trainer.precision!r}"
    return None


def _is_ours(strategy: Any) -> bool:
    """Whether it tells layers the factor; to import it here would import everything."""
    return any(base.__name__ == "FastMoEStrategy" for base in type(strategy).__mro__)
