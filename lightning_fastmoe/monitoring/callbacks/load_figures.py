"""Heat maps of expert loads: layer x expert now, and every expert over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.monitoring.logs.expert_load import Layer, Span, merged, ratios
from lightning_fastmoe.monitoring.report.colours import LIMIT, colour

COLUMNS = 160
"""Maximum columns of the map over time; in longer runs a column covers several steps."""


def check_matplotlib() -> None:
    """Raises:
    ConfigError: without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "figures_every_n_steps needs matplotlib: pip install 'lightning-fastmoe[plots]'. The"
            " logged numbers, expert_load.jsonl and `lightning-fastmoe report` don't need it."
        )


class LoadHistory:
    """Loads since the start of a run, in bounded memory."""

    def __init__(self, parts: Sequence[Span] = ()) -> None:
        self._spans = list(parts)
        self._thin()

    def add(self, span: Span) -> None:
        """Appends the loads since the last call."""
        self._spans.append(span)
        self._thin()

    def columns(self) -> list[Span]:
        """At most :data:`COLUMNS` spans."""
        return merged(self._spans, COLUMNS)

    @property
    def latest(self) -> Span:
        """The last span added, or the one that it was merged into."""
        return self._spans[-1]

    def _thin(self) -> None:
        if len(self._spans) > 8 * COLUMNS:
            self._spans = merged(self._spans, 4 * COLUMNS)


def load_pixels(
    rows: Sequence[Sequence[float | None] | None], widths: Sequence[int]
) -> list[list[tuple[int, int, int]]]:
    """Colours of load ratios; row i has ``widths[i]`` experts, and is padded with white."""
    width = max(widths)
    pixels = []
    for row, experts in zip(rows, widths, strict=True):
        known: Sequence[float | None] = row if row is not None else [None] * experts
        pixels.append([colour(x) for x in known] + [(255, 255, 255)] * (width - experts))
    return pixels


def draw_loads(layers: Sequence[Layer], latest: Span, columns: Sequence[Span]) -> Any:
    """Two heat maps: the latest loads, and all loads over time.

    Args:
        layers: the layers of the model.
        latest: the loads of the upper map, layer x expert.
        columns: the loads of the lower map, from left to right; its rows are all layers' experts.

    Returns:
        A ``matplotlib.figure.Figure`` that is not registered with pyplot.
    """
    from matplotlib.figure import Figure

    experts = [layer.num_experts for layer in layers]
    height = 2.4 + 0.22 * len(layers) + min(9.0, 0.05 * sum(experts) + 1.0)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    now, over_time = figure.subplots(
        2, 1, height_ratios=[1.0 + 0.22 * len(layers), min(9.0, 0.05 * sum(experts) + 1.0)]
    )
    now.imshow(
        load_pixels([ratios(row) for row in latest.routed], experts),
        aspect="auto",
        interpolation="nearest",
    )
    now.set_title(f"load ratio per expert, step {latest.last_step}", fontsize=10)
    now.set_xlabel("expert")
    now.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    rows = []
    for i, layer in enumerate(layers):
        by_column = [ratios(span.routed[i]) for span in columns]
        rows += [[r[e] if r is not None else None for r in by_column] for e in range(experts[i])]
        if layer is not layers[-1]:
            over_time.axhline(sum(experts[: i + 1]) - 0.5, color="black", linewidth=0.8)
    first, last = columns[0].first_step, columns[-1].last_step
    over_time.imshow(
        load_pixels(rows, [len(columns)] * len(rows)),
        aspect="auto",
        interpolation="nearest",
        extent=(first, max(last, first + 1), len(rows) - 0.5, -0.5),
    )
    middles = [sum(experts[:i]) + (n - 1) / 2 for i, n in enumerate(experts)]
    over_time.set_yticks(middles, [layer.name for layer in layers], fontsize=7)
    over_time.set_xlabel("step")
    over_time.set_title("every expert over time", fontsize=10)
    _add_scale(figure, [now, over_time])
    return figure


def _add_scale(figure: Any, axes: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = [LIMIT ** (i / 128 - 1) for i in range(257)]
    shades = ListedColormap([[part / 255 for part in colour(x)] for x in steps])
    bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), shades), ax=axes, shrink=0.6, aspect=40)
    marks = [1 / LIMIT, 0.5, 1, 2, LIMIT]
    bar.set_ticks([math.log(x) / math.log(LIMIT) for x in marks], labels=[f"{x:g}" for x in marks])
    bar.set_label("load / mean load (black: no token)", fontsize=8)


def publish(figure: Any, loggers: Sequence[Any], folder: Path | None, name: str, step: int) -> None:
    """Passes a figure to loggers that accept one, else writes ``folder/name/step_<step>.png``.

    Args:
        figure: from :func:`draw_loads`.
        loggers: Lightning's; TensorBoard's take figures by ``experiment.add_figure``, W&B's by
            ``log_image``.
        folder: the folder of the run; None writes no file.
        name: the figure's name, with slashes.
        step: the step number for the loggers.
    """
    taken = False
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[figure], step=step)
            taken = True
        elif hasattr(getattr(logger, "experiment", None), "add_figure"):
            logger.experiment.add_figure(name, figure, global_step=step, close=False)
            taken = True
    if not taken and folder is not None:
        file = folder / name / f"step_{step:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
