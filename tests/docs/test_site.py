"""Links between pages hold on GitHub and in the site, and the API reference finds its modules.

Sphinx itself runs in ``make docs``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
from website import build
from website.api import COMMANDS, FIRST, MODULES

import lightning_fastmoe

PAGES = build.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(build.ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = build.for_site(page, page.read_text(encoding="utf-8"))
    for image, link in re.findall(r"(!?)\[[^\]]*\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", link):
            known = link.removesuffix(".md") in PAGES.values()
            assert known or (image and (build.DOCS / link).is_file()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(build.ROOT).as_posix())
def test_page_begins_with_its_only_title(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


def test_index_lists_every_page_once() -> None:
    index = build.DOCS / "README.md"
    text = build.for_site(index, index.read_text(encoding="utf-8"))
    listed = re.findall(r"<([\w/.]+)>$", build.navigation(text), re.MULTILINE)
    expected = [name for name in PAGES.values() if name != "index"]
    assert sorted(listed) == sorted([*expected, "api/command_line", *(f"api/{m}" for m in MODULES)])


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("checkpoints.md", "[x](checkpoints.md)"),
        ("checkpoints.md#what-is-checked", "[x](checkpoints.md#what-is-checked)"),
        ("../README.md#limits", "[x](front_page.md#limits)"),
        ("../csrc/README.md", "[x](csrc.md)"),
        ("../LICENSE", "x (`LICENSE`)"),
        ("https://example.org/a.md", "[x](https://example.org/a.md)"),
    ],
)
def test_link_becomes_what_it_means_in_the_site(link: str, expected: str) -> None:
    assert build.for_site(build.DOCS / "routers.md", f"[x]({link})") == expected


@pytest.mark.parametrize("link", ["gone.md", "checkpoints.md#gone", "#gone", "../../outside.md"])
def test_broken_link_is_an_error(link: str) -> None:
    with pytest.raises(build.BrokenLinkError, match=re.escape(link)):
        build.for_site(build.DOCS / "routers.md", f"[x]({link})")


def test_links_in_code_are_left_alone() -> None:
    text = "```python\na[i](gone)\n```\n"
    assert build.for_site(build.DOCS / "routers.md", text) == text


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module: str) -> None:
    loaded = importlib.import_module(module)
    assert inspect.getdoc(loaded)
    names = build.public_names(module)
    assert names
    for name in names:
        value = getattr(loaded, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), name


def test_reference_shows_what_users_import_first() -> None:
    assert next(iter(MODULES)) == lightning_fastmoe.__name__
    pages = build.reference()
    assert "autoclass:: lightning_fastmoe.MoE\n" in pages["lightning_fastmoe"]
    assert "autoclass:: lightning_fastmoe.nn.MoE\n" not in pages["lightning_fastmoe.nn"]
    assert "{py:obj}`~lightning_fastmoe.MoE`" in pages["lightning_fastmoe.nn"]
    assert (
        "autoexception:: lightning_fastmoe.errors.ConfigError" in pages["lightning_fastmoe.errors"]
    )
    shown = " ".join(pages.values())
    assert all(f".{name}\n" in shown for name in FIRST)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    assert build.help_of(command).startswith(f"usage: lightning-fastmoe {command}")


def test_every_command_is_shown() -> None:
    tools = build.help_of("").partition("tools:")[2].partition("options:")[0]
    verbs = build.help_of("checkpoint").partition("verbs:")[2]
    names = re.findall(r"^  (\w+)", tools, re.MULTILINE)
    names += [f"checkpoint {verb}" for verb in re.findall(r"^ {4}(\w+)", verbs, re.MULTILINE)]
    assert len(names) > 8
    assert set(names) == set(COMMANDS) - {""}
