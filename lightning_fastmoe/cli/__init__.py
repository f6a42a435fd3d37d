"""The command ``lightning-fastmoe``. ``table`` says which commands there are, and what one is.

Before a command's arguments are checked nothing but the standard library is imported.
"""

from lightning_fastmoe.cli.entry import main

__all__ = ["main"]
