"""The pictures in docs/figures are what their code draws, and stay within their pages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest
from figures import architecture
from figures.__main__ import FIGURES, FOLDER
from figures.tables import DOCS, last_number, table

ROOT = DOCS.parent
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", FIGURES)
def test_committed_picture_is_what_is_drawn(name: str) -> None:
    drawn = FIGURES[name]().svg()
    assert (FOLDER / name).read_text(encoding="utf-8") == drawn, "stale: run `make figures`"


def test_no_other_picture_is_committed() -> None:
    assert {file.name for file in DOCS.rglob("*.svg")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_picture_is_small_and_readable_on_both_backgrounds(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text) < 16_000
    root = ET.fromstring(text)  # noqa: S314 - our own file
    style = root.findtext(f"{SVG}style") or ""
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    used = {c for shape in root.iter() for c in shape.get("class", "").split()}
    coloured = set(re.findall(r"\.(\w+)\{(?:fill|stroke)", light))
    assert used & coloured <= set(re.findall(r"\.(\w+)\{", dark))
    assert used <= set(re.findall(r"\.(\w+)\{", style))


def extents(root: ET.Element) -> Iterator[tuple[float, float]]:
    """Left and right ends of every text, taking 0.62 of its size for a character."""
    for text in root.iter(f"{SVG}text"):
        styles = text.get("class", "").split()
        width = 0.62 * (11 if "small" in styles else 13) * len(text.text or "")
        x = float(text.get("x", "nan"))
        x -= width / 2 if "mid" in styles else width if "end" in styles else 0
        yield x, x + width


@pytest.mark.parametrize("name", FIGURES)
def test_text_stays_on_the_page(name: str) -> None:
    root = ET.fromstring(FIGURES[name]().svg())  # noqa: S314 - our own text
    for left, right in extents(root):
        assert left > 0
        assert right < float(root.get("width", "nan"))


def test_every_picture_is_shown() -> None:
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    shown = " ".join(page.read_text(encoding="utf-8") for page in pages)
    assert all(f"figures/{name})" in shown for name in FIGURES)


def test_bars_have_the_numbers_of_the_table() -> None:
    rows = table(DOCS / "benchmarks.md", "ours", "SonicMoE", "plain torch", "ours to SonicMoE")
    drawn = re.findall(r">(\d+)</text>", FIGURES["speed.svg"]().svg())
    for row in rows:
        for column in ("ours", "SonicMoE", "plain torch"):
            value = last_number(row[column])
            assert value is not None
            assert f"{value:.0f}" in drawn


def test_levels_put_each_component_above_what_it_imports() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}
    assert architecture.levels(graph) == [["c", "d"], ["b"], ["a"]]
    assert architecture.direct(graph) == {"a": {"b"}, "b": {"c"}, "c": set(), "d": set()}


def test_architecture_knows_every_component() -> None:
    graph = architecture.imports()
    parts = {p.stem for p in architecture.SOURCE.iterdir() if p.suffix == ".py"}
    parts |= {p.parent.name for p in architecture.SOURCE.glob("*/__init__.py")}
    assert set(graph) == parts - architecture.LEFT_OUT
    assert "errors" in graph["nn"]
    assert "nn" not in graph["ops"]
