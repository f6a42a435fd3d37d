"""The page in a real browser: it renders, and starving experts catch the eye."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from monitoring.report import runs

from lightning_fastmoe import cli
from lightning_fastmoe.monitoring.report.colours import DEAD, colour

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    f"--{name}"
    for name in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "hide-scrollbars",
    )
]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium on PATH")


@pytest.fixture
def browse(tmp_path):
    runs.make_run(tmp_path / "run")
    file = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "run"), "--output", str(file)]) == 0

    def run(*options: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(BROWSER), *FLAGS, profile, *options, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_page_renders(browse):
    dom = browse("--dump-dom")
    assert re.search(r"<h1>2 of 32 experts are starving", dom)
    assert dom.count("<figure>") == 4 + 5 + 3
    assert dom.count("<polyline") == 2 + 1 + 1 + 1 + 2
    assert "<parsererror" not in dom


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (500, 900)])
def test_starving_experts_are_seen(browse, tmp_path: Path, width, height):
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "shot.png"
    browse(f"--screenshot={shot}", f"--window-size={width},{height}")
    with image.open(shot) as opened:
        assert opened.size == (width, height)
        picture = opened.convert("RGB")
    seen: dict[tuple[int, int, int], int] = {}
    for count, pixel in picture.getcolors(maxcolors=1 << 24):
        seen[pixel] = count
    # Without scrolling: the dead expert, the starving one, and the verdict's red.
    cell = (width / 1280) ** 2 * 500
    assert seen.get(DEAD, 0) > cell
    assert seen.get(colour(0.1), 0) > cell
    assert seen.get((193, 18, 31), 0) > 1000
