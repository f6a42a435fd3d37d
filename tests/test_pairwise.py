"""What is left of a product of parameters has all pairs of values, and is always the same."""

from __future__ import annotations

from itertools import combinations as choices
from itertools import product

from pairwise import combinations, cover, covering

AXES = ((1, 2, 4), (1, 2, 3), ("fp32", "bf16"), (False, True), "abcde")
KEYS = list(product(*AXES))


def pairs(keys):
    return {pair for key in keys for pair in choices(enumerate(key), 2)}


def test_every_pair_and_the_last_are_there():
    some = cover(KEYS)
    assert pairs(KEYS[i] for i in some) == pairs(KEYS)
    assert some == sorted(set(some))
    assert some[-1] == len(KEYS) - 1
    assert len(some) <= 20  # of 180; no set has less than 3 * 5


def test_two_axes_are_kept_whole():
    assert cover(list(product(range(3), range(4)))) == list(range(12))


def test_only_what_some_row_has_is_asked_for():
    keys = [key for key in KEYS if key[0] >= key[1]]
    assert pairs(keys[i] for i in cover(keys)) == pairs(keys)


def test_the_same_every_time():
    assert cover(KEYS) == cover(list(KEYS))
    assert cover(list(product((1, 2), "ab", "xy"))) == [1, 2, 4, 7]


def test_marks_have_all_rows_and_places_of_some():
    names, rows, some, _ = combinations(world=[1, 2], ep=[[0], [1]], stage=[2, 3]).args
    assert names == "world,ep,stage"
    assert rows[-1] == (2, [1], 3)
    assert (len(rows), len(some)) == (8, 4)
    _, rows, some, _ = covering("row", [{"a": 1}, {"a": 2}], by=lambda row: (row["a"], 0)).args
    assert (len(rows), some) == (2, [0, 1])


SEEN = []


@combinations(a=[1, 2], b=[1, 2], c=[1, 2])
def test_pytest_runs_these(a, b, c, request):
    SEEN.append((a, b, c))
    whole = request.config.getoption("--all-combinations")
    assert len(SEEN) <= (8 if whole else 4)
    if SEEN[-1] == (2, 2, 2):
        assert pairs(SEEN) == pairs(product((1, 2), repeat=3))
