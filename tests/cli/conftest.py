"""The pretended machine for the tests of this folder."""

from ops.toolkit import machine  # noqa: F401
