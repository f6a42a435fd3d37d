"""What a worker of a pool needs, imported; nothing here may start a thread (see ranks.py)."""

from __future__ import annotations

import gc

import deepspeed  # noqa: F401
import pytorch_lightning  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401  which the first engine would import

import lightning_fastmoe  # noqa: F401
import lightning_fastmoe.strategy  # noqa: F401

# Copies then share the memory of these objects: no collection touches them any more.
gc.freeze()
