"""Builds the site from docs/, the pages beside it, and the package's docstrings.

    python -m website.build [FOLDER]

Pages are written for GitHub, where a link is a path in the repository. Here they are copied into
one folder, and each link is turned into what it means there: a page of the site, or, for any other
file of the repository, its path in plain text. docs/README.md is the index: its sections and their
links are the site's navigation.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
import sys
from pathlib import Path

from website.api import COMMANDS, FIRST, MODULES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
ITEM = re.compile(r"^- \[([^\]]*)\]\(([^)#\s]+)\.md\)", re.MULTILINE)
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


class BrokenLinkError(Exception):
    """A page links to a file or heading that the repository does not have."""


def pages() -> dict[Path, str]:
    """Every page -> its name in the site."""
    found = {page: page.stem for page in sorted(DOCS.glob("*.md"))}
    found[DOCS / "README.md"] = "index"
    return found | {
        ROOT / "README.md": "front_page",
        ROOT / "CONTRIBUTING.md": "contributing",
        ROOT / "SECURITY.md": "security",
        ROOT / "CHANGELOG.md": "changelog",
        ROOT / "csrc" / "README.md": "csrc",
        ROOT / "dev" / "kernel_log.md": "kernel_log",
    }


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return text.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = CODE.sub(lambda m: "" if m[0].startswith("```") else m[0], page.read_text("utf-8"))
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def resolve(page: Path, link: str) -> tuple[Path, str]:
    """The file and the anchor that a relative link of ``page`` means on GitHub.

    Raises:
        BrokenLinkError: if there is no such file or heading.
    """
    path, _, fragment = link.partition("#")
    target = Path(os.path.normpath(page.parent / path)) if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        raise BrokenLinkError(f"{page.relative_to(ROOT)}: {link}: there is no such file.")
    if fragment and fragment not in anchors(target):
        raise BrokenLinkError(f"{page.relative_to(ROOT)}: {link}: there is no such heading.")
    return target, fragment


def for_site(page: Path, text: str) -> str:
    """``text`` of ``page`` with its relative links as they are in the site."""
    known = pages()

    def change(match: re.Match[str]) -> str:
        image, label, link = match.groups()
        if re.match(r"[a-z]+:", link):
            return match[0]
        target, fragment = resolve(page, link)
        if image:
            return f"![{label}](figures/{target.name})"
        if target in known:
            return f"[{label}]({known[target]}.md{'#' * bool(fragment)}{fragment})"
        return f"{label} (`{target.relative_to(ROOT)}`)"

    # A link's label may hold code, so only blocks and code outside of links are left alone.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else LINK.sub(change, part) for i, part in enumerate(parts))


def navigation(index: str) -> str:
    """Hidden tables of contents: one for each section of the index that lists pages."""
    parts = []
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        heading, _, rest = section.partition("\n")
        entries = [f"{label} <{name}>" for label, name in ITEM.findall(rest)]
        if heading == "Start":
            entries.insert(0, "README <front_page>")
        parts.append(_toctree(heading, entries))
    entries = [f"{module} <api/{module}>" for module in MODULES]
    parts.append(_toctree("Reference", ["Command line <api/command_line>", *entries]))
    return "\n".join(parts)


def _toctree(caption: str, entries: list[str]) -> str:
    lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""]
    return "\n".join(lines)


def public_names(module: str) -> list[str]:
    """What a module exports: its ``__all__``, else its own public classes and functions."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is not None:
        return sorted(names, key=lambda name: (name not in FIRST, name))
    return [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module
    ]


def reference() -> dict[str, str]:
    """The pages of the API reference: module -> text."""
    shown: dict[int, str] = {}
    found = {}
    for module, heading in MODULES.items():
        loaded = importlib.import_module(module)
        summary = (inspect.getdoc(loaded) or "").split("\n\n")[0].replace("``", "`")
        lines = [f"# {heading}: `{module}`", "", summary, ""]
        directives, elsewhere = [f".. py:module:: {module}", ""], []
        for name in public_names(module):
            value = getattr(loaded, name)
            kind = "class" if inspect.isclass(value) else "function"
            kind = kind if inspect.isclass(value) or inspect.isroutine(value) else "data"
            if kind == "data" and f"\n{name}" not in inspect.getsource(loaded):
                continue  # what explains it stands in the module that it comes from
            if kind != "data" and id(value) in shown:
                elsewhere.append(f"{{py:obj}}`~{shown[id(value)]}`")
                continue
            shown[id(value)] = f"{module}.{name}"
            if kind == "class" and issubclass(value, Exception):
                kind = "exception"
            directives += [f".. auto{kind}:: {module}.{name}", *_options(kind), ""]
        if elsewhere:
            lines += [f"Also here: {', '.join(elsewhere)}.", ""]
        lines += ["```{eval-rst}", *directives, "```", ""]
        found[module] = "\n".join(lines)
    return found


def _options(kind: str) -> list[str]:
    return ["   :members:"] if kind in ("class", "exception") else []


def help_of(command: str) -> str:
    """What ``lightning-fastmoe COMMAND --help`` prints."""
    from lightning_fastmoe.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return printed.getvalue()


def command_line() -> str:
    """The page of the command line."""
    os.environ["COLUMNS"] = "88"
    parts = [
        "# Command line: every command and its options",
        "\n`fit`, `validate`, `test` and `predict` are LightningCLI's:"
        " `lightning-fastmoe fit --help` prints their options.\n",
    ]
    for command in COMMANDS:
        name = f"lightning-fastmoe {command}".strip()
        parts.append(f"## `{name}`\n\n```text\n{help_of(command)}```\n")
    return "\n".join(parts)


def assemble(folder: Path) -> None:
    """Writes the sources of the site into ``folder``, which is emptied first.

    Raises:
        BrokenLinkError: if a page links to what is not there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "api").mkdir(parents=True)
    (folder / "figures").mkdir()
    for figure in (DOCS / "figures").glob("*.svg"):
        shutil.copy(figure, folder / "figures")
    for page, name in pages().items():
        text = for_site(page, page.read_text(encoding="utf-8"))
        if name == "index":
            text += "\n" + navigation(text)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / "api" / "command_line.md").write_text(command_line(), encoding="utf-8")
    for module, text in reference().items():
        (folder / "api" / f"{module}.md").write_text(text, encoding="utf-8")


def main(folder: Path) -> int:
    """Assembles the site below ``folder`` and builds it; warnings are errors."""
    from sphinx.cmd.build import build_main

    assemble(folder / "source")
    where = ["-c", str(Path(__file__).parent), "-d", str(folder / "doctrees")]
    return build_main(
        ["-W", "--keep-going", "-q", "-E", *where, str(folder / "source"), str(folder / "html")]
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs")))
