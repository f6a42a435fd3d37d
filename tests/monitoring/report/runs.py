"""Folders of runs, as loggers and the monitor would leave them."""

from __future__ import annotations

from pathlib import Path

from lightning_fastmoe.monitoring.logs import co_activation as co_activation_log
from lightning_fastmoe.monitoring.logs.expert_load import Layer, LoadLogWriter, Record

EXPERTS = 8
STEPS = range(9, 400, 10)


def counts(layer: int, step: int) -> list[int]:
    """Layer 2 expert 5 dies after step 200, layer 0 expert 3 starves; the rest is near even."""
    row = [100 + 7 * ((3 * e + layer) % 5) for e in range(EXPERTS)]
    if layer == 2 and step > 200:
        row[5] = 0
    if layer == 0 and step > 100:
        row[3] = 12
    return row


def write_loads(folder: Path, *, healthy: bool = False, drops: bool = True) -> None:
    """``expert_load.jsonl`` of four layers."""
    layers = [Layer(f"net.<{i}>.moe", EXPERTS) for i in range(4)]
    writer = LoadLogWriter(folder, layers, 0)
    for step in STEPS:
        routed = [counts(1 if healthy else i, step) for i in range(4)]
        kept = [[min(n, 120) for n in row] for row in routed] if drops else [None] * 4
        writer.write(
            Record(step, [400] * 4, routed, kept, [1.5 - i / 9 for i in range(4)], [0.3] * 4)
        )
    writer.close()


def write_csv(folder: Path) -> None:
    """CSVLogger's file: blank cells, and a validation loss now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["epoch,step,train_loss,val_loss,train/device/items_per_sec,train/device/mfu"]
    for step in STEPS:
        lines.append(f"0,{step},{5 / (1 + step / 50)},,,")
        lines.append(f",{step},,,{2000.0 + step},0.25")
        if step % 100 == 99:
            lines.append(f"0,{step},,{6 / (1 + step / 50)},,")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def together(layer: int) -> list[list[int]]:
    """Pairs of 400 tokens, two experts each: in layer 1, experts 2 and 6 work nearly as one."""
    table = [[0] * EXPERTS for _ in range(EXPERTS)]
    for token in range(400):
        i = token % EXPERTS
        j = (i + 1 + token // EXPERTS % (EXPERTS - 1)) % EXPERTS
        if layer == 1 and i in (2, 6) and token % 10:
            i, j = 2, 6
        for a in (i, j):
            for b in (i, j):
                table[a][b] += 1
    return table


def write_co_activation(folder: Path) -> None:
    """``co_activation.json`` of four layers, the last with one expert per token."""
    layers = [co_activation_log.LayerCoActivation(f"net.<{i}>.moe", together(i)) for i in range(3)]
    alone = [[9 * (i == j) for j in range(EXPERTS)] for i in range(EXPERTS)]
    layers.append(co_activation_log.LayerCoActivation("net.<3>.moe", alone))
    co_activation_log.write(folder, co_activation_log.CoActivationLog(390, 399, layers))


def make_run(folder: Path) -> Path:
    """A whole run."""
    write_csv(folder)
    write_loads(folder)
    write_co_activation(folder)
    return folder
