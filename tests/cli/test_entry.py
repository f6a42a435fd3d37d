"""The process of `lightning-fastmoe fit`: when it collects garbage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROBE = """
import gc, json, sys
from lightning_fastmoe.cli import main

collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))

class Stop:
    # Called by the parser's class, last of all imports, and before anything is created.
    def find_spec(self, name, path=None, target=None):
        if name == "lightning_fastmoe.demos.byte_lm.parser":
            from lightning_fastmoe.demos.byte_lm.cli import FastMoECLI
            FastMoECLI.instantiate_classes = report

def report(cli):
    import deepspeed, torch
    imported = len(collections)
    cycle = [torch.nn.Linear(1, 1)]
    cycle.append(cycle)
    tracked = set(map(id, gc.get_objects()))
    print(json.dumps({
        "collections": imported,
        "enabled": gc.isenabled(),
        "imports are traversed": id(vars(deepspeed)) in tracked or id(torch.nn.Linear) in tracked,
        "new objects are traversed": id(cycle) in tracked,
    }), flush=True)
    sys.exit(0)

sys.meta_path.insert(0, Stop())
sys.argv[1:] = ["fit", "--config", "examples/tiny_lm.yaml"]
main(ARGUMENTS)
"""


def probe(arguments: str) -> dict[str, Any]:
    """What ``main(arguments)`` has done to the collector when it creates the Trainer."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("ARGUMENTS", arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_command_does_not_look_for_garbage_among_its_imports() -> None:
    assert probe("None") == {
        "collections": 0,
        "enabled": True,
        "imports are traversed": False,
        "new objects are traversed": True,
    }


def test_a_process_that_calls_main_keeps_its_collector() -> None:
    found = probe("sys.argv[1:]")
    assert found.pop("collections") > 0
    assert found == {
        "enabled": True,
        "imports are traversed": True,
        "new objects are traversed": True,
    }
