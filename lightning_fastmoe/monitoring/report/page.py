"""Builds the report page: a verdict, the loads of every expert, and the run's curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lightning_fastmoe.monitoring.logs.co_activation import CoActivationLog
from lightning_fastmoe.monitoring.logs.expert_load import LoadLog, Record, merged, ratios, spans
from lightning_fastmoe.monitoring.report.co_activation import co_activation_map, strongest_pair
from lightning_fastmoe.monitoring.report.colours import LIMIT, hex_colour
from lightning_fastmoe.monitoring.report.logs import Run, Series, finite, matching
from lightning_fastmoe.monitoring.report.style import STYLE
from lightning_fastmoe.monitoring.report.svg import line_chart, load_grid, load_over_time
from lightning_fastmoe.monitoring.report.verdict import Verdict

COLUMNS = 160
"""Maximum columns of a map over time; in longer runs a column covers several log lines."""
MAPS = 8
"""Maximum number of layers whose co-activation is shown."""
LISTED = 12
"""Maximum number of starving experts listed next to the verdict's sentence."""

_LOSSES = {"train_loss": "train", "val_loss": "validation", "loss": "train"}
_SPEEDS = ("train/items_per_sec", "train/device/items_per_sec", "train/device/samples_per_sec")
_MFU = "train/device/mfu"


@dataclass(frozen=True)
class Panel:
    """A titled chart, or a note about what is missing and how to get it."""

    title: str
    caption: str
    chart: str = ""
    missing: str = ""


