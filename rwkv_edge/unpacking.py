"""The proof's own reader of a bundle's weights: from the manifest's entries and raw bytes, by the documents alone.

It shares nothing with what packs weights and with what reads them elsewhere, so a mistake that both of those make shows.

Source  docs/bundle.md; onnxruntime, docs/ContribOperators.md, MatMulNBits and GatherBlockQuantized; coremltools 9.0, the
        documentation of constexpr_blockwise_shift_scale and constexpr_lut_to_dense (iOS 18), and MILBlob's sub-byte types
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Raw = npt.NDArray[Any]
Entry = Mapping[str, Any]  # of a tensor, or of some rows of one, in the manifest

_FLOATS = {"F32": "<f4", "F16": "<f2"}
_AT_ONCE = 1 << 20  # weights


def codes_of(data: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes of 4, 6 or 8 bits, one after the other along the last axis, each with its low bits first.

    4 bits   byte      a        bbbbaaaa
    6 bits   bytes a b c        bbaaaaaa ccccbbbb ddddddcc
    """
    if bits == 8:
        return data
    if bits == 4:
        codes = [data % 16, data // 16]
    else:
        a, b, c = (data[..., i::3] for i in range(3))
        codes = [a % 64, a // 64 + b % 16 * 4, b // 16 + c % 4 * 16, c // 4]
    return np.stack(codes, axis=-1).reshape(*data.shape[:-1], -1)


def signed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int16]:
    """Two's complement: the upper half of all codes stands for the negative numbers."""
    wide: npt.NDArray[np.int16] = codes.astype(np.int16)
    wide[wide >= 2 ** (bits - 1)] -= 2**bits
    return wide


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor as a file holds them.

    numbers  floats as they are stored; codes (n, I), less their zero; or indices (n, I)
    scales   (n, blocks) float32, or None
    tables   (n / rows of a table, 2**bits) float32, or None
    block    inputs that share a scale
    factor   what all is multiplied by
    """

    numbers: Raw
    scales: Array | None
    tables: Array | None
    block: int
    factor: float

    def weights(self) -> Array:
        """The weights that they stand for."""
        if self.tables is not None:
            by_table = self.numbers.reshape(len(self.tables), -1).astype(np.intp)
            w = np.take_along_axis(self.tables, by_table, axis=1).reshape(self.numbers.shape)
        elif self.scales is not None:
            w = np.repeat(self.scales, self.block, axis=1)[:, : self.numbers.shape[1]] * self.numbers
        else:
            w = self.numbers.astype(np.float32)
        return w.astype(np.float32) * np.float32(self.factor)


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor that lie together.

    start  the first of them in the tensor
    """

    folder: Path
    entry: Entry
    start: int

    @property
    def n_rows(self) -> int:
        n: int = self.entry["shape"][0]
        return n

    @property
    def coreml(self) -> bool:
        """Whether it lies in a package."""
        return "factor" in self.entry

    def read(self, start: int, stop: int) -> Rows:
        """Read some of its rows, whole tables of them, and nothing else."""
        e = self.entry
        n, n_in, bits, factor = stop - start, math.prod(e["shape"][1:]), e["bits"], float(e.get("factor", 1.0))
        if e.get("rows"):
            data = self._bytes(e["offset"], n_in * bits // 8, start, stop)
            tables = self._bytes(e["scales"]["offset"], 2 * 2**bits, start // e["rows"], stop // e["rows"]).view("<f2")
            return Rows(codes_of(data, bits), None, tables.astype(np.float32), 0, factor)
        if e["block"] and self.coreml:
            data = self._bytes(e["offset"], n_in * bits // 8, start, stop)
            scales = self._bytes(e["scales"]["offset"], 2 * (n_in // e["block"]), start, stop).view("<f2")
            return Rows(signed(codes_of(data, bits), bits), scales.astype(np.float32), None, e["block"], factor)
        if e["block"]:
            n_blocks = -(-n_in // e["block"])
            data = self._bytes(e["offset"], n_blocks * e["block"] * bits // 8, start, stop)
            scales = self._bytes(e["scales"]["offset"], 4 * n_blocks, start, stop).view("<f4")
            codes = codes_of(data, bits)[:, :n_in].astype(np.int16) - np.int16(2 ** (bits - 1))
            return Rows(codes, scales, None, e["block"], factor)
        floats = self._bytes(e["offset"], n_in * bits // 8, start, stop).view(_FLOATS[e["dtype"]])
        return Rows(floats.reshape(n, *e["shape"][1:]), None, None, 0, factor)

    def _bytes(self, offset: int, per_row: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The bytes of some rows, (n, bytes)."""
        n = (stop - start) * per_row
        data = np.fromfile(self.folder / self.entry["file"], np.uint8, n, offset=offset + start * per_row)
        return data.reshape(stop - start, per_row)


def pieces(folder: Path, entry: Entry | Sequence[Entry]) -> Iterator[Piece]:
    """Where the rows of a tensor lie, in their order."""
    start = 0
    for e in [entry] if isinstance(entry, Mapping) else entry:
        yield Piece(folder, e, start)
        start += e["shape"][0]


class Weights(Mapping[str, Array]):
    """A bundle's weights by name, in float32: read when asked for and not kept."""

    def __init__(self, folder: Path, tensors: Mapping[str, Any]) -> None:
        self._folder, self._tensors = folder, tensors

    def __getitem__(self, name: str) -> Array:
        parts = list(pieces(self._folder, self._tensors[name]))
        last, first = parts[-1], parts[0].entry
        out = np.empty((last.start + last.n_rows, *first["shape"][1:]), np.float32)
        for piece in parts:
            for start, stop in spans(piece):
                out[piece.start + start : piece.start + stop] = piece.read(start, stop).weights()
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def spans(piece: Piece) -> Iterator[tuple[int, int]]:
    """Blocks of a piece's rows that are worth a read and small in memory: about a million weights, and whole tables."""
    per_table = piece.entry.get("rows") or 1
    step = max(1, _AT_ONCE // math.prod(piece.entry["shape"][1:]) // per_table) * per_table
    for start in range(0, piece.n_rows, step):
        yield start, min(start + step, piece.n_rows)
