"""What the reference shows: modules, whose public names it takes, and commands."""

from __future__ import annotations

MODULES = {
    "lightning_fastmoe": "What users import",
    "lightning_fastmoe.nn": "Layers",
    "lightning_fastmoe.nn.router": "Routers and their losses",
    "lightning_fastmoe.callbacks": "Callbacks",
    "lightning_fastmoe.metrics": "Metrics",
    "lightning_fastmoe.huggingface": "Models of Hugging Face",
    "lightning_fastmoe.demos.byte_lm": "The example model",
    "lightning_fastmoe.demos.token_lm": "Pretraining on text",
    "lightning_fastmoe.demos.transformer_xl": "Transformer-XL",
    "lightning_fastmoe.demos.vision": "Image classification",
    "lightning_fastmoe.inference": "Experts in host memory",
    "lightning_fastmoe.checkpoint": "Reading checkpoints",
    "lightning_fastmoe.checkpoint.weights": "Weights from a checkpoint",
    "lightning_fastmoe.ops": "Operators on one device",
    "lightning_fastmoe.distributed": "Ranks and dispatch",
    "lightning_fastmoe.testing": "Tests on several ranks",
    "lightning_fastmoe.testing.schedules": "The contract of schedules",
    "lightning_fastmoe.errors": "Errors",
}
"""module -> heading of its page. A name that several export is shown where it comes first."""

FIRST = ("MoE", "FastMoEStrategy", "Router", "Routing")
"""Names that come before the others of their module."""

COMMANDS = (
    "",
    "env",
    "build",
    "report",
    "checkpoint",
    "checkpoint inspect",
    "checkpoint verify",
    "checkpoint diff",
    "checkpoint reshard",
    "checkpoint consolidate",
    "checkpoint export",
    "checkpoint import",
    "tokenize",
    "plan",
)
"""The commands of ``lightning-fastmoe`` whose help is shown. Those of LightningCLI print pages."""
