"""Floors by hand, kernels to phases, and a report in which nothing is lost."""

from __future__ import annotations

import pytest
from layer import floors
from layer.configs import CONFIGS
from layer.floors import Rates, Sizes, Work
from layer.phases import GIVEN_ROUTING, GIVEN_ROUTING_HOPPER, WHOLE_MODULE, assign, table_for
from profile_moe import make_report, markdown, medians

# 3 tokens of width 4, 2 experts of inner width 5, both for each token: 6 rows; one expert is empty
# where it says busy=1 (which no routing of these sizes gives, but the formulas take it).
GATED = Sizes(t=3, d=4, f=5, e=2, k=2, u=10, busy=1)


@pytest.mark.parametrize(
    ("floor", "flops", "moved"),
    [
        pytest.param(floors.sort, 0, 6 * (8 + 8 + 8) + 2 * (8 + 4), id="sort"),
        pytest.param(floors.permute, 0, 24 + 48 + 6 * 8, id="permute"),
        pytest.param(floors.up_product, 2 * 6 * 4 * 10, 48 + 80 + 120, id="up"),
        pytest.param(floors.activation, 0, 120 + 60, id="activation"),
        pytest.param(floors.down_product, 2 * 6 * 5 * 4, 60 + 40 + 48, id="down"),
        pytest.param(floors.weighted_sum, 0, 48 + 24 + 6 * 12, id="weighted-sum"),
        pytest.param(floors.plain_sum, 0, 48 + 24 + 6 * 8, id="plain-sum"),
        pytest.param(
            floors.activation_backward, 0, (120 + 60 + 24 + 48) + (120 + 60 + 24), id="act-backward"
        ),
        pytest.param(floors.down_gradient, 2 * 6 * 5 * 4, 48 + 60 + 2 * 40, id="d_down"),
        pytest.param(floors.up_gradient, 2 * 6 * 4 * 10, 48 + 120 + 2 * 80, id="d_up"),
        pytest.param(floors.rows_gradient, 2 * 6 * 10 * 4, 120 + 80 + 48, id="d_rows"),
        pytest.param(floors.empty_experts, 0, 2 * 8 + (80 + 40) // 2, id="empty"),
        pytest.param(
            floors.router, 2 * 3 * 4 * 2, 24 + 2 * 4 * 4 + 3 * 2 * 4 + 6 * (4 + 8), id="router"
        ),
        pytest.param(floors.router_losses, 0, 2 * 3 * 2 * 4 + 6 * 8, id="losses"),
        pytest.param(
            floors.router_backward,
            2 * 2 * 3 * 4 * 2,
            3 * 2 * 4 + 6 * 12 + (24 + 24) + 2 * 32,
            id="router-backward",
        ),
        pytest.param(
            floors.whole_layer,
            3 * (2 * 6 * 4 * 10 + 2 * 6 * 5 * 4),
            (2 * 1 + 2) * 120 + 6 * 24 + 5 * 120 + 4 * 60,
            id="layer",
        ),
    ],
)
def test_work_by_hand(floor, flops, moved):
    assert floor(GATED) == Work(flops, moved)


def test_the_whole_layer_computes_what_the_tables_count():
    for config in CONFIGS.values():
        assert floors.whole_layer(Sizes.of(config)).flops == config.step_flops


def test_floor_is_the_greater_of_both():
    rates = Rates(dense_tflops=800, copy_gbs=3000)
    # 8e9 FLOPs at 800 TFLOP/s: 10 us. 3e6 bytes at 3000 GB/s: 1 us.
    assert Work(8 * 10**9, 3 * 10**6).floor_us(rates) == pytest.approx(10)
    assert Work(8 * 10**9, 3 * 10**6).bound(rates) == "compute"
    assert Work(8 * 10**8, 9 * 10**6).floor_us(rates) == pytest.approx(3)
    assert Work(8 * 10**8, 9 * 10**6).bound(rates) == "memory"


def test_sizes_of_a_configuration():
    sizes = Sizes.of(CONFIGS["sonic-7b"])
    assert (sizes.n, sizes.u, sizes.busy) == (196_608, 512, 128)
    assert Sizes.of(CONFIGS["switch-8"], busy=3).u == 3072
    assert Sizes.of(CONFIGS["switch-8"], busy=3).busy == 3


PREPARE = "void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t>(...)"
PRODUCT = "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>(...)"
FORWARD = [
    "void lightning_fastmoe::sort_kernel(long const*)",
    "void lightning_fastmoe::permute_rows_kernel<uint4>(...)",
    PREPARE,
    PRODUCT,
    "void lightning_fastmoe::activation_kernel<bf16, Silu>(...)",
    PREPARE,
    PRODUCT,
    "void lightning_fastmoe::sum_rows_kernel<bf16>(...)",
]
BACKWARD = [
    "void lightning_fastmoe::permute_rows_kernel<uint4>(...)",
    PREPARE,
    PRODUCT,
    "void lightning_fastmoe::activation_backward_kernel<bf16, Silu>(...)",
    PREPARE,
    PRODUCT,
    "void lightning_fastmoe::zero_empty_kernel(...)",
    PREPARE,
    PRODUCT,
    "void lightning_fastmoe::sum_rows_kernel<bf16>(...)",
    "void lightning_fastmoe::permute_rows_kernel<uint4>(...)",
    PREPARE,
    PRODUCT,
    "void lightning_fastmoe::zero_empty_kernel(...)",
]
NORM = "void at::native::vectorized_elementwise_kernel<4>(...)"


def phases(names, entries=GIVEN_ROUTING):
    places = assign(names, entries)
    return [None if p is None else entries[p].phase for p in places]


def test_every_kernel_of_a_step_has_its_phase():
    found = phases(FORWARD + BACKWARD)
    forward = ["sort by expert"] + ["permute x"] + ["H = rows @ up.T"] * 2 + ["A = act(H)"]
    forward += ["Y = A @ down.T"] * 2 + ["weighted sum of Y"]
    backward = ["permute dO"] + ["dA = dO @ down"] * 2 + ["dH, weighted A, dw"]
    backward += ["d_down = dO.T @ A"] * 2 + ["zero empty experts"] + ["d_rows = dH @ up"] * 2
    backward += ["sum of d_rows", "permute x again"] + ["d_up = dH.T @ rows"] * 2
    assert found == forward + backward + ["zero empty experts"]
    assert set(assign(FORWARD + BACKWARD, GIVEN_ROUTING)) == set(range(len(GIVEN_ROUTING)))


def test_our_own_products():
    sort, total = FORWARD[0], FORWARD[-1]
    rows = "lightning_fastmoe::hopper::ragged_rows_kernel<bf16, StoreRows<bf16>>(...)"
    dots = "lightning_fastmoe::hopper::reduce_dots_kernel(...)"
    gradient = "hopper::weight_gradient_kernel<bf16>(...)"
    splits = "hopper::reduce_splits_kernel(...)"
    last_wave = "hopper::reduce_last_wave_kernel<bf16>(...)"
    sums = (total, rows, dots, gradient, splits, rows, total)
    own = [sort, rows, rows, *sums, gradient, splits]
    assert table_for(own, module=False) is GIVEN_ROUTING_HOPPER
    assert phases(own, GIVEN_ROUTING_HOPPER) == [
        *("sort by expert", "H, A = act(H); x gathered", "Y = A @ down.T", "weighted sum of Y"),
        *(
            "dH, weighted A, dw; dO gathered",
            "dw, sum over N tiles",
            "d_down = dO.T @ A, gathered",
        ),
        *("splits of d_down", "d_rows = dH @ up", "sum of d_rows", "d_up = dH.T @ x, gathered"),
        "splits of d_up",
    ]
    # A weight gradient whose last wave may be split: both kernels run, one of them for nothing.
    split = [n for name in own for n in ((last_wave, name) if name == splits else (name,))]
    assert [p for p in phases(split, GIVEN_ROUTING_HOPPER) if p and "last wave" not in p] == [
        *phases(own, GIVEN_ROUTING_HOPPER)
    ]
    assert phases(split, GIVEN_ROUTING_HOPPER).count(None) == 0
    one_expert_per_token = [name for name in own if name != total]
    found = phases(one_expert_per_token, GIVEN_ROUTING_HOPPER)
    assert found == [p for p in phases(own, GIVEN_ROUTING_HOPPER) if "sum of" not in p]
    assert table_for(FORWARD, module=True) is WHOLE_MODULE


def test_unknown_kernels_are_nobodys_and_shift_nothing():
    names = [NORM, *FORWARD[:6], NORM, *FORWARD[6:], NORM, *BACKWARD, NORM]
    found = phases(names)
    assert [name for name, phase in zip(names, found, strict=True) if phase is None] == [NORM] * 4
    assert [phase for phase in found if phase] == phases(FORWARD + BACKWARD)


def test_a_kernel_that_is_gone_shifts_nothing():
    found = phases([name for name in FORWARD if "activation" not in name] + BACKWARD)
    assert "A = act(H)" not in found
    assert found[2:7] == ["H = rows @ up.T"] * 2 + ["Y = A @ down.T"] * 2 + ["weighted sum of Y"]


def test_the_module_routes_before_and_after():
    small = "void gemmSN_TN_kernel<float>(...)"
    names = [NORM, small, "route_kernel", *FORWARD, "cub::scan", NORM, *BACKWARD, small, NORM]
    found = phases(names, WHOLE_MODULE)
    assert found[:3] == ["router, softmax, top-k"] * 3
    assert found[11:13] == ["losses, both ways"] * 2
    assert found[-2:] == ["router, backward"] * 2
    assert None not in found
    assert found[3:11] + found[13:-2] == phases(FORWARD + BACKWARD)


def test_medians_are_over_steps_of_the_most_common_sequence():
    steps = [[("a", 1.0), ("b", 5.0)], [("a", 3.0), ("b", 7.0)], [("a", 2.0), ("b", 9.0)]]
    assert medians([*steps, [("a", 100.0)]]) == [("a", 2.0), ("b", 7.0)]


def test_nothing_is_lost_in_the_report():
    names = [NORM, *FORWARD, *BACKWARD]
    kernels = [(name, float(i + 1)) for i, name in enumerate(names)]
    sizes, rates = Sizes.of(CONFIGS["sonic-7b"]), Rates(800, 3000)
    report = make_report(kernels, 1.0, GIVEN_ROUTING, sizes, rates)
    total = sum(us for _, us in kernels)
    assert sum(p["us"] for p in report["phases"]) + report["other_us"] == total
    assert report["kernels_us"] == total
    assert report["gaps_us"] == 1000 - total
    assert report["other"] == [{"name": NORM, "us": 1.0}]
    by_name = {phase["phase"]: phase for phase in report["phases"]}
    assert by_name["H = rows @ up.T"]["us"] == 4 + 5
    assert by_name["H = rows @ up.T"]["floor_us"] == floors.up_product(sizes).floor_us(rates)
    text = markdown(report, "title")
    assert "| other | | 1.0 |" in text
    assert "2 x " not in text.split("prepare")[0].split("| sort |")[0]


def test_a_phase_that_was_not_seen_is_said():
    kernels = [(name, 1.0) for name in FORWARD]
    report = make_report(kernels, 1.0, GIVEN_ROUTING, GATED, Rates(800, 3000))
    text = markdown(report, "title")
    assert text.count("not seen") == len(GIVEN_ROUTING) - 6
