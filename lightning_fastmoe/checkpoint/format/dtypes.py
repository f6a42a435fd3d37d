"""The dtypes that can be stored, and their names in safetensors."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
"""safetensors name -> dtype, for the dtypes that can be stored."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return DTYPES[dtype].itemsize
