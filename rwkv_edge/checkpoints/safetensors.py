"""safetensors files: their header, read with care, and written so that the data can follow in a stream.

The safetensors package reads whole tensors into memory, and numpy has no bfloat16; state files, which are small, use it.
Source: github.com/huggingface/safetensors, README, "Format"
"""

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import DTYPES, Record
from ..spec import Shape

_MAX_HEADER = 1 << 24  # a 14B checkpoint's has 300 kB; parsed, a damaged one can take 25 times its bytes
_MAX_AXES = 16  # the product of very many sizes would take forever


def read_safetensors(path: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Find every tensor, of a type that can be read or of another, and the metadata; reads the header only.

    Raises  CheckpointError if the header is oversized, no JSON, or does not fit the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            head = f.read(8)
            n = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= n <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} has a header of {n} bytes in a file of {size}: it is damaged or cut short")
            header = json.loads(f.read(n), object_pairs_hook=unique)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} has a damaged header: {e}. Download it again") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: a list of tensors by name is expected")
    unprintable = next((name for name in header if not name.isprintable()), None)
    if unprintable is not None:
        raise CheckpointError(f"{path} has a damaged header: a name is {unprintable!r}. Download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has damaged metadata")
    records = {name: _record(path, 8 + n, size, name, t) for name, t in header.items()}
    ordered = sorted((i for i in records.items() if i[1].dtype in DTYPES), key=lambda item: item[1].offset)
    for (a, first), (b, second) in itertools.pairwise(ordered):
        if first.offset + first.nbytes > second.offset:
            raise CheckpointError(f"{path}: {a} and {b} overlap: the header is damaged")
    return records, metadata


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name stands twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def _record(path: Path, base: int, size: int, name: str, entry: Any) -> Record:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        ok = len(shape) <= _MAX_AXES and all(type(v) is int and v >= 0 for v in (start, stop, *shape))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: the header's entry for {name} is damaged") from e
    if not isinstance(dtype, str):
        raise CheckpointError(f"{path}: {name} is stored as {dtype}: the header is damaged. Download it again")
    if ok and dtype not in DTYPES:
        return Record(path, base + start, dtype, shape)
    if not ok or stop - start != math.prod(shape) * DTYPES[dtype].itemsize or base + stop > size or stop == start:
        raise CheckpointError(
            f"{path}: {name} of shape {list(shape[:_MAX_AXES])} does not fit the file: it is damaged or cut short"
        )
    return Record(path, base + start, dtype, shape)


def header(tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> bytes:
    """Give the bytes before the data of a file with these tensors (dtype, shape), whose data follows in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
