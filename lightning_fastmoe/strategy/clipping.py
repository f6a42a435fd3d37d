"""Clips by the norm that is asked for at each step, as Lightning does without ZeRO.

DeepSpeed clips inside its step, by what its config has said once. Lightning's plugin therefore does
nothing where Lightning's loop, or a user, asks for clipping, and neither a value that has changed
since nor one of manual optimization would ever be used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning.strategies import DeepSpeedStrategy

from lightning_fastmoe.errors import ConfigError

_ASKED = "clip_gradients"
"""The plugin's method, called before each step by Lightning's loop, and by users."""


class Clipping:
    """How a strategy's steps clip gradients.

    Args:
        strategy: before its first use, when its config has what the user has written alone.
    """

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        config: Any = strategy.config
        self._strategy = strategy
        self._configured: float | None = config.get("gradient_clipping")

    def begin(self) -> Callable[[], None]:
        """Called before the first batch; returns the function that undoes it.

        Raises:
            ConfigError: if the user's DeepSpeed config and the Trainer have different norms.
        """
        module: Any = self._strategy.lightning_module
        engine: Any = self._strategy.deepspeed_engine
        of_trainer, otherwise = module.trainer.gradient_clip_val, self._configured or 0.0
        if None not in (of_trainer, self._configured) and of_trainer != self._configured:
            raise ConfigError(
                f"The DeepSpeed config sets gradient_clipping to {self._configured}, and the"
                f" Trainer gradient_clip_val={of_trainer}. Give one of the two."
            )
        engine.optimizer.clip_grad = otherwise  # where nobody asks, in manual optimization

        def clip_gradients(
            optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
        ) -> None:
            if clip_val and gradient_clip_algorithm != "norm":
                raise ConfigError(
                    "clip_gradients(gradient_clip_algorithm='value') is not supported: gradients"
                    " are partitioned over ranks and DeepSpeed clips by norm only."
                )
            if clip_val or engine.next_clip is None:  # the loop also asks where the user has
                engine.next_clip = float(clip_val) or otherwise

        plugin = self._strategy.precision_plugin
        plugin.__dict__[_ASKED] = clip_gradients

        def end() -> None:
            plugin.__dict__.pop(_ASKED, None)

        return end
