"""Host memory that is available to this process."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_fastmoe.errors import ConfigError


def available(root: Path = Path("/")) -> int:
    """Bytes of this host that are free or hold caches, within the limit of its container.

    Args:
        root: of the file system, for tests.

    Raises:
        ConfigError: if the system doesn't say.
    """
    found = _find(r"MemAvailable:\s+(\d+) kB", root / "proc/meminfo")
    if found is None:
        raise ConfigError("The available host memory is unknown here: pass --host-memory.")
    group = root / "sys/fs/cgroup"  # version 2; a container sees its own group there
    limit = _find(r"^(\d+)$", group / "memory.max")
    used = _find(r"^(\d+)$", group / "memory.current")
    if limit is None or used is None:
        return 1024 * found
    cached = _find(r"^inactive_file (\d+)$", group / "memory.stat") or 0
    return min(1024 * found, limit - used + cached)


def _find(pattern: str, path: Path) -> int | None:
    try:
        found = re.search(pattern, path.read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])
