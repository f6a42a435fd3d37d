"""The rows of a run as Markdown."""

from __future__ import annotations

from typing import Any

from layer.configs import CONFIGS
from layer.registry import PEERS

BASELINES = {False: "torch", True: "torch-router"}
"""What a peer without a router of its own is compared with, and what one with a router."""

HEADER = (
    "peer",
    "forward TFLOP/s",
    "step TFLOP/s",
    "% of dense",
    "step ms [quartiles]",
    f"step vs {PEERS[BASELINES[False]].title}",
    "peak GiB over rest",
    "kernels",
    "host syncs",
    "cold ms",
    "error",
)


def markdown(report: dict[str, Any]) -> str:
    """All tables of ``report``, one per configuration and routing, and the foot."""
    lines: list[str] = []
    rows = report["rows"]
    for config, routing in dict.fromkeys((r["config"], r["routing"]) for r in rows):
        group = [r for r in rows if (r["config"], r["routing"]) == (config, routing)]
        lines += [*_table(config, routing, group, report["sizes"].get(config)), ""]
    return "\n".join([*lines, *foot(report), ""])


def _table(
    config: str, routing: str, rows: list[dict[str, Any]], sizes: dict[str, Any] | None
) -> list[str]:
    lines = [f"### {config}, {routing}", ""]
    if sizes:
        load = next((r["load_ratio"] for r in rows if "load_ratio" in r), None)
        names = ("tokens", "d_model", "d_ffn", "num_experts", "top_k")
        text = "T {}, D {}, F {}, E {}, K {}".format(*(sizes[n] for n in names))
        text += f", {sizes['activation']}"
        lines += [text + (f"; fullest expert {load:.2f} times the mean." if load else "."), ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    return lines + [_line(row, _base_of(row, rows)) for row in rows]


def _base_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    name = BASELINES[PEERS[row["peer"]].with_router]
    return next((r for r in rows if r["peer"] == name and r["status"] == "ok"), None)


def _line(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    title = PEERS[row["peer"]].title
    if row["status"] != "ok":
        return f"| {title} | {row['status']}: {row['reason']}" + " |" * (len(HEADER) - 1)
    ms = row["step_ms"]
    cells = [
        title,
        f"{row['forward_tflops']:.3g}",
        f"{row['step_tflops']:.3g}",
        f"{row['percent_of_dense']:.0f}",
        f"{ms['median']:.3g} [{ms['q1']:.3g}, {ms['q3']:.3g}]",
        f"{row['step_tflops'] / base['step_tflops']:.2f}x" if base else "-",
        _number(row["peak_gib"], ".2f"),
        _number(row["kernels"], "d"),
        _number(row["host_syncs"], "d"),
        _number(row["cold_ms"], ".0f"),
        f"{row['max_error']:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def foot(report: dict[str, Any]) -> list[str]:
    """Versions and what each peer is."""
    machine = report["machine"]
    first = f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}"
    lines = [
        f"{first}, driver {machine['driver']}, {report['dtype']}; dense product of"
        f" {machine['dense_rows']} rows {_number(report['dense_tflops'], '.0f')} TFLOP/s, copy"
        f" {_number(report['copy_gbs'], '.0f')} GB/s (medians of the same run).",
        "",
    ]
    for name, about in report["peers"].items():
        peer = PEERS[name]
        what = about["reason"] or f"{peer.package or 'torch'} {about['version']}"
        lines.append(f"- {peer.title}: {what}. {peer.note}.")
    return lines


def sizes_of(names: list[str], tiny: bool) -> dict[str, dict[str, Any]]:
    """The sizes of configurations, for the report."""
    configs = [CONFIGS[n].tiny() if tiny else CONFIGS[n] for n in names]
    fields = ("tokens", "d_model", "d_ffn", "num_experts", "top_k", "activation", "source")
    return {c.name: {field: getattr(c, field) for field in fields} for c in configs}
