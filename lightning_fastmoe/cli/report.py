"""Write an HTML page about the experts of a training run: loads, routing and losses.

  lightning-fastmoe report runs/tiny_lm
  lightning-fastmoe report runs/tiny_lm/version_3 --output report.html

RUN_DIR is the folder of a run's logger, or one with version_* folders, of which the latest is read.
The page shows what it finds there: CSVLogger's metrics.csv, TensorBoard's event files (if
tensorboard is installed), and expert_load.jsonl, which ExpertLoadMonitor writes. Its first line
names the starving experts: those with less than a quarter of the mean load in the last tenth of the
log.

The page is one self-contained file; open it in a browser.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="write the page to this file; default: report.html in the run's folder",
    )
    parser.add_argument(
        "--starving",
        metavar="RATIO",
        type=float,
        default=0.25,
        help="fraction of the mean load below which an expert starves; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page; prints the verdict and the page's path."""
    from lightning_fastmoe.errors import ConfigError
    from lightning_fastmoe.monitoring.report.logs import read_run
    from lightning_fastmoe.monitoring.report.page import build_page
    from lightning_fastmoe.monitoring.report.verdict import judge

    if not 0 < arguments.starving <= 1:
        raise ConfigError(
            f"--starving {arguments.starving} is out of range: it must be above 0 and at most 1."
        )
    found = read_run(arguments.run_dir)
    verdict = judge(found.loads, arguments.starving)
    output: Path = arguments.output or found.folder / "report.html"
    try:
        output.write_text(build_page(found, verdict), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {output} can't be written: {error.strerror}.") from error
    if arguments.json:
        facts = {
            "page": str(output.absolute()),
            "run": str(found.folder.absolute()),
            "state": verdict.state,
            "verdict": verdict.sentence,
            "num_experts": verdict.num_experts,
            "starving": [
                {
                    "layer": x.layer,
                    "name": x.name,
                    "expert": x.expert,
                    "load_ratio": x.ratio,
                    "dead": x.dead,
                }
                for x in verdict.starving
            ],
            "notes": [*found.notes, *verdict.notes],
        }
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    lines = [verdict.sentence, *found.notes, *verdict.notes, str(output)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
