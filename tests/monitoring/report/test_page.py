"""The page: what it says, what it says is missing, and that it is one file."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from monitoring.report import runs

from lightning_fastmoe.monitoring.report.co_activation import co_activation_map, strongest_pair
from lightning_fastmoe.monitoring.report.colours import (
    DEAD,
    LIMIT,
    UNKNOWN,
    colour,
    ink,
    share_colour,
)
from lightning_fastmoe.monitoring.report.logs import read_run
from lightning_fastmoe.monitoring.report.page import build_page
from lightning_fastmoe.monitoring.report.svg import line_chart, png, thinned, ticks
from lightning_fastmoe.monitoring.report.verdict import judge


def page(folder):
    run = read_run(folder)
    return build_page(run, judge(run.loads))


class Balanced(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(html):
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    # Nothing from elsewhere: no address but the data of pictures.
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", html)
    assert set(re.findall(r'(?:href|src)="([^,]*)', html)) <= {"data:image/png;base64"}


def test_a_whole_run(tmp_path):
    html = page(runs.make_run(tmp_path))
    check(html)
    assert "2 of 32 experts are starving (1 dead): layer 2 expert 5, layer 0 expert 3." in html
    assert html.count('stroke="#c1121f"') == 2  # frames
    assert "<title>layer 2 expert 5: 0.00 of the mean load</title>" in html
    assert "net.&lt;0&gt;.moe" in html
    assert "net.<0>" not in html
    assert 'class="missing"' not in html
    assert "25.0% of the device" in html
    assert html.count("<image") == 4 + 3  # over time; together, without the layer of top 1


def test_pairs_chosen_together_more_than_by_chance_are_named(tmp_path):
    """Experts 2 and 6 of layer 1 share 90 of the 100 choices that begin with one of them."""
    runs.write_loads(tmp_path)
    assert "chosen together" not in page(tmp_path)
    runs.write_co_activation(tmp_path)
    table = runs.together(1)
    share = table[6][2] / table[6][6]
    assert 0.5 < share < 0.9
    html = page(tmp_path)
    check(html)
    assert f"{share:.0%} of expert 6&#x27;s tokens also chose 2; by chance 20%" in html
    assert html.count("<small>15% of expert") == 2
    assert "steps 390 to 399" in html


def test_the_strongest_pair():
    # 10 tokens each; expert 0 always with 1, expert 2 with 3; by chance a third.
    table = [[10, 10, 0, 0], [10, 10, 0, 0], [0, 0, 10, 10], [0, 0, 10, 10]]
    pair = strongest_pair(table)
    assert (pair.first, pair.second, pair.share) == (0, 1, 1.0)
    assert pair.expected == pytest.approx(1 / 3)
    assert strongest_pair([[5, 0], [0, 5]]) is None
    assert strongest_pair([[0, 0], [0, 0]]) is None
    # Expert 2 has one token, which says nothing.
    pair = strongest_pair([[20, 9, 1], [9, 30, 0], [1, 0, 1]])
    assert (pair.first, pair.second, pair.share) == (0, 1, 9 / 20)
    # Loads count: of expert 0's 6 tokens 2 chose 1; it has 2 of the others' 8 choices.
    pair = strongest_pair([[6, 2, 4], [2, 2, 0], [4, 0, 6]])
    assert (pair.first, pair.second, pair.share) == (1, 0, 1.0)
    assert pair.expected == pytest.approx(6 / 12)


def test_the_map_of_pairs(tmp_path):
    image = pytest.importorskip("PIL.Image")
    svg = co_activation_map([[4, 4, 0], [4, 4, 0], [0, 0, 0]], title="x")
    file = tmp_path / "a.png"
    file.write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1]))
    with image.open(file) as picture:
        rows = [[picture.getpixel((x, y)) for x in range(3)] for y in range(3)]
    whole, none = share_colour(1.0), share_colour(0.0)
    assert rows == [[UNKNOWN, whole, none], [whole, UNKNOWN, none], [UNKNOWN] * 3]
    assert min(none) > 240
    assert whole == colour(LIMIT)


def test_a_healthy_run(tmp_path):
    runs.write_csv(tmp_path)
    runs.write_loads(tmp_path, healthy=True, drops=False)
    html = page(tmp_path)
    check(html)
    assert 'class="verdict alive"' in html
    assert "All 32 experts are alive" in html
    assert "No token was dropped" in html
    assert '#c1121f"' not in html


def test_what_is_missing_is_said(tmp_path):
    runs.write_loads(tmp_path)
    html = page(tmp_path)
    check(html)
    assert html.count('class="missing"') == 2
    assert "No loss was logged" in html
    assert "add lightning_fastmoe.ThroughputMonitor" in html
    other = tmp_path / "other"
    runs.write_csv(other)
    html = page(other)
    check(html)
    assert 'class="verdict unknown"' in html
    assert html.count("add lightning_fastmoe.ExpertLoadMonitor") == 5  # verdict, title, 3 panels


def test_nan_is_not_drawn_but_said(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss\n1,2.0\n2,nan\n3,inf\n")
    html = page(tmp_path)
    check(html)
    assert "2 values are NaN or infinite" in html
    assert not re.search(r'points="[^"]*(nan|inf)', html)


@pytest.mark.parametrize("series", [[(5, 1.0)], [(1, 0.0), (2, 0.0)], [(1, -3.0), (2, 1e9)]])
def test_charts_of_odd_series(series):
    svg = line_chart({"a": series, "b": [(1, 2.0)]}, title="x")
    assert "nan" not in svg
    assert svg.count("<polyline") == 2


def test_long_series_keep_their_peaks():
    series = [(i, 0.0) for i in range(10_000)]
    series[777] = (777, 9.0)
    kept = thinned(series)
    assert len(kept) <= 500
    assert (777, 9.0) in kept
    assert kept == sorted(kept)


def test_ticks_are_round_and_inside_the_range():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.1, 0.35, 4) == pytest.approx([0.1, 0.2, 0.3])
    assert ticks(3, 3) == [3]


def test_starving_is_orange_crowded_is_blue_and_even_is_light():
    assert colour(0) == DEAD
    assert colour(None) == colour(float("nan")) == UNKNOWN
    assert min(colour(1.0)) > 240
    starving, crowded = colour(1 / LIMIT), colour(LIMIT)
    assert colour(0.001) == starving
    assert colour(1000) == crowded
    assert starving[0] > 2 * starving[2]  # orange
    assert crowded[2] > 2 * crowded[0]  # blue
    reds = [colour(2.0**-x)[2] for x in (0, 0.5, 1, 1.5, 2)]
    assert reds == sorted(reds, reverse=True)
    assert ink(0) == ink(0.25) == ink(4) == "#ffffff"
    assert ink(1) == "#1a1a1a"


def test_png_is_read_by_others(tmp_path):
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "a.png"
    file.write_bytes(png([[(1, 2, 3), (4, 5, 6)], [(7, 8, 9), (250, 251, 252)]]))
    with image.open(file) as picture:
        assert picture.size == (2, 2)
        assert [picture.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [
            (1, 2, 3), (4, 5, 6), (7, 8, 9), (250, 251, 252),
        ]  # fmt: skip
