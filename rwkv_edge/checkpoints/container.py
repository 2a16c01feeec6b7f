"""What is in one file, whatever container it is: told by its first bytes, never by its name."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import magic
from ..errors import CheckpointError
from ..files import Record
from .gguf import read_gguf
from .pth import read_pth
from .safetensors import read_safetensors

QUANTIZED = "rwkv-edge quantized"  # metadata key of our own quantized checkpoints

_WEIGHTS = ("F32", "F16", "BF16", "F64")

# quantized checkpoints of others: patterns that the names must have, one each, and the format. The first that fits is named.
# Sources: bitsandbytes, functional.py, QuantState; AutoGPTQ and AutoAWQ, nn_modules/qlinear; mlx, python/mlx/nn/layers/
# quantized.py; HQQ, core/quantize.py; compressed-tensors, compressors/; DeepSeek-V3's fp8; optimum-quanto; SmoothQuant
_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((r"\.(quant_state\.|quant_map$|absmax$|SCB$|weight_format$)",), "bitsandbytes"),
    ((r"\.qweight$", r"\.g_idx$"), "GPTQ"),
    ((r"\.qweight$", r"\.qzeros$"), "AWQ"),
    ((r"\.weight_packed$",), "compressed-tensors"),
    ((r"\.W_q$",), "HQQ"),
    ((r"\.weight\._data$",), "quanto"),
    ((r"\.weight_scale_inv$",), "fp8"),
    ((r"\.scales$", r"\.biases$"), "mlx"),
    ((r"\.weight_scale$",), "compressed-tensors or fp8"),
)


@dataclass(frozen=True)
class Held:
    """What one file holds: tensors by the names in it.

    notes  on what was left out, or read in an unusual way
    half   it is a safetensors file in which every tensor is float16
    """

    records: dict[str, Record]
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()
    half: bool = False


def read_file(path: Path) -> Held:
    """Find every tensor of one file; reads no weights.

    Of our own quantized checkpoints every tensor is given, of other files those that are weights.

    Raises  CheckpointError if the file is missing, damaged or something else, or a tensor is not of floating-point numbers.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
        raise CheckpointError(f"{path} is no regular file")
    try:
        head = magic.read_head(path)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    if head[:2] == b"PK":
        held = Held(*_pth(path))
    elif head[8:9] == b"{":
        records, metadata = read_safetensors(path)
        held = Held(records, metadata, half=all(r.dtype == "F16" for r in records.values()))
    elif head[:4] == b"GGUF":
        return Held(*read_gguf(path))
    elif head[:1] == b"\x80":
        raise CheckpointError(f"{path} is a legacy torch file (before 1.6): load and save it once with torch.save")
    else:
        why = magic.explain(head) or "is neither a torch checkpoint (.pth) nor safetensors nor GGUF: give one of these"
        raise CheckpointError(f"{path} {why}")
    return held if QUANTIZED in held.metadata else _weights(path, held)


def _pth(path: Path) -> tuple[dict[str, Record], dict[str, Any], tuple[str, ...]]:
    records, notes = read_pth(path)
    return records, {}, notes


def _weights(path: Path, held: Held) -> Held:
    """Leave out counters, and refuse everything else that is not of floating-point numbers, by the first name."""
    counters = [name for name, r in held.records.items() if math.prod(r.shape) == 1 and _is_counter(name, r)]
    records = {name: r for name, r in held.records.items() if name not in counters}
    other = next((name for name in sorted(records) if records[name].dtype not in _WEIGHTS), None)
    if other is not None:
        kind = quantized_format(held.records) or ("fp8" if re.match("(?i)f(loat)?8_", records[other].dtype) else None)
        what = f"the weights are quantized by {kind}" if kind else "it is no weight, or the weights are quantized"
        raise CheckpointError(
            f"{path}: {other} is stored as {records[other].dtype}: only float32, float16, bfloat16 and float64 can be read, "
            f"and {what}: give the original checkpoint, not quantized"
        )
    notes = list(held.notes)
    if counters:
        notes.append(f"{path.name}: left out what is one number and no weight: {', '.join(sorted(counters)[:3])}")
    if any(r.dtype == "F64" for r in records.values()):
        notes.append(f"{path.name}: float64 weights are read as float32")
    return replace(held, records=records, notes=tuple(notes))


def _is_counter(name: str, record: Record) -> bool:
    """One number that counts, such as num_batches_tracked, or that stands beside the weights, such as global_step."""
    return record.dtype not in _WEIGHTS or "." not in name


def quantized_format(names: Iterable[str]) -> str | None:
    """The quantized format of others that these names belong to, if it is a known one."""
    names = list(names)
    for patterns, kind in _FORMATS:
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns):
            return kind
    return None