def build_page(run: Run, verdict: Verdict) -> str:
    """The page as one self-contained HTML string."""
    panels = curves(run)
    name = run.folder.resolve()
    facts = [f"{name.parent.name}/{name.name}", *_facts(run)]
    body = [
        f'<header class="verdict {verdict.state}"><p class="facts">',
        " &middot; ".join(escape(fact) for fact in facts),
        f"</p><h1>{escape(verdict.sentence)}</h1>{_starving_list(verdict)}</header>",
        _notes([*run.notes, *verdict.notes]),
        _loads(run.loads, verdict) if run.loads and run.loads.records else "",
        '<section><h2>The run</h2><div class="panels">',
        *(_panel(panel) for panel in panels),
        "</div></section>",
        _co_activation(run.co_activation) if run.co_activation else "",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(verdict.sentence)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _facts(run: Run) -> list[str]:
    # Lightning's ThroughputMonitor numbers validation batches, not steps.
    steps = [x[-1][0] for name, x in run.scalars.items() if not name.startswith("validate/")]
    if run.loads and run.loads.records:
        steps.append(run.loads.records[-1].step)
    facts = [f"step {max(steps):,}"] if steps else []
    if run.loads:
        kinds = sorted({layer.num_experts for layer in run.loads.layers})
        sizes = " or ".join(map(str, kinds))
        facts.append(f"{len(run.loads.layers)} MoE layers of {sizes} experts")
    return facts


def _starving_list(verdict: Verdict) -> str:
    if not verdict.starving:
        return ""
    items = [
        f'<li><i style="background:{hex_colour(x.ratio)}"></i>{escape(str(x))}'
        f"<b>{'dead' if x.dead else f'{x.ratio:.2f}'}</b></li>"
        for x in verdict.starving[:LISTED]
    ]
    rest = len(verdict.starving) - LISTED
    if rest > 0:
        items.append(f"<li>and {rest} more</li>")
    return f'<ul class="starving">{"".join(items)}</ul>'


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul>'


def _loads(log: LoadLog, verdict: Verdict) -> str:
    recent = verdict.recent
    assert recent is not None
    marked = {(x.layer, x.expert) for x in verdict.starving}
    rows = [
        (f"layer {i}", layer.name, ratios(recent.routed[i])) for i, layer in enumerate(log.layers)
    ]
    grid = load_grid(rows, marked, title="load ratio of each expert of each layer")
    when = (
        f"step {recent.last_step:,}"
        if recent.first_step == recent.last_step
        else f"steps {recent.first_step:,} to {recent.last_step:,}"
    )
    columns = merged(spans(log.records), COLUMNS)
    maps = []
    for i, layer in enumerate(log.layers):
        by_column = [ratios(span.routed[i]) for span in columns]
        over_time = [
            [None if row is None else row[e] for row in by_column] for e in range(layer.num_experts)
        ]
        chart = load_over_time(
            over_time,
            (columns[0].first_step, columns[-1].last_step),
            sorted(e for at, e in marked if at == i),
            title=f"loads of layer {i} over time",
        )
        maps.append(_panel(Panel(f"Layer {i}", layer.name, chart)))
    return (
        f"<section><h2>Load of every expert now</h2>{_scale()}"
        f'<p class="caption">Load over the mean load of the layer, {when}. Starving experts are'
        f' framed in red.</p><div class="wide">{grid}</div></section>'
        '<section><h2>Load of every expert over time</h2><p class="caption">One row per expert, the'
        " same colours; a red mark at the right: starving now.</p>"
        f'<div class="panels" style="--n:{4 if len(maps) == 4 else min(3, len(maps))}">'
        f"{''.join(maps)}</div></section>"
    )


def _co_activation(log: CoActivationLog) -> str:
    """The layers with the strongest pairs; nothing if each token goes to one expert."""
    found = []
    for i, layer in enumerate(log.layers):
        if (pair := strongest_pair(layer.together)) is not None:
            found.append((pair, i, layer))
    if not found:
        return ""
    found.sort(key=lambda x: (-x[0].share, x[1]))
    shown = sorted(found[:MAPS], key=lambda x: x[1])
    panels = [
        _panel(
            Panel(
                f"Layer {i}",
                str(pair),
                co_activation_map(layer.together, title=f"co-activation in layer {i}"),
            )
        )
        for pair, i, layer in shown
    ]
    rest = len(found) - len(shown)
    also = f" The {rest} other layers have no stronger pair." if rest else ""
    return (
        "<section><h2>Experts chosen together</h2>"
        f'<p class="caption">Row i, column j: the share of expert i&rsquo;s tokens that also chose'
        f" j, steps {log.first_step:,} to {log.last_step:,}. White: none; dark blue: all, the two"
        f" act as one.{also}</p>"
        f'<div class="panels" style="--n:4">{"".join(panels)}</div></section>'
    )


def _scale() -> str:
    steps = [LIMIT ** (i / 12 - 1) for i in range(25)]
    cells = "".join(f'<i style="background:{hex_colour(x)}"></i>' for x in steps)
    return (
        f'<div class="scale"><span class="dead">dead</span><span>&le; {1 / LIMIT:g}&times;</span>'
        f'<span class="ramp">{cells}</span><span>&ge; {LIMIT:g}&times;</span>'
        "<em>white: 1&times;, balanced</em></div>"
    )


def _panel(panel: Panel) -> str:
    inner = panel.chart or f'<p class="missing">{escape(panel.missing)}</p>'
    return (
        f"<figure><figcaption>{escape(panel.title)}<small>{escape(panel.caption)}</small>"
        f"</figcaption>{inner}</figure>"
    )


def curves(run: Run) -> list[Panel]:
    """The charts over steps, in the order of the page."""
    return [_loss(run), _speed(run), *_of_layers(run)]


def _loss(run: Run) -> Panel:
    found = matching(run.scalars, _LOSSES)
    lines = {_LOSSES[name]: x for name, series in found.items() if (x := finite(series))}
    lost = sum(len(series) for series in found.values()) - sum(map(len, lines.values()))
    caption = "training and validation" if not lost else f"{lost} values are NaN or infinite"
    if not lines:
        names = ", ".join(_LOSSES)
        return Panel("Loss", "", missing=f"No loss was logged under any of these names: {names}.")
    return Panel("Loss", caption, line_chart(lines, title="loss"))


def _speed(run: Run) -> Panel:
    for name in _SPEEDS:
        if name in run.scalars and (series := finite(run.scalars[name])):
            what = "samples/s" if "samples" in name else "tokens/s"
            caption = f"{what}, {'per rank' if 'device' in name else 'all ranks'}"
            if mfu := finite(run.scalars.get(_MFU, [])):
                caption += f"; {mfu[-1][1]:.1%} of the device's peak at the end"
            return Panel("Throughput", caption, line_chart({what: series}, title=what, zero=True))
    return Panel(
        "Throughput",
        "",
        missing="No throughput was logged: add lightning_fastmoe.ThroughputMonitor to the run.",
    )


def _of_layers(run: Run) -> list[Panel]:
    log = run.loads
    if log is None or not log.records:
        what = ("Dead experts", "Drop rate", "Router entropy")
        why = "Not logged: add lightning_fastmoe.ExpertLoadMonitor to the run."
        return [Panel(name, "", missing=why) for name in what]
    dead = [(r.step, float(sum(row.count(0) for row in r.routed if row))) for r in log.records]
    return [
        Panel("Dead experts", "no token since the previous log", _one(dead, "dead experts", True)),
        _drops(log),
        Panel("Router entropy", "nats per token, lowest and highest layer", _range(log)),
    ]


def _one(series: Series, title: str, zero: bool) -> str:
    return line_chart({title: series}, title=title, zero=zero)


def _drops(log: LoadLog) -> Panel:
    if not any(row is not None for record in log.records for row in record.kept):
        return Panel(
            "Drop rate", "", missing="No token was dropped: every layer had room for all of them."
        )
    series = [(record.step, _dropped(record)) for record in log.records]
    chart = line_chart({"dropped": series}, title="drop rate", zero=True, percent=True)
    return Panel("Drop rate", "dropped (token, expert) pairs, all layers", chart)


def _dropped(record: Record) -> float:
    routed = kept = 0
    for all_of, some in zip(record.routed, record.kept, strict=True):
        if all_of is not None:
            routed += sum(all_of)
            kept += sum(all_of if some is None else some)
    return 1.0 - kept / routed if routed else 0.0


def _range(log: LoadLog) -> str:
    by_layer = {
        f"layer {i}": points
        for i in range(len(log.layers))
        if (points := [(r.step, x) for r in log.records if (x := r.entropy[i]) is not None])
    }
    ranked = sorted(by_layer, key=lambda name: sum(v for _, v in by_layer[name]))
    lines = {name: by_layer[name] for name in dict.fromkeys([*ranked[:1], *ranked[-1:]])}
    return line_chart(lines, title="router entropy", zero=True) if lines else ""
