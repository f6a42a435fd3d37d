"""Ratios that README.md and the first table of docs/benchmarks.md give follow from its tables."""

from __future__ import annotations

import re

from figures.tables import DOCS, table
from strategy.exactness import RELATIVE, cases

PAGE = DOCS / "benchmarks.md"
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
Row = dict[str, str]


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", cell)]


def ratios(rows: list[Row], above: str, below: str, part: int = -1) -> list[float]:
    return [numbers(row[above])[part] / numbers(row[below])[part] for row in rows]


def pairs(rows: list[Row], column: str) -> list[float]:
    """The first of a cell's two numbers over the second."""
    return [first / second for first, second in (numbers(row[column])[:2] for row in rows)]


def span(values: list[float]) -> tuple[str, str]:
    return f"{min(values):.2f}", f"{max(values):.2f}"


def beside(column: str, own: str, other: str) -> list[float]:
    """``own`` over ``other`` in a table with one line for each system, over both sizes."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| ranks |"))
    at = [cell.strip() for cell in header.split("|")].index(column)
    cells = [[c.strip() for c in line.split("|")] for line in lines]
    mine = [float(c[at]) for c in cells if len(c) > at and c[2] == own]
    theirs = [float(c[at]) for c in cells if len(c) > at and c[2] == other]
    return [a / b for a, b in zip(mine, theirs, strict=True)]


PEERS = table(PAGE, "ours", "SonicMoE", "plain torch", "ours to SonicMoE")
LAYER = table(PAGE, "T, D, F, E, K", "against plain torch")
MEMORY = "peak GiB over rest: ours, "
ENERGY = table(PAGE, "J per step")
TRAINING = table(PAGE, "tokens/s", "median step")
STEPS = {row["gpu_lm"]: float(row["tokens/s"].replace(",", "")) for row in table(PAGE, "gpu_lm")}
JOULES = {row[""]: numbers(row["J per step"])[0] for row in ENERGY}

TOKENS = [float(row["tokens/s"].replace(",", "")) for row in TRAINING]

ROUTED = table(PAGE, "ms per step with the router", "`ours-module`")
FASTER_SONIC = [
    min(numbers(row[f"`sonicmoe-{peer}`"])[0] for peer in ("router", "topk"))
    / numbers(row["`ours-module`"])[0]
    for row in ROUTED
]
SONIC = span(ratios(PEERS, "ours", "SonicMoE"))
TORCH = span([numbers(row["against plain torch"])[0] for row in LAYER])
TORCH_MEMORY = span(pairs(LAYER, MEMORY + "plain torch"))
TRAINER = f"{TOKENS[1] / TOKENS[0]:.2f}"
WHOLE = {
    peer: f"{STEPS['`FastMoEStrategy`, compiled'] / STEPS[peer]:.2f}"
    for peer in ("transformers", "transformers, compiled", "plain loop, compiled")
}
WIDE = {
    row["OLMoE-like, and its loss"]: numbers(row["ms per step"])[0]
    for row in table(PAGE, "OLMoE-like, and its loss")
}
OLMOE = {
    peer: f"{ms / WIDE['`FastMoEStrategy`, compiled, loss in chunks']:.2f}"
    for peer, ms in WIDE.items()
}
BESIDE = {
    row[name]: float(row["tokens/s"].replace(",", ""))
    for name in ("gpu_lm, beside SonicMoE and Liger", "Qwen3-30B-A3B's sizes cut to 8 layers")
    for row in table(PAGE, name, "tokens/s")
}
IN_PLACE, *OTHER_EXPERTS = (
    f'`"{name}"`, Liger\'s loss' for name in ("fastmoe", "grouped_mm", "sonicmoe")
)
OURS = {name: joules for name, joules in JOULES.items() if name.endswith("ours")}
SHARDED = table(PAGE, "T per rank", "one GPU", '`"dedup"`', '`"symmetric"`')
IN_GRAPH = {
    row["gpu_lm, one call"]: float(row["tokens/s"].replace(",", ""))
    for row in table(PAGE, "gpu_lm, one call")
}
BEST = IN_GRAPH["`FastMoEStrategy`, layers in the graph"]
BY_SIZE = {
    row["ms per step on two GPUs"]: row["layers in the graph"]
    for row in table(PAGE, "ms per step on two GPUs")
}
EXPERTS = [
    numbers(BY_SIZE[one])[-1] / numbers(BY_SIZE[f'{shape}, size 2, `"symmetric"`'])[-1]
    for shape, one in (
        ("gpu_lm", "gpu_lm, expert parallel size 1 (data parallel)"),
        ("OLMoE-like", "OLMoE-like, size 1"),
    )
]
SCORING = table(PAGE, "tokens per pass", "resident: ms")


def fastest(column: str) -> float:
    """Tokens per second at the best number of tokens."""
    cells = [(row["tokens per pass"], row[column]) for row in SCORING if row[column]]
    rates = (float(n.replace(",", "")) / float(ms.replace(",", "")) for n, ms in cells)
    return 1000 * max(rates)


GENERATING = table(PAGE, "sequences", "offloaded: ms per step, tokens/s, GB")
GENERATED = {
    system: [
        numbers(row[f"{system}: ms per step, tokens/s, GB"])[1]
        for row in GENERATING
        if numbers(row[f"{system}: ms per step, tokens/s, GB"]) and row["sequences"].isdigit()
    ]
    for system in ("offloaded", "ZeRO-Inference")
}
CLAIMS = [
    [*SONIC, *span(pairs(PEERS, MEMORY + "SonicMoE"))],
    [*span(FASTER_SONIC), *span(pairs(ROUTED, MEMORY + "SonicMoE"))],
    [*TORCH, *TORCH_MEMORY],
    [*span([joules / JOULES[n.replace("ours", "plain torch")] for n, joules in OURS.items()])],
    [TRAINER],
    [WHOLE["transformers"], WHOLE["transformers, compiled"]],
    [WHOLE["plain loop, compiled"]],
    [
        f"{BEST / IN_GRAPH[peer]:.2f}"
        for peer in ("transformers, compiled", "plain loop, compiled with breaks")
    ],
    [
        f"{BESIDE['`FastMoEStrategy`, compiled'] / BESIDE[peer]:.2f}"
        for peer in ("transformers, `sonicmoe`", "transformers, `sonicmoe`, compiled")
    ],
    [OLMOE["transformers"], OLMOE["transformers, compiled"]],
    [f"{BESIDE[IN_PLACE] / BESIDE[peer]:.2f}" for peer in OTHER_EXPERTS],
    [*span(beside("durable, s", "this package", "DeepSpeed"))],
    [*span(beside("load, s", "this package", "DeepSpeed"))],
    [*span(ratios(SHARDED, "one GPU", '`"symmetric"`', part=0))],
    [*span(ratios(SHARDED, '`"dedup"`', '`"symmetric"`', part=0))],
    [f"{ratio:.2f}" for ratio in EXPERTS],
    [
        f"{fastest('offloaded: ms') / fastest(f'{p}: ms'):.2f}"
        for p in ("Accelerate", "ZeRO-Inference")
    ],
    [f"{max(GENERATED['offloaded']) / max(GENERATED['ZeRO-Inference']):.2f}"],
]
"""What each line of the first table must say, in its order."""


def test_first_table_follows_from_the_others() -> None:
    assert (len(PEERS), len(ROUTED), len(LAYER), len(OURS)) == (5, 3, 12, 4)
    assert (len(TOKENS), len(SHARDED)) == (2, 6)
    first = [row["ratio"] for row in table(PAGE, "what", "compared with", "ratio", "on")]
    assert [re.findall(r"\d\.\d\d", ratio) for ratio in first] == CLAIMS


def test_readme_says_the_same() -> None:
    text = README[: README.index("## Use it")]
    said = re.findall(r"\*\*(\d\.\d\d)x?(?: to (\d\.\d\d)x?)?\*\*", text)
    whole = [(WHOLE[peer], "") for peer in ("transformers", "transformers, compiled")]
    assert said == [SONIC, TORCH, TORCH_MEMORY, *whole]


def test_readme_counts_the_cases_of_exactness() -> None:
    assert f"{len(cases())} combinations" in README
    assert f"within {RELATIVE:.0e} of".replace("e-06", "e-6") in README


def test_kernels_page_has_the_floors_of_the_benchmarks() -> None:
    sizes = ["sonic-7b", "olmoe-1b-7b", "fastmoe-64", "switch-8"]
    times = {row[""]: row for row in table(PAGE, *sizes)}
    lines = ["up, activation", "down", "d_act with its activation; d_down", "d_up, d_rows"]
    measured = [[times[line][size].split(",")[1].strip(" x") for size in sizes] for line in lines]
    shown = [[row[size] for size in sizes] for row in table(DOCS / "kernels.md", *sizes)]
    assert shown == measured


def test_offload_page_has_the_ratios_of_the_benchmarks() -> None:
    shown = {row["measured"] for row in table(DOCS / "offload.md", "measured")}
    scoring, generating = CLAIMS[-2:]
    assert {f"{ratio}x" for ratio in (*scoring, *generating)} <= shown
    by_size = {row["tokens per pass"]: row for row in SCORING}
    few = [by_size[n]["of the link's rate"] for n in ("8,192", "32,768")]
    assert {by_size["65,536"]["of resident"], ", ".join(few)} <= shown
