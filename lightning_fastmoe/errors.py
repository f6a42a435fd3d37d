"""All exceptions that the package raises on purpose.

Each message names the offending value, the rule that it breaks and how to fix it. All derive from
:class:`FastMoEError`, and each also from the built-in exception that callers would expect
(``ValueError``, ``RuntimeError``, ...), so that generic handlers keep working.
"""

from __future__ import annotations


class FastMoEError(Exception):
    """Base class of all errors raised by lightning_fastmoe."""


class ConfigError(FastMoEError, ValueError):
    """An argument or a combination of arguments is not supported."""


class ShapeError(FastMoEError, ValueError):
    """A tensor does not have the shape or dtype that the operation needs."""


class TopologyError(FastMoEError, ValueError):
    """Experts, ranks and groups do not fit together."""


class UnmanagedExpertsError(FastMoEError, RuntimeError):
    """Experts are sharded over ranks, but no strategy manages them."""


class ExchangeError(FastMoEError, RuntimeError):
    """An exchange of tokens failed, timed out, or the ranks disagree about it."""


class NonFiniteError(FastMoEError, FloatingPointError):
    """A router's logits contain NaN or Inf."""


class ParameterGroupError(FastMoEError, ValueError):
    """An optimizer's parameter groups would train a parameter wrongly."""


class ParameterEditError(FastMoEError, RuntimeError):
    """A parameter was changed during training in a way that would be lost."""


class CheckpointError(FastMoEError, RuntimeError):
    """A checkpoint can't be written, or doesn't fit the run that loads it."""


class DataError(FastMoEError, ValueError):
    """Data is missing, contradicts itself, or can't be divided over the ranks."""


class ForeignObjectError(FastMoEError, TypeError):
    """An object of another library was given where one of pytorch_lightning is needed."""


class KernelsUnavailableError(FastMoEError, RuntimeError):
    """The CUDA kernels can't be built or used."""


class MissingPackageError(FastMoEError, ImportError):
    """An optional dependency is needed and not installed."""
