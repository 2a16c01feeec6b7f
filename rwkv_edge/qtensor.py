"""Quantized matrices: all that quantizers, exporters and the reference share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Packed = npt.NDArray[np.uint8]
Indices = npt.NDArray[Any]

BLOCKS = (16, 32, 64, 128, 256)  # what MatMulNBits takes
HALF_NORMAL = 2.0**-14  # the smallest normal number of float16: a unit may take those below as 0


@dataclass(frozen=True)
class QTensor:
    """A matrix as small integers and one scale for every block of inputs: w = scale * code.

    codes   (O, I) int8, from -2**(bits-1) to 2**(bits-1) - 1
    scales  (O, ceil(I / block)) float32, of either sign
    bits    4 or 8
    block   weights along I that share one scale, or all of I; the last block may be short
    """

    codes: Codes
    scales: Array
    bits: int
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        n_out, n_in = self.codes.shape
        return n_out, n_in

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the scales, as they lie on disk."""
        return sum(packed_bytes(self.shape, self.bits, self.block))

    def dequantize(self) -> Array:
        """Give the weights that the codes stand for, (O, I) float32."""
        scales = np.repeat(self.scales, self.block, axis=1)[:, : self.codes.shape[1]]
        return np.multiply(self.codes, scales, dtype=np.float32)

    def take(self, rows: Indices) -> "QTensor":
        """Give these rows only, in this order."""
        return QTensor(self.codes[rows], self.scales[rows], self.bits, self.block)

    def pack(self) -> Packed:
        """Lay the codes out as onnxruntime's MatMulNBits reads them.

        Returns  (O, blocks, block * bits / 8) uint8: codes + 2**(bits-1), two to a byte at 4 bits, the first in the low
                 half; a short last block is filled with the code of zero
        Source   onnxruntime, docs/ContribOperators.md, MatMulNBits
        """
        n_out, n_in = self.codes.shape
        n_blocks = self.scales.shape[1]
        zero = 1 << (self.bits - 1)
        padded = np.full((n_out, n_blocks * self.block), zero, np.uint8)
        np.add(self.codes, zero, out=padded[:, :n_in], dtype=np.int16, casting="unsafe")
        if self.bits == 4:
            padded = padded[:, 0::2] | padded[:, 1::2] << 4
        return padded.reshape(n_out, n_blocks, -1)

    @classmethod
    def unpack(cls, packed: Packed, scales: Array, *, bits: int, block: int, n_in: int) -> "QTensor":
        """Read what `pack` has written."""
        flat = packed.reshape(packed.shape[0], -1)
        if bits == 4:
            flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(flat.shape[0], -1)
        codes = (flat[:, :n_in].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        return cls(codes, scales, bits, block)


def pack_bits(codes: npt.NDArray[Any], bits: int) -> bytes:
    """Lay codes of 4 or 6 bits out one after the other, low bits first, as Core ML reads them.

    codes  whose number fills whole bytes; of signed ones the low bits are taken
    """
    x = codes.reshape(-1, 8 // math.gcd(bits, 8)).astype(np.uint32) & ((1 << bits) - 1)
    word = np.bitwise_or.reduce(x << (np.arange(x.shape[1], dtype=np.uint32) * bits), axis=1)
    packed: Packed = word.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : x.shape[1] * bits // 8]
    return packed.tobytes()


def unpack_bits(data: Packed, bits: int) -> Packed:
    """Read what `pack_bits` has written along the last axis."""
    n, nbytes = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    x = data.reshape(-1, nbytes)
    codes = np.empty((len(x), n), np.uint8)
    for i in range(n):
        byte, shift = divmod(i * bits, 8)
        code = x[:, byte] >> shift
        if shift + bits > 8:
            code |= x[:, byte + 1] << (8 - shift)
        codes[:, i] = code & ((1 << bits) - 1)
    return codes.reshape(*data.shape[:-1], -1)


def packed_bytes(shape: tuple[int, ...], bits: int, block: int) -> tuple[int, int]:
    """Bytes of the packed codes and of the scales of a (O, I) matrix."""
    n_out, n_in = shape
    n_blocks = -(-n_in // block)
    return n_out * n_blocks * block * bits // 8, n_out * n_blocks * 4


@dataclass(frozen=True)
class Lut:
    """A matrix as indices into tables, each shared by some rows: w = table[index].

    codes   (O, I) uint8, below 2**bits
    tables  (O / rows, 2**bits) float32, of values that float16 holds; ascending
    bits    4 or 6
    rows    consecutive rows that share one table
    """

    codes: Packed
    tables: Array
    bits: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        n_out, n_in = self.codes.shape
        return n_out, n_in

    @property
    def nbytes(self) -> int:
        """Bytes of the packed indices and of the tables in float16."""
        return -(-self.codes.size * self.bits // 8) + 2 * self.tables.size

    def dequantize(self) -> Array:
        """Give the weights that the indices stand for, (O, I) float32."""
        w = np.empty(self.codes.shape, np.float32)
        for i, table in enumerate(self.tables):  # one by one: numpy makes 8 bytes of every index
            group = slice(i * self.rows, (i + 1) * self.rows)
            w[group] = table[self.codes[group]]
        return w

    def take(self, rows: Indices) -> "Lut":
        """Give these rows only, in this order, each with a table of its own."""
        return Lut(self.codes[rows], self.tables[rows // self.rows], self.bits, 1)


@dataclass(frozen=True)
class Recipe:
    """How one tensor is stored: floats of 32 or 16 bits, or codes of 8, 6 or 4 bits.

    block  of codes with scales: weights along the inputs that share one
    rows   of codes that are indices: rows that share a table
    half   scales are float16, and the packing is Core ML's; otherwise float32 and onnxruntime's
    """

    bits: int
    block: int | None = None
    method: str | None = None
    rows: int | None = None
    half: bool = False

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, scales or tables included."""
        n = math.prod(shape)
        if self.rows is not None:
            return n * self.bits // 8 + 2 * (shape[0] // self.rows) * (1 << self.bits)
        if self.block is not None:
            return n * self.bits // 8 + 2 * n // self.block if self.half else sum(packed_bytes(shape, self.bits, self.block))
        return n * self.bits // 8

    def __str__(self) -> str:
        if self.rows:
            return f"lut{self.bits}, {self.rows} rows a table"
        if self.half and self.bits == 8:
            return "int8, a scale a row"
        return f"int{self.bits} block {self.block}" if self.block else f"fp{self.bits}"


Plan = Mapping[str, Recipe]
