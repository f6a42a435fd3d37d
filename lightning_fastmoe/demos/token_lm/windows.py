"""Windows of token ids from a memory-mapped file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_fastmoe.demos.token_lm.format import TokenManifest, token_file
from lightning_fastmoe.demos.windows import WindowStarts


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Contiguous windows of ``seq_len + 1`` tokens, over documents' boundaries.

    Adjacent windows share one token: whatever is predicted is predicted once. A window is a dict
    in the conventions of ``MoECausalLM``:

    - ``input_ids (seq_len + 1,)`` int64;
    - ``position_ids (seq_len + 1,)`` int64, which count from 0 in each document, and in the part of
      a document that a window begins with; missing unless ``separate_documents``.

    Args:
        folder: the directory of token files.
        manifest: its content.
        split: "train" or "val".
        seq_len: predictions per window.
        max_windows: keep this many, evenly spaced; None keeps all.
        separate_documents: whether a document sees only itself.
    """

    def __init__(
        self,
        folder: Path,
        manifest: TokenManifest,
        split: str,
        seq_len: int,
        max_windows: int | None = None,
        *,
        separate_documents: bool = True,
    ) -> None:
        self._path = token_file(folder, split)
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._eos_id = manifest.eos_id
        self._seq_len = seq_len
        self._separate = separate_documents
        self._starts = WindowStarts(manifest.splits[split].tokens, seq_len, max_windows)
        self._tokens: np.memmap[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self._starts)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._starts[index]
        if self._tokens is None:
            self._tokens = np.memmap(self._path, self._dtype, mode="r")
        window = self._tokens[start : start + self._seq_len + 1]
        tokens = torch.from_numpy(window.astype(np.int64))
        if not self._separate:
            return {"input_ids": tokens}
        return {"input_ids": tokens, "position_ids": self._positions(tokens)}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would be a copy of the whole file, for each worker that is spawned.
        return {**self.__dict__, "_tokens": None}

    def _positions(self, tokens: Tensor) -> Tensor:
        indices = torch.arange(len(tokens))
        begins = torch.zeros_like(indices)  # of the document that each token is in
        begins[1:] = indices[1:].where(tokens[:-1] == self._eos_id, 0)
        return indices - begins.cummax(0).values
