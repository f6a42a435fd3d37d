"""The whole script on the CPU: who is refused, who fails, and what is written down."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from importlib.metadata import version

import moe_layer
import pytest
import torch
from layer import plot, registry
from layer.configs import CONFIGS
from layer.errors import BenchmarkError
from layer.peers import Layer, PlainTorch
from layer.runner import Options, Runner, summary
from layer.worker import TOLERANCE, Failed, Subprocess

ON_CPU = ("ours", "ours-module", "torch", "torch-bmm", "torch-router", "loop", "deepspeed")
QUICK = ["--device", "cpu", "--tiny", "--in-process", "--seconds-per-row", "0.01", "--rounds", "2"]


def run(tmp_path, *arguments: str) -> tuple[int, dict, str]:
    files = {name: tmp_path / f"run.{name}" for name in ("json", "markdown")}
    argv = [*QUICK, *arguments]
    for name, file in files.items():
        argv += [f"--{name}", str(file)]
    code = moe_layer.main(argv)
    return code, json.loads(files["json"].read_text()), files["markdown"].read_text()


def test_every_peer_of_the_cpu_is_right_everywhere(tmp_path):
    arguments = ("--configs", "sonic-7b,fastmoe-64,switch-base-8", "--routings", "all")
    code, report, _ = run(tmp_path, *arguments, "--peers", ",".join(ON_CPU))
    assert code == 0
    assert {row["status"] for row in report["rows"]} == {"ok"}
    assert len(report["rows"]) == 3 * 6 * len(ON_CPU)
    for row in report["rows"]:
        assert 0 < row["max_error"] <= TOLERANCE
        wanted = {"out", "x", "up", "down"}
        wanted |= {"router" if registry.PEERS[row["peer"]].with_router else "weights"}
        assert row["errors"].keys() == wanted


def test_fp32_is_right_to_fp32(tmp_path):
    arguments = ("--configs", "sonic-7b,switch-8", "--dtype", "float32", "--peers")
    _, report, _ = run(tmp_path, *arguments, "ours,ours-module,torch,torch-router,loop")
    assert all(row["max_error"] < 1e-5 for row in report["rows"])


def test_what_is_written(tmp_path):
    _, report, text = run(tmp_path, "--configs", "sonic-7b", "--peers", "ours,torch,sonicmoe")
    assert report["schema"] == moe_layer.SCHEMA
    assert report["machine"]["torch"] == torch.__version__
    assert report["peers"]["torch"]["version"] == version("torch")
    assert report["peers"]["ours"]["reason"] is None
    assert report["sizes"]["sonic-7b"]["d_model"] == CONFIGS["sonic-7b"].tiny().d_model
    ours, plain, sonic = report["rows"]
    flops = CONFIGS["sonic-7b"].tiny().step_flops
    for row in (ours, plain):
        assert row["step_tflops"] == pytest.approx(flops / row["step_ms"]["median"] / 1e9)
        assert row["percent_of_dense"] == pytest.approx(
            100 * row["step_tflops"] / row["dense_tflops"]
        )
        assert row["forward_ms"]["q1"] <= row["forward_ms"]["median"] <= row["forward_ms"]["q3"]
        assert row["step_ms"]["n"] >= 6
        assert row["cold_ms"] > 0
        # What only a CUDA device can tell.
        assert row["peak_gib"] is row["kernels"] is row["host_syncs"] is None
    assert (sonic["status"], sonic["reason"]) == ("unavailable", "needs a CUDA device")
    assert "step_tflops" not in sonic
    assert "| SonicMoE | unavailable: needs a CUDA device |" in text
    ratio = ours["step_tflops"] / plain["step_tflops"]
    assert f"| {ratio:.2f}x |" in text
    assert f"torch {torch.__version__}" in text
    assert all(line.count("|") == 12 for line in text.splitlines() if line.startswith("|"))


def test_peers_with_a_router_are_compared_with_one_that_has_a_router(tmp_path):
    peers = "torch,ours,torch-router,ours-module,sonicmoe-router"
    _, report, text = run(tmp_path, "--configs", "sonic-7b", "--peers", peers)
    tflops = [row["step_tflops"] for row in report["rows"][:4]]
    ratios = [f"{tflops[i] / tflops[base]:.2f}x" for i, base in enumerate([0, 0, 2, 2])]
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line[5] for line in lines[:4]] == ratios
    assert lines[4][:2] == ["| SonicMoE, router", "unavailable: needs a CUDA device"]
    _, _, text = run(tmp_path, "--configs", "sonic-7b", "--peers", "torch,ours-module")
    assert text.splitlines()[7].split(" | ")[5] == "-"


class Wrong(PlainTorch):
    """Plain torch with one thing wrong."""

    name = "wrong"
    title = "wrong"
    fault = ""

    def build(self, problem):
        layer = super().build(problem)
        forward = layer.forward
        leaves = layer.leaves
        x = leaves["x"]
        weights = leaves["weights"]
        dropped = (torch.arange(x.shape[0]) > 0).unsqueeze(1).to(x.dtype)

        def boom():
            raise RuntimeError("boom\nmore")

        change = {
            "output": lambda: forward() * 1.02,
            "nan": lambda: forward() + torch.where(x == x[0, 0], torch.nan, 0.0),
            "one token dropped": lambda: forward() * dropped,
            "raises": boom,
            # The value is right, the gradients are not.
            "gradient": lambda: forward() * 1.02 - (forward() * 0.02).detach(),
            "no gradient": forward,
        }
        if self.fault == "no gradient":
            leaves = leaves | {"weights": torch.ones_like(weights).requires_grad_()}
        return Layer(change[self.fault], leaves)


@pytest.fixture
def wrong(monkeypatch):
    monkeypatch.setitem(registry.PEERS, "wrong", Wrong)

    def choose(fault: str) -> None:
        monkeypatch.setattr(Wrong, "fault", fault)

    return choose


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("output", "out"),
        ("nan", "out"),
        ("one token dropped", "out"),
        ("gradient", "up"),
        ("no gradient", "weights"),
    ],
)
def test_a_wrong_peer_is_refused(tmp_path, capsys, wrong, fault, where):
    wrong(fault)
    code, report, text = run(tmp_path, "--configs", "sonic-7b", "--peers", "torch,wrong")
    assert code == 1
    good, bad = report["rows"]
    assert good["status"] == "ok"
    assert bad["status"] == "refused"
    assert bad["errors"][where] > TOLERANCE
    assert "step_ms" not in bad
    assert "step_tflops" not in bad
    assert "REFUSED sonic-7b, uniform, wrong" in capsys.readouterr().err
    assert "| wrong | refused: relative error" in text


def test_a_peer_that_raises_is_a_row(tmp_path, wrong):
    wrong("raises")
    code, report, text = run(tmp_path, "--configs", "sonic-7b", "--peers", "wrong,torch")
    assert code == 0
    assert report["rows"][0]["reason"] == "RuntimeError: boom"
    assert report["rows"][1]["status"] == "ok"
    assert "| wrong | failed: RuntimeError: boom |" in text


def test_another_problem_is_refused():
    runner = Runner([], Options(device="cpu"), print)
    rows = [
        {"status": "ok", "peer": "a", "fingerprint": [1.0, 2.0]},
        {"status": "ok", "peer": "b", "fingerprint": [1.0, 2.00001]},
        {"status": "ok", "peer": "c", "fingerprint": [1.1, 2.0]},
    ]
    runner._compare_problems(rows)
    assert [row["status"] for row in rows] == ["ok", "ok", "refused"]
    assert rows[2]["reason"] == "not the problem of a"


def test_summary_by_hand():
    config = CONFIGS["fastmoe-16"]
    times = {"forward": [1.0, 2.0, 3.0, 4.0, 5.0], "step": [10.0, 20.0, 30.0]}
    row = summary(config, times, dense=50.0)
    assert row["forward_ms"] == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert row["forward_tflops"] == pytest.approx(137.438953472 / 3)
    assert row["step_tflops"] == pytest.approx(412.316860416 / 20)
    assert row["percent_of_dense"] == pytest.approx(2 * 412.316860416 / 20)


def test_a_worker_is_a_process_that_can_be_stopped():
    worker = Subprocess("torch", "cpu", torch.bfloat16)
    try:
        assert worker.call("start", limit=60)["version"] == version("torch")
        # As if the peer hung: a stopped process answers nothing.
        os.kill(worker.process.pid, signal.SIGSTOP)
        with pytest.raises(Failed, match="stopped after 0 s"):
            worker.call("start", limit=0.2)
        assert worker.process.exitcode == -signal.SIGKILL
    finally:
        if worker.process.is_alive():
            worker.close()


def test_a_run_in_processes_survives_one_that_dies(monkeypatch):
    said: list[str] = []
    options = Options(device="cpu", seconds=0.02, rounds=2)
    config = CONFIGS["switch-8"].tiny()
    with Runner(["torch", "loop"], options, said.append) as runner:
        assert [row["status"] for row in runner.run(config, "uniform")] == ["ok", "ok"]
        victim = runner.workers["loop"].process
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(10)
        torch_row, loop_row = runner.run(config, "one")
        assert torch_row["status"] == "ok"
        assert (loop_row["status"], loop_row["reason"]) == (
            "failed",
            "its process died (exit code -9)",
        )
        # The next row starts a new one.
        assert [row["status"] for row in runner.run(config, "half")] == ["ok", "ok"]
        processes = [worker.process for worker in runner.workers.values()]
    assert not any(process.is_alive() for process in processes)


def test_compiling_ahead_takes_one_step(monkeypatch):
    monkeypatch.setattr(registry.PEERS["loop"], "compiles", True)
    said: list[str] = []
    options = Options(device="cpu", ahead=2)
    runner = Runner(["torch", "loop"], options, said.append)
    runner.compile_ahead([CONFIGS["switch-8"].tiny()])
    assert len(said) == 1
    assert re.fullmatch(r"compiled ahead: switch-8, loop: \d+\.\d s", said[0])


def test_a_run_cut_short_leaves_what_it_has(tmp_path, monkeypatch):
    finished = Runner.run

    def run_once(self, config, routing):
        if routing == "one":
            raise KeyboardInterrupt
        return finished(self, config, routing)

    monkeypatch.setattr(Runner, "run", run_once)
    arguments = ("--configs", "switch-8", "--routings", "half,one", "--peers", "torch")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *arguments)
    report = json.loads((tmp_path / "run.json").read_text())
    assert [row["routing"] for row in report["rows"]] == ["half"]


def test_a_peer_that_can_not_start_is_tried_once(monkeypatch):
    starts: list[str] = []

    def start(self, device):
        starts.append("start")
        raise RuntimeError("no such file")

    monkeypatch.setattr(PlainTorch, "start", start)
    options = Options(device="cpu", in_process=True, seconds=0.01, rounds=1)
    config = CONFIGS["switch-8"].tiny()
    with Runner(["torch"], options, print) as runner:
        reasons = [runner.run(config, routing)[0]["reason"] for routing in ("one", "half")]
    assert reasons == ["RuntimeError: no such file", "can't start: RuntimeError: no such file"]
    assert starts == ["start"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "sonic"], "sonic is not a configuration"),
        (["--peers", "tutel"], "tutel is not a peer"),
        (["--routings", "skewed"], "'skewed' is not a routing"),
        (["--limit", "sonicmoe=soon"], "write SECONDS or PEER=SECONDS"),
        (["--device", "cpu"], "add --tiny"),
    ],
)
def test_bad_options_are_said(capsys, arguments, message):
    base = [] if "--device" in arguments else ["--device", "cpu", "--tiny"]
    assert moe_layer.main([*base, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_limit_counts_for_all_peers_or_for_the_named_one():
    assert moe_layer.parse_limits([]) == (90.0, {})
    assert moe_layer.parse_limits(["120", "sonicmoe=300"]) == (120.0, {"sonicmoe": 300.0})
    with pytest.raises(BenchmarkError, match="sonic is not a peer"):
        moe_layer.parse_limits(["sonic=300"])


def test_peers_that_compile_are_not_in_a_default_run():
    assert registry.parse_peers("default") == [
        "ours",
        "ours-module",
        "torch",
        "torch-bmm",
        "torch-router",
        "loop",
        "transformers",
        "deepspeed",
    ]


def test_plots_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchmarkError, match="pip install matplotlib"):
        plot.check_available()
    assert moe_layer.main([*QUICK, "--plot", "run.png"]) == 2


def test_the_two_plain_peers_sum_in_different_ways():
    sums = [registry.PEERS[name].weighted_sum for name in ("torch", "torch-bmm")]
    assert sums[0] is not sums[1]
    y, weights = torch.randn(6, 4), torch.rand(3, 2)
    inverse = torch.randperm(6)
    torch.testing.assert_close(sums[0](y, inverse, weights), sums[1](y, inverse, weights))
