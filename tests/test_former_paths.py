"""Modules that moved are found where they were: by scripts, configuration files and pickles."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

from lightning_fastmoe import former_paths, lm
from lightning_fastmoe.demos.byte_lm.model import MoETransformer
from lightning_fastmoe.former_paths import FORMER

NAMED = {
    "lm": (
        "ByteCorpus",
        "MoECausalLM",
        "MoELanguageModel",
        "SampleText",
        "TrainingBar",
        "generate",
    ),
    "lm.cli": ("FastMoECLI", "silence_upstream"),
    "lm.data": ("ByteCorpus",),
    "lm.decoder": ("MoEDecoder",),
    "lm.model": ("Embedding", "Linear", "MoELanguageModel", "MoETransformer"),
    "lm.progress": ("TrainingBar",),
    "lm.sampling": ("SampleText", "generate"),
    "callbacks.co_activation": ("CoActivationMonitor",),
    "callbacks.expert_load": ("ExpertLoadMonitor",),
    "callbacks.summary": ("MoESummary",),
    "callbacks.throughput": ("ThroughputMonitor",),
    "load_log": ("LoadLog",),
    "co_activation_log": ("CoActivationLog",),
    "metrics": ("ExpertLoad", "dead_experts"),
    "metrics.expert_load": ("ExpertLoad", "LayerLoad"),
    "metrics.formulas": ("load_ratio",),
    "metrics.routing": ("RoutingMetric",),
    "nn.router.base": ("LinearRouter", "Router"),
    "checkpoint.huggingface": ("FAMILIES", "export", "import_model"),
}
"""What scripts, configuration files and pickles may name, by the module in which it was."""


@pytest.mark.parametrize("former", FORMER)
def test_a_module_is_one_under_both_names(former: str) -> None:
    old = importlib.import_module(f"lightning_fastmoe.{former}")
    new = importlib.import_module(f"lightning_fastmoe.{FORMER[former]}")
    assert old is new
    assert old.__spec__.name == old.__name__ == f"lightning_fastmoe.{FORMER[former]}"


def test_what_files_name_is_found() -> None:
    """In a process of its own, which has imported nothing yet."""
    code = "\n".join(
        f"from lightning_fastmoe.{module} import {', '.join(names)}"
        for module, names in NAMED.items()
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_pickle_loads() -> None:
    data = pickle.dumps(MoETransformer, protocol=0)
    new, old = b"lightning_fastmoe.demos.byte_lm.model", b"lightning_fastmoe.lm.model"
    assert new in data
    assert pickle.loads(data.replace(new, old)) is MoETransformer  # noqa: S301  our own


def test_a_class_path_of_jsonargparse_loads() -> None:
    from jsonargparse import ArgumentParser
    from pytorch_lightning import Callback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    for path in ("lightning_fastmoe.lm.TrainingBar", "lightning_fastmoe.lm.progress.TrainingBar"):
        config = parser.parse_object({"callback": {"class_path": path}})
        assert type(parser.instantiate(config).callback) is lm.TrainingBar


def test_other_names_stay_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'lightning_fastmoe\.lm\.nope'"):
        importlib.import_module("lightning_fastmoe.lm.nope")
    with pytest.raises(AttributeError, match="'lightning_fastmoe.lm' has no attribute 'nope'"):
        _ = lm.nope
    before = len(sys.meta_path)
    former_paths.serve_former_paths()
    assert len(sys.meta_path) == before
