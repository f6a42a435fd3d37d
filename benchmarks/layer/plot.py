"""A picture of a run: step TFLOP/s of each peer in each configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layer.errors import BenchmarkError
from layer.registry import PEERS


def check_available() -> None:
    """Fails before a long run rather than after it.

    Raises:
        BenchmarkError: without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib, or leave"
            " --plot out."
        ) from error


def plot(report: dict[str, Any], path: Path) -> None:
    """Writes one panel per routing to ``path``; the format follows the file's ending."""
    check_available()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["status"] == "ok"]
    routings = list(dict.fromkeys(row["routing"] for row in report["rows"]))
    configs = list(dict.fromkeys(row["config"] for row in report["rows"]))
    peers = [name for name in PEERS if any(row["peer"] == name for row in rows)]
    figure, panels = pyplot.subplots(
        len(routings),
        1,
        figsize=(max(6.0, 1.3 * len(configs)), 3.6 * len(routings) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    width = 0.85 / max(1, len(peers))
    for panel, routing in zip(panels[:, 0], routings, strict=True):
        for place, peer in enumerate(peers):
            found = {
                row["config"]: row["step_tflops"]
                for row in rows
                if row["peer"] == peer and row["routing"] == routing
            }
            x = [configs.index(c) + (place - (len(peers) - 1) / 2) * width for c in found]
            panel.bar(x, list(found.values()), width, label=PEERS[peer].title)
        dense = report["dense_tflops"]
        panel.axhline(dense, color="gray", linestyle=":", label=f"dense product, {dense:.0f}")
        panel.set_xticks(range(len(configs)), configs, rotation=20, ha="right")
        panel.set_ylabel("TFLOP/s, forward and backward")
        panel.set_title(f"{report['machine']['device']}, {report['dtype']}, routing {routing}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
