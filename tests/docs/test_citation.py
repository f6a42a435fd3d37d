"""CITATION.cff cites this version of this package, and the paper whose name it carries."""

from __future__ import annotations

import yaml
from website.build import ROOT

from lightning_fastmoe import __version__


def test_the_citation_has_this_version_and_the_paper() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert content["cff-version"] == "1.2.0"
    assert content["version"] == __version__
    assert content["title"] == "lightning-fastmoe"
    assert {"message", "authors", "type"} <= set(content)
    (paper,) = content["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2103.13262"
    assert paper["authors"][0]["family-names"] == "He"
    assert paper["year"] == 2021
