"""The command ``lightning-fastmoe``; its subcommands are listed in ``table``.

Only the standard library is imported before a command's arguments are checked.
"""

from lightning_fastmoe.cli.entry import main

__all__ = ["main"]
