"""The data types of PyTorch that tensor files have."""

from __future__ import annotations

import torch

DTYPES: dict[torch.dtype, str] = {
    getattr(torch, name): spelling
    for name, spelling in {
        "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
        "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
        "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
        "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float4_e2m1fn_x2": "F4",
    }.items()
    if hasattr(torch, name)  # the last ones came with torch 2.7 and 2.8
}  # fmt: skip
"""How tensor files spell a data type."""
TORCH_DTYPES = {spelling: dtype for dtype, spelling in DTYPES.items()}
"""The reverse."""
