"""GGUF files of llama.cpp: their header, read with care, and their quantized types through the gguf package.

The package's own reader makes an array of every token of the vocabulary and trusts the counts in the file; only what a block
of weights means is asked of it, and only for files that have such blocks.
Source: github.com/ggml-org/ggml, docs/gguf.md; github.com/ggml-org/llama.cpp, conversion/rwkv.py, gguf-py/gguf/constants.py
"""

import itertools
import math
import re
import struct
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..files import Packing, Record
from ..qtensor import Array
from .names import Table, rename, split

_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # value types, as struct calls them
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 16  # of metadata, and of tensors: real files have less than 100 and 2000
_MAX_TEXT = 1 << 24

_COMMON: Table = (
    (r"^token_embd\.", "emb."),
    (r"^token_embd_norm\.", "blocks.0.ln0."),
    (r"^output_norm\.", "ln_out."),
    (r"^output\.", "head."),
    (r"^blk\.", "blocks."),
    (r"\.attn_norm\.", ".ln1."),
    (r"\.attn_norm_2\.", ".ln2."),
    (r"\.time_mix_ln\.", ".att.ln_x."),
    (r"\.time_mix_(receptance|key|value|gate|output)\.", r".att.\1."),
    (r"\.channel_mix_(receptance|key|value)\.", r".ffn.\1."),
)
_TABLES: dict[str, Table] = {
    "rwkv6": (
        *_COMMON,
        (r"\.time_mix_lerp_(\w+)\.weight$", r".att.time_maa_\1"),
        (r"\.time_mix_(w1|w2)\.weight$", r".att.time_maa_\1"),
        (r"\.time_mix_first\.weight$", ".att.time_faaaa"),
        (r"\.time_mix_(decay|decay_w1|decay_w2)\.weight$", r".att.time_\1"),
        (r"\.channel_mix_lerp_(\w)\.weight$", r".ffn.time_maa_\1"),
    ),
    "rwkv7": (
        *_COMMON,
        (r"\.time_mix_lerp_(\w+)\.weight$", r".att.x_\1"),
        (r"\.time_mix_([wavg][012]|k_k|k_a|r_k)\.weight$", r".att.\1"),
        (r"\.channel_mix_lerp_(\w)\.weight$", r".ffn.x_\1"),
    ),
}
_DIVIDED = re.compile(r"blocks\.(\d+)\.(att\.output|ffn\.value)\.weight")  # of RWKV-6, by 2 every few layers


def read_gguf(path: Path) -> tuple[dict[str, Record], dict[str, Any]]:
    """Find every tensor under its official name, and the metadata; matrices are (outputs, inputs), low-rank factors too.

    Raises  CheckpointError if the header is damaged, the architecture is another one, or a type needs the gguf package.
    """
    try:
        with open(path, "rb") as f:
            about, records = _Header(path, f).read()
            return _official(about, records), about
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, struct.error) as e:
        raise CheckpointError(f"{path} is damaged or cut short ({e}). Download it again") from e


