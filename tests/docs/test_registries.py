"""What can be chosen by name is on the page that tells which name to choose."""

from __future__ import annotations

import re

from website.build import ROOT

from lightning_fastmoe.nn import MoE
from lightning_fastmoe.nn.router import ROUTERS
from lightning_fastmoe.nn.router.losses import LOSSES
from lightning_fastmoe.ops.activation import ACTIVATIONS, COMPOSED


def test_routers_have_a_row_each() -> None:
    page = (ROOT / "docs/routers.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r'^\| `"(\w+)"` \|', page, re.MULTILINE)) == sorted(ROUTERS)


def test_activations_are_named_in_the_docstring_of_the_layer() -> None:
    text = (MoE.__doc__ or "").split("activation:")[1].split("bias:")[0]
    assert sorted(re.findall(r'"(\w+)"', text)) == sorted([*ACTIVATIONS, *COMPOSED])


def test_losses_are_arguments_of_the_layer() -> None:
    text = MoE.__doc__ or ""
    assert [name for name in LOSSES if f"\n        {name}: coefficient of" not in text] == []


def test_losses_have_a_row_each() -> None:
    page = (ROOT / "docs/routers.md").read_text(encoding="utf-8")
    section = page.partition("\n## Losses\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(LOSSES)
