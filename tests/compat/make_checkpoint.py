"""Makes the frozen checkpoint of this format version: ``python tests/compat/make_checkpoint.py``.

It was run once for each format version. Running it again for the same one defeats its purpose.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from compat import tiny  # noqa: E402

from lightning_fastmoe.checkpoint import FORMAT_VERSION, CheckpointReader  # noqa: E402
from lightning_fastmoe.testing import RankPool  # noqa: E402


def leave_out(path: Path, name: str) -> None:
    """Takes a file that no tensor lies in out of the checkpoint."""
    content = json.loads((path / "manifest.json").read_text())
    index = [row[0] for row in content["files"]].index(name)
    del content["files"][index]
    for tensor in content["tensors"].values():
        for fragment in tensor["pieces"]:
            fragment[2] -= fragment[2] > index
    data = json.dumps(content, separators=(",", ":")).encode()
    (path / "manifest.json").write_bytes(data)
    line = f"{hashlib.sha256(data).hexdigest()}  manifest.json\n"
    (path / "manifest.sha256").write_text(line)
    (path / name).unlink()


def main() -> None:
    path = HERE / f"v{FORMAT_VERSION}"
    if path.exists():
        raise SystemExit(f"{path} is there already, and is to stay as it is.")
    pool = RankPool()
    losses = pool.run(tiny.write, 2, str(path))
    pool.close()
    leave_out(path, "rank_00001.json")  # like rank 0's, and half of all bytes
    with CheckpointReader(path) as reader:
        reader.verify()
        values = {
            name: [round(float(v), 6) for v in reader.read(name).flatten()[[0, -1]].double()]
            for name in reader.manifest.tensors
        }
    means = [sum(step) / len(step) for step in zip(*losses, strict=True)]
    expected = {"losses": means[tiny.SAVED :], "first_and_last_values": values}
    (HERE / f"{path.name}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
