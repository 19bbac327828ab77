"""Writing safetensors one tensor at a time: a model of any size needs the memory of its largest tensor.

The bytes depend on the names, values, dtypes and metadata alone: tensors lie in the order of the safetensors library
(larger items first, then by name), and the metadata is sorted, which the library leaves to chance.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made only when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


Source = Tensor | Lazy


def write(
    path: Path,
    tensors: Mapping[str, Source],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    whole: bool = False,
) -> str:
    """Write a safetensors file, not atomically; gives the SHA-256 of all bytes after its header, or of the `whole`.

    With `dtype` every tensor of floating-point numbers is cast to it; a value that it cannot hold is an error.
    """
    kinds = {
        name: dtype if dtype and source.dtype.is_floating_point else source.dtype for name, source in tensors.items()
    }
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    head, at = {"__metadata__": dict(sorted(metadata.items()))}, 0
    entries: dict[str, object] = {}
    for name in order:
        size = kinds[name].itemsize * math.prod(tensors[name].shape)
        entries[name] = {
            "dtype": DTYPES[kinds[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = header_bytes({**head, **entries})
        if whole:
            digest.update(header)
        file.write(header)
        for name in order:
            source = tensors[name]
            content = _bytes(name, source.make() if isinstance(source, Lazy) else source, kinds[name])
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def header_bytes(tree: Mapping[str, object]) -> bytes:
    """The header as the safetensors library writes it: its length in 8 bytes, then compact JSON, padded to 8 bytes."""
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> Any:
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and bool(tensor.isfinite().all()) and not bool(cast.isfinite().all()):
        raise UserError(
            f"{name} holds values beyond {str(dtype).removeprefix('torch.')}, up to {tensor.abs().max():.3g}",
            "--dtype",
            "choose bf16, which has the range of fp32, or leave the dtype as it is",
        )
    return cast.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
