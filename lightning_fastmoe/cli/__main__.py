"""``python -m lightning_fastmoe.cli``."""

import sys

from lightning_fastmoe.cli import main

sys.exit(main())
