"""Windows, and who attends to whom after a shift, against the definition in loops."""

from __future__ import annotations

import pytest
import torch

from lightning_fastmoe.demos.vision.windows import shift_mask, window_partition, window_reverse


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 4), (6, 9, 3), (4, 4, 4), (2, 4, 1)])
def test_windows_hold_the_tokens_of_their_square(height: int, width: int, size: int) -> None:
    x = torch.randn(2, height, width, 3)
    windows = window_partition(x, size)
    expected = [
        [
            x[image, top + token // size, left + token % size]
            for token in range(size * size)
        ]
        for image in range(2)
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]  # fmt: skip
    assert torch.equal(windows, torch.stack([torch.stack(window) for window in expected]))
    assert torch.equal(window_reverse(windows, size, height, width), x)


@pytest.mark.parametrize(
    ("height", "width", "size", "shift"),
    [(8, 8, 4, 2), (8, 12, 4, 1), (9, 6, 3, 1), (4, 4, 4, 2), (8, 8, 4, 0)],
)
def test_tokens_attend_to_neighbours_of_the_same_window_and_region(
    height: int, width: int, size: int, shift: int
) -> None:
    """Tokens are named by their place in the image, and are rolled like the grid is."""
    places = [(row, column) for row in range(height) for column in range(width)]
    grid = torch.arange(height * width).view(1, height, width, 1)
    rolled = torch.roll(grid, (-shift, -shift), dims=(1, 2))
    members = window_partition(rolled, size).squeeze(-1)
    mask = shift_mask(height, width, size, shift)
    assert mask.shape == (len(members), size * size, size * size)
    found = {
        (int(a), int(b))
        for window, allowed in zip(members, mask, strict=True)
        for a, row in zip(window, allowed, strict=True)
        for b, attends in zip(window, row, strict=True)
        if attends
    }

    def window_of(row: int, column: int) -> tuple[int, int]:
        """The window of a grid that starts `shift` before the image, so that none wraps."""
        return (row + size - shift) // size, (column + size - shift) // size

    expected = {
        (i, j)
        for i, a in enumerate(places)
        for j, b in enumerate(places)
        if window_of(*a) == window_of(*b)
    }
    assert found == expected
