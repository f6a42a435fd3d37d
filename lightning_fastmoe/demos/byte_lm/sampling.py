"""Samples text from a trained language model at the end of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_fastmoe.errors import ConfigError


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: bytes,
    num_bytes: int,
    *,
    context: int = 128,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> bytes:
    """Continues a prompt, byte by byte.

    With experts sharded over ranks, every rank must call this with the same arguments: each byte
    takes one forward pass, and each forward pass exchanges tokens with the other ranks. Random
    numbers come from a separate generator, so they are identical on all ranks and don't affect
    training.

    Args:
        model: maps bytes (1, context) to logits (1, context, 256).
        prompt: at least one byte.
        num_bytes: number of bytes to add.
        context: bytes that the model sees at a time. All passes have this shape: the end is padded
            with zeros, which a causal model ignores.
        temperature: below 1, likely bytes get even likelier.
        seed: the random seed.
        device: the model's device.

    Returns:
        Only the new bytes.

    Raises:
        ConfigError: if the prompt is empty, or the temperature isn't positive.
    """
    if not prompt:
        raise ConfigError("prompt is empty; the model needs at least one byte to start from.")
    if not temperature > 0.0:
        raise ConfigError(f"temperature is {temperature}; it must be greater than 0.")
    # On the CPU, where a seed gives the same numbers on every machine.
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(num_bytes):
        seen = text[-context:]
        window = torch.zeros(1, context, dtype=torch.uint8)
        window[0, : len(seen)] = torch.frombuffer(seen, dtype=torch.uint8)
        logits = model(window.to(device))[0, len(seen) - 1]
        chances = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(text[len(prompt) :])


class SampleText(Callback):
    """Prints the model's continuation of a prompt when training ends.

    Args:
        prompt: the text to continue.
        num_bytes: length of the continuation.
        context: bytes that the model sees at a time; at most the `seq_len` that it was trained on.
        temperature: below 1, likely bytes get even likelier.
        seed: the random seed.
    """

    def __init__(
        self,
        prompt: str = "def ",
        num_bytes: int = 300,
        context: int = 128,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.prompt = prompt
        self.num_bytes = num_bytes
        self.context = context
        self.temperature = temperature
        self.seed = seed

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: LightningModule) -> None:
        # Not on_fit_end: by then the strategy has disconnected the experts.
        was_training = pl_module.training
        pl_module.eval()
        # All ranks take part, rank 0 prints. The module is called directly, not through the
        # DeepSpeed engine: the hooks that gather ZeRO-3 parameters are on its submodules.
        # A compiled model runs eagerly: compiling for this shape takes longer.
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            continuation = generate(
                pl_module,
                self.prompt.encode(),
                self.num_bytes,
                context=self.context,
                temperature=self.temperature,
                seed=self.seed,
                device=pl_module.device,
            )
        pl_module.train(was_training)
        if trainer.is_global_zero:
            text = self.prompt + continuation.decode(errors="replace").replace("\0", "")
            # Not through the progress bar, which may already be closed.
            print(f"\nSample (temperature {self.temperature}):\n{text}\n", flush=True)