def _official(about: dict[str, Any], records: dict[str, Record]) -> dict[str, Record]:
    """Undo what the converter does to names, and to the weights of RWKV-6."""
    version: str = about["general.architecture"]
    records = rename(records, _TABLES[version])
    if version == "rwkv7":
        records = split(records, "x_fused", "x_", "rwkvag")
        shaped = "r_k"
    else:
        records = split(records, "time_maa_fused", "time_maa_", "wkvrg")
        shaped = "time_faaaa"
    N, every = about.get(f"{version}.wkv.head_size"), about.get("rwkv6.rescale_every_n_layers", 0) if version == "rwkv6" else 0
    if type(N) is not int or N < 1:
        raise CheckpointError(f"{version}.wkv.head_size is {N!r}: expected a number of channels. Convert the model again")
    if type(every) is not int or every < 0:
        raise CheckpointError(f"rwkv6.rescale_every_n_layers is {every!r}: expected a number. Convert the model again")
    for name, r in records.items():
        n = math.prod(r.shape)
        if name.endswith(f".att.{shaped}") and n % N == 0:  # stored flat, or without an axis of one head
            records[name] = replace(r, shape=(n // N, N))
        if every and (divided := _DIVIDED.match(name)):
            n_times = min(int(divided[1]) // every, 99)  # no model has more: a higher layer is refused with its name
            records[name] = replace(r, factor=2.0**n_times)
    return records


@dataclass(frozen=True)
class Texts:
    """A list of texts in a file's metadata, such as its vocabulary: read when it is asked for."""

    path: Path
    offset: int
    n: int

    def __repr__(self) -> str:
        return f"a list of {self.n} texts"

    def read(self) -> list[bytes]:
        """Raises  CheckpointError if the file was changed meanwhile."""
        try:
            with open(self.path, "rb") as f:
                f.seek(self.offset)
                return [f.read(*struct.unpack("<Q", f.read(8))) for _ in range(self.n)]
        except (OSError, struct.error) as e:
            raise CheckpointError(f"cannot read {self.path}: {e}") from e


class _Header:
    """A GGUF file's header as it is read: every length is held against what the file has left."""

    def __init__(self, path: Path, f: BinaryIO) -> None:
        self.path, self.f, self.size = path, f, path.stat().st_size

    def read(self) -> tuple[dict[str, Any], dict[str, Record]]:
        """Give the metadata, and the tensors by llama.cpp's names."""
        self.take(4)
        version, n_tensors, n_about = self.numbers("IQQ")
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version}: this release reads 2 and 3. Convert the model again")
        if max(n_tensors, n_about) > _MAX_ENTRIES:
            raise ValueError(f"{n_tensors} tensors and {n_about} entries of metadata")
        about: dict[str, Any] = {}
        for _ in range(n_about):
            key = self.name()
            if key in about:
                raise ValueError(f"{key} stands in it twice")
            about[key] = self.value(*self.numbers("I"))
        if about.get("general.type", "model") != "model":
            raise CheckpointError(
                f"general.type is {about['general.type']!r}, expected 'model': give the model. Of a LoRA (adapter), give "
                "the .pth or safetensors that it was made from, with --lora"
            )
        architecture, parts = about.get("general.architecture"), about.get("split.count", 1)
        if architecture not in _TABLES:
            raise CheckpointError(
                f"general.architecture is {architecture!r}, expected {' or '.join(_TABLES)}: "
                "other models, and hybrids such as arwkv7 and rwkv6qwen2, cannot be exported"
            )
        if parts not in (0, 1):
            raise CheckpointError(f"split.count is {parts}: it is one of several parts. Merge them with llama-gguf-split first")
        entries = [(self.name(), *self.tensor()) for _ in range(n_tensors)]
        alignment = about.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment}")
        base = -(-self.f.tell() // alignment) * alignment
        records: dict[str, Record] = {}
        for name, shape, kind, offset in entries:
            if name in records:
                raise ValueError(f"{name} stands in it twice")
            packing = None if kind in _PLAIN else _packing(kind)
            record = Record(self.path, base + offset, _PLAIN[kind] if packing is None else _type_name(kind), shape, packing)
            if packing and (max(shape[:-1], default=1) == 1 or "_lerp_" in name or shape[-1] % packing.n_weights):
                raise ValueError(f"{name} of shape {shape} is stored as {record.dtype}: expected a matrix of whole blocks")
            if offset % alignment or record.offset + record.nbytes > self.size:
                raise ValueError(f"{name} of shape {shape} does not fit the file")
            records[name] = record
        ordered = sorted(records.items(), key=lambda item: item[1].offset)
        for (a, first), (b, second) in itertools.pairwise(ordered):
            if first.offset + first.nbytes > second.offset:
                raise ValueError(f"{a} and {b} overlap")
        return about, records

    def take(self, n: int) -> bytes:
        if n > min(_MAX_TEXT, self.size - self.f.tell()):
            raise ValueError(f"{n} bytes expected at {self.f.tell()} of {self.size}")
        return self.f.read(n)

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def text(self) -> str:
        return self.take(*self.numbers("Q")).decode()

    def name(self) -> str:
        name = self.text()
        if not name.isprintable():
            raise ValueError(f"a name is {name!r}")
        return name

    def value(self, kind: int) -> Any:
        """A value of metadata; of a list of texts its place, of other lists nothing."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind}")
        kind, n = self.numbers("IQ")
        each = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS[kind]) if kind in _SCALARS else self.size
        if n * each > self.size - self.f.tell():
            raise ValueError(f"a list of {n} values of type {kind}")
        if kind != _STRING:
            self.f.seek(n * each, 1)
            return None
        texts = Texts(self.path, self.f.tell(), n)
        for _ in range(n):
            self.take(*self.numbers("Q"))
        return texts

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and place of a tensor."""
        (n_axes,) = self.numbers("I")
        if not 1 <= n_axes <= 4:
            raise ValueError(f"a tensor has {n_axes} axes")
        shape = self.numbers("Q" * n_axes)[::-1]  # the file has the inputs first
        if min(shape) < 1 or math.prod(shape) > 8 * self.size:
            raise ValueError(f"a tensor has shape {shape}")
        kind, offset = self.numbers("IQ")
        return shape, kind, offset


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as e:
        raise CheckpointError("a quantized GGUF file needs the gguf package: pip install 'rwkv-edge[gguf]'") from e
    return gguf


def _type_name(kind: int) -> str:
    return str(_gguf().GGMLQuantizationType(kind).name)


@cache
def _packing(kind: int) -> Packing:
    """How many weights and bytes a block of a type has, and what reads it."""
    gguf = _gguf()
    try:
        quant = gguf.GGMLQuantizationType(kind)
    except ValueError as e:
        raise CheckpointError(f"a tensor has type {kind}, which this gguf package does not know: update it") from e

    def unpack(data: npt.NDArray[np.uint8]) -> Array:
        with np.errstate(all="ignore"):  # a scale that is not finite is found where weights are read
            rows: Array = gguf.dequantize(data, quant)
        return rows

    n_weights, nbytes = gguf.GGML_QUANT_SIZES[quant]
    try:
        unpack(np.zeros((1, nbytes), np.uint8))
    except NotImplementedError as e:
        raise CheckpointError(
            f"a tensor is stored as {quant.name}, which the gguf package cannot read: use another type"
        ) from e
    return Packing(n_weights, nbytes, unpack)
