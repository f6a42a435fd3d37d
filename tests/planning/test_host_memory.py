"""Available host memory, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.planning.host_memory import available


def test_available(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown here: pass --host-memory"):
        available(tmp_path)
    group = tmp_path / "sys/fs/cgroup"
    for folder in (tmp_path / "proc", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    700 kB\n")
    assert available(tmp_path) == 700 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("400000\n")
    assert available(tmp_path) == 700 * 1024
    (group / "memory.max").write_text("500000\n")
    assert available(tmp_path) == 100_000
    (group / "memory.stat").write_text("anon 5\ninactive_file 30000\nactive_file 7\n")
    assert available(tmp_path) == 130_000
