"""Tensors inside files, read in row blocks; and outputs that appear whole or not at all."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, InputError, OutputError
from .qtensor import BLOCKS, Array, Lut, QTensor, Recipe, unpack_bits
from .spec import Shape

# by safetensors' names, weights and our own codes; bfloat16 is read as its 16 bits and widened
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
}


def utf8(data: bytes, name: object) -> str:
    """Bytes from outside as text, without a byte order mark.

    Raises  InputError
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{name} is not UTF-8 text: {e.reason} at byte {e.start}") from e


@dataclass(frozen=True)
class Packing:
    """How a type that is not in DTYPES lies in a file: so many weights of a row in so many bytes, and what reads them.

    unpack  (rows, bytes) uint8 -> (rows, weights)
    """

    n_weights: int
    nbytes: int
    unpack: Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]


# codes in a Core ML package's file of weights
CODES = {
    "I4": Packing(2, 1, lambda data: (unpack_bits(data, 4) << 4).view(np.int8) >> 4),
    "U4": Packing(2, 1, lambda data: unpack_bits(data, 4)),
    "U6": Packing(4, 3, lambda data: unpack_bits(data, 6)),
}


@dataclass(frozen=True)
class Record:
    """One array in row order at a place in a file.

    dtype    one of DTYPES, or with `packing` what its maker calls it
    factor   what every number is multiplied by when read: a power of two; or 0, and nothing is read
    """

    path: Path
    offset: int
    dtype: str
    shape: Shape
    packing: Packing | None = None
    factor: float = 1.0

    @property
    def nbytes(self) -> int:
        n = math.prod(self.shape)
        return n // self.packing.n_weights * self.packing.nbytes if self.packing else n * DTYPES[self.dtype].itemsize

    def part(self, i: int) -> "Record":
        """One of the arrays that are stacked along the first axis."""
        return replace(self, offset=self.offset + i * (self.nbytes // self.shape[0]), shape=self.shape[1:])

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read some rows, holding nothing else; bfloat16 and what is packed become float32.

        Raises  CheckpointError if the file ends before them or cannot be read.
        """
        if self.factor == 0:
            return np.zeros((stop - start, *self.shape[1:]), np.float32)
        n_bytes = self.nbytes // self.shape[0]
        data = np.empty((stop - start) * n_bytes, np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as f:
                f.seek(self.offset + start * n_bytes)
                view, done = data.data, 0
                while done < len(view):  # one read gives at most 2 GiB
                    n = f.readinto(view[done:])
                    if not n:
                        raise CheckpointError(f"{self.path} is cut short: it ends inside a tensor. Download it again")
                    done += n
        except OSError as e:
            raise CheckpointError(f"cannot read {self.path}: {e.strerror}") from e
        out: npt.NDArray[Any]
        if self.packing:
            out = self.packing.unpack(data.reshape(-1, self.shape[-1] // self.packing.n_weights * self.packing.nbytes))
        else:
            out = data.view(DTYPES[self.dtype])
        if self.dtype == "BF16":
            out = (out.astype(np.uint32) << 16).view(np.float32)
        out = out.reshape(stop - start, *self.shape[1:])
        return out if self.factor == 1 else out.astype(np.float32) * np.float32(self.factor)


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: floats, or packed codes with their scales in a second place.

    shape       canonical: matrices are (outputs, inputs), nothing else has an axis of one
    transposed  the file has the inputs first
    block       of a quantized matrix, weights along the inputs that share a scale
    rows_per_table  of a matrix of indices, whose tables are in place of the scales
    plus        what adapters add
    """

    name: str
    shape: Shape
    data: Record
    transposed: bool = False
    bits: int = 32
    block: int | None = None
    scales: Record | None = None
    method: str | None = None
    plus: "tuple[Delta, ...]" = ()
    rows_per_table: int | None = None

    def validate(self) -> None:
        """Check that the places hold what the shape, bits and block need.

        Raises  CheckpointError if they do not.
        """
        if any(type(n) is not int or n < 1 for n in self.shape) or not self.shape:
            raise CheckpointError(f"{self.name} has shape {self.shape}: expected sizes of 1 or more")
        if type(self.bits) is not int or not (self.block is None or type(self.block) is int):
            raise CheckpointError(f"{self.name} has {self.bits!r} bits in blocks of {self.block!r}: expected whole numbers")
        if self.data.dtype in ("I8", *CODES):
            self._validate_codes()
            return
        if self.block is None or self.scales is None:
            expected = [(self.data, f"F{self.bits}", self.shape)]
        else:
            if self.bits not in (4, 8) or self.block not in BLOCKS or len(self.shape) != 2:
                raise CheckpointError(f"{self.name}: {self.bits} bits in blocks of {self.block} is not a known packing")
            n_blocks = -(-self.shape[1] // self.block)
            packed = (self.shape[0], n_blocks, self.block * self.bits // 8)
            expected = [(self.data, "U8", packed), (self.scales, "F32", (self.shape[0], n_blocks))]
        for record, dtype, shape in expected:
            if (record.dtype, record.shape) != (dtype, shape):
                raise CheckpointError(f"{self.name}: found {record.dtype} {record.shape}, expected {dtype} {shape}")

    def _validate_codes(self) -> None:
        n_out, n_in = self.shape if len(self.shape) == 2 else (0, 0)
        dtype = f"{'U' if self.rows_per_table else 'I'}{self.bits}"
        if self.rows_per_table:
            fits, second = n_out % self.rows_per_table == 0, (n_out // self.rows_per_table, 2**self.bits)
        else:
            fits, second = bool(self.block) and n_in % (self.block or 1) == 0, (n_out, n_in // (self.block or 1))
        if not n_out or not fits or self.scales is None or self.data.dtype != dtype or self.scales.shape != second:
            raise CheckpointError(
                f"{self.name} of shape {self.shape}: {self.bits} bits as {self.data.dtype} is not a known packing"
            )

    @property
    def recipe(self) -> Recipe:
        half = self.data.dtype in ("I8", *CODES)
        return Recipe(self.bits, self.block, self.method, rows=self.rows_per_table, half=half)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""
        return self.data.nbytes + (self.scales.nbytes if self.scales else 0)

    def read(self) -> Array | QTensor | Lut:
        """Read the whole tensor."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Array | QTensor | Lut:
        """Read rows start to stop, floats as float32.

        Raises  CheckpointError if one of them is not a finite number.
        """
        if self.scales is not None:
            per_table = self.rows_per_table or 1
            scales = self.scales.rows(start // per_table, -(-stop // per_table)).astype(np.float32)
            if not np.isfinite(scales).all():
                raise CheckpointError(f"{self.data.path}: a scale of {self.name} is not a finite number: the file is damaged")
            codes = self.data.rows(start, stop)
            if self.rows_per_table is not None:
                if start % per_table == stop % per_table == 0:
                    return Lut(codes, scales, self.bits, per_table)
                return Lut(codes, scales[np.arange(start, stop) // per_table - start // per_table], self.bits, 1)
            assert self.block is not None
            if self.data.dtype in ("I8", "I4"):
                return QTensor(codes, scales, self.bits, self.block)
            return QTensor.unpack(codes, scales, bits=self.bits, block=self.block, n_in=self.shape[1])
        # only low-rank factors are transposed: small
        x = self.data.rows(0, self.data.shape[0]).T[start:stop] if self.transposed else self.data.rows(start, stop)
        with np.errstate(over="ignore"):  # of float64: found below
            x = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(x).all():
            row, *rest = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise CheckpointError(
                f"{self.data.path}: {self.name} holds a {x[(row, *rest)]} at {[row + start, *rest]}: "
                "the file is damaged or the training diverged"
            )
        return self._added(x, start) if self.plus else x

    def _added(self, x: Array, start: int) -> Array:
        """Add what adapters add to the rows from `start`, in float64, rounded once."""
        total = x.astype(np.float64)
        with np.errstate(over="ignore"):
            for delta in self.plus:
                total += delta.of(x, start)
            rounded = total.astype(np.float32)
        if not np.isfinite(rounded).all():
            raise CheckpointError(f"{self.plus[0].path}: {self.name} overflows with it: {self.plus[0].doubt}")
        return rounded

    @property
    def rows_per_read(self) -> int:
        """A block of rows that is worth a read and small in memory: a million weights."""
        if self.transposed or len(self.shape) == 1:
            return self.shape[0]
        return max(1, (1 << 20) // math.prod(self.shape[1:]))


@dataclass(frozen=True)
class Pieces:
    """A matrix that lies in a file as several, some rows each."""

    parts: tuple[Stored, ...]

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def recipe(self) -> Recipe:
        return self.parts[0].recipe

    @property
    def shape(self) -> Shape:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""
        return sum(p.nbytes for p in self.parts)

    def read(self) -> Array:
        """Read the whole tensor, as floats."""
        parts = [x if isinstance(x := p.read(), np.ndarray) else x.dequantize() for p in self.parts]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Normed:
    """The layer norm of every row of a stored matrix, read when it is needed."""

    data: Stored
    weight: Stored
    bias: Stored
    eps: float

    def rows(self, start: int, stop: int) -> Array:
        x, weight, bias = (
            np.asarray(t, np.float64) for t in (self.data.rows(start, stop), self.weight.read(), self.bias.read())
        )
        d = x - x.mean(-1, keepdims=True)
        y: Array = (d / np.sqrt((d * d).mean(-1, keepdims=True) + self.eps) * weight + bias).astype(np.float32)
        return y


class Delta(Protocol):
    """What is added to a matrix (O, I).

    path   the file that it is from
    doubt  what to look at if the sum is beyond float32
    """

    @property
    def path(self) -> Path: ...

    @property
    def doubt(self) -> str: ...

    def of(self, x: Array, start: int) -> npt.NDArray[np.float64]:
        """Give what is added to the rows x of the matrix, from `start`."""


@dataclass(frozen=True)
class Product:
    """scale left right, of (O, r) and (r, I): a LoRA, or part of a DeepEmbed table."""

    left: Stored | Normed
    right: Stored
    scale: float

    @property
    def path(self) -> Path:
        return self.right.data.path

    @property
    def doubt(self) -> str:
        return f"is alpha right, {self.scale:g} times r?"

    def of(self, x: Array, start: int) -> npt.NDArray[np.float64]:
        left, right = self.left.rows(start, start + len(x)), self.right.read()
        assert isinstance(left, np.ndarray)
        assert isinstance(right, np.ndarray)
        return exact_product(left, right) * self.scale


def exact_product(left: Array, right: Array) -> npt.NDArray[np.float64]:
    """Multiply matrices, (rows, r) and (r, columns), or stacks of them.

    Both are rounded so that every sum of their products is exact in float64, in any order: the same bytes on every machine,
    however many rows are read at once.

    Error  of a product in the sum, 2^-23 of the largest that its row and column could make, at r up to 128; none for bfloat16
           numbers within 2^-15 of these
    """
    bits = (53 - math.ceil(math.log2(right.shape[-2]))) // 2
    product: npt.NDArray[np.float64] = _round(left, bits, axis=-1) @ _round(right, bits, axis=-2)
    return product


def _round(x: Array, bits: int, axis: int) -> npt.NDArray[np.float64]:
    """Keep so many bits of the largest number along an axis."""
    _, exponent = np.frexp(np.abs(x).max(axis, keepdims=True).astype(np.float64))
    unit = np.ldexp(1.0, exponent - bits)
    rounded: npt.NDArray[np.float64] = np.round(x / unit) * unit
    return rounded


@contextlib.contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file to; it takes the name `path` only when all went well.

    Raises  OutputError if `path` exists and not `force`, or if writing fails; then nothing is left behind.
    """
    with _new(path, lambda p: refuse_file(p, force=force)) as temporary:
        yield temporary


@contextlib.contextmanager
def new_directory(path: Path, *, replaceable: Callable[[Path], str | None] | None) -> Iterator[Path]:
    """The same for a folder.

    replaceable  says why an existing folder may not be replaced, or None if it may; without it none may
    """

    def refuse(path: Path) -> None:
        if path.is_dir():
            reason = (
                "exists: choose another output (-o), or --force to replace it" if replaceable is None else replaceable(path)
            )
            if reason:
                raise OutputError(f"{path} {reason}")
        elif path.exists():
            raise OutputError(f"{path} exists and is no folder: choose another output")

    with _new(path, refuse) as temporary:
        temporary.mkdir()
        yield temporary


def refuse_file(path: Path, *, force: bool) -> None:
    """Raise OutputError if a file may not be written here."""
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise OutputError(f"{path} is no regular file: choose another output")
    if path.exists() and not force:
        raise OutputError(f"{path} exists: choose another output (-o), or --force to replace it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} is not a folder: create it first")


@contextlib.contextmanager
def _new(path: Path, refuse: Callable[[Path], None]) -> Iterator[Path]:
    path = Path(os.path.realpath(path))  # through symbolic links: what they point to is replaced, not they
    if not path.name:
        raise OutputError(f"{path} cannot be replaced: choose another output")
    temporary, aside = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        refuse(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent} is not a folder: create it first")
        yield temporary
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()) if temporary.is_dir() else [temporary]:
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        refuse(path)  # again: the work took its time
        if path.is_dir():  # a folder cannot be replaced in one step: set the old one aside, and back if anything happens
            path.rename(aside)
            try:
                temporary.rename(path)
            except BaseException:
                aside.rename(path)
                raise
        else:
            os.replace(temporary, path)
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        left = [temporary, *([aside] if path.exists() else [])]
        try:
            _remove(*left)
        except BaseException:  # a second interrupt: finish what the first one began
            _remove(*left)
            raise


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
