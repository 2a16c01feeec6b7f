"""Do a bundle's files hold the weights of its checkpoint?

The weights are read by code of the proof's own, some rows at a time, and held against what the checkpoint's become by the
method that the manifest names: floats rounded exactly; codes, scales and tables as it declares, and beside quantizing again.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from . import __version__
from .bundle import Bundle
from .checkpoints import Checkpoint
from .errors import CheckpointError
from .files import Pieces, Stored
from .qtensor import Array
from .quantize import declared, kmeans, rtn, with_half_scales
from .unpacking import Piece, Rows, pieces, spans

Progress = Callable[[int, int], None]
Mask = npt.NDArray[np.bool_]

_IN_CACHE = 1 << 17  # weights worked on at once
THIS_RELEASE = {"tool": "rwkv-edge", "version": __version__}


@dataclass(frozen=True)
class Proof:
    """What holding a bundle's weights against a checkpoint's gave.

    compared  whether there was a checkpoint; without one, only that two readers agree on what the files hold
    n_tensors  that the bundle has
    n_blocks  blocks with a scale, and groups of rows with a table, that were quantized again
    n_same    of these, how many have the same codes and the same scale or table
    faults    by tensor, why it does not hold the checkpoint's weights
    """

    compared: bool
    n_tensors: int
    n_blocks: int
    n_same: int
    faults: Mapping[str, str]

    @property
    def fault(self) -> str:
        """The first one, and how many other tensors have one; empty if there is none."""
        if not self.faults:
            return ""
        name, reason = next(iter(self.faults.items()))
        others = len(self.faults) - 1
        return f"{name}: {reason}" + (f"; and {others} other tensor{'s' * (others > 1)}" if others else "")


@dataclass(frozen=True)
class _Span:
    """Rows start to stop of a piece of a tensor, and the same as the rest of the package reads them."""

    name: str
    piece: Piece
    start: int
    stop: int
    stored: Stored


@dataclass(frozen=True)
class _Verdict:
    """Of a span: why it cannot be read; which numbers, blocks or tables are wrong; what quantizing again gave."""

    misread: str
    wrong: Mask
    n_blocks: int = 0
    n_same: int = 0


def prove_weights(b: Bundle, source: Checkpoint | None, progress: Progress | None = None) -> Proof:
    """Hold every tensor of a bundle against a checkpoint, in blocks of rows: all cores work, a few blocks are in memory.

    source    the checkpoint; None: only read every tensor in two ways
    progress  called with weights done and weights in all
    """
    faults = _other_shapes(b, source) if source else {}
    work = [span for span in _work(b) if span.name not in faults]
    wrong: dict[str, list[tuple[_Span, Mask]]] = {}
    units: dict[str, int] = {}
    done = n_blocks = n_same = 0
    total = b.spec.n_parameters
    judge = partial(_judge, source, dict(b.manifest["made_by"]) == THIS_RELEASE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for span, verdict in zip(work, pool.map(judge, work), strict=True):
            if verdict.misread:
                faults.setdefault(span.name, verdict.misread)
            if verdict.wrong.any():
                wrong.setdefault(span.name, []).append((span, verdict.wrong))
            units[span.name] = units.get(span.name, 0) + verdict.wrong.size
            n_blocks, n_same = n_blocks + verdict.n_blocks, n_same + verdict.n_same
            done += (span.stop - span.start) * int(np.prod(span.piece.entry["shape"][1:]))
            if progress:
                progress(min(done, total), total)
    for name, parts in wrong.items():
        faults.setdefault(name, _reason(parts, units[name]))
    order = list(b.spec.weights)
    faults = {name: faults[name] for name in sorted(faults, key=lambda n: order.index(n) if n in order else -1)}
    return Proof(source is not None, len(b.tensors), n_blocks, n_same, faults)


def _other_shapes(b: Bundle, source: Checkpoint) -> dict[str, str]:
    """Tensors that only one of them has, or that are of different shapes."""
    ours, theirs = ({name: t.shape for name, t in x.tensors.items()} for x in (b, source))
    return {
        name: f"its shape is {ours.get(name)}, in the checkpoint {theirs.get(name)}"
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
    }


def _work(b: Bundle) -> Iterator[_Span]:
    """All rows of all tensors, a million weights at a time."""
    for name, t in b.tensors.items():
        parts = t.parts if isinstance(t, Pieces) else (t,)
        for piece, stored in zip(pieces(b.path, b.manifest["tensors"][name]), parts, strict=True):
            for start, stop in spans(piece):
                yield _Span(name, piece, start, stop, stored)


def _judge(source: Checkpoint | None, this_release: bool, span: _Span) -> _Verdict:
    """Hold the rows of a span against the checkpoint's."""
    rows = span.piece.read(span.start, span.stop)
    with np.errstate(all="ignore"):  # a damaged file gives any numbers
        misread = _misread(span, rows.weights())
        if source is None:
            return _Verdict(misread, np.zeros(0, bool))
        first = span.piece.start
        found = source.tensors[span.name].rows(first + span.start, first + span.stop)
        assert isinstance(found, np.ndarray)
        x = found * np.float32(1 / rows.factor)
        if rows.scales is None and rows.tables is None:
            return _Verdict(misread, _bits(rows.numbers) != _bits(x.astype(rows.numbers.dtype)))
        return _judge_codes(misread, x, rows, span.piece, this_release)


def _judge_codes(misread: str, x: Array, rows: Rows, piece: Piece, this_release: bool) -> _Verdict:
    """The same of codes: as the method declares, and no worse than quantizing again."""
    method, bits, groups = piece.entry["method"], piece.entry["bits"], _groups(rows, x)
    weights, codes = groups(x), groups(rows.numbers)
    if rows.tables is not None:
        wrong = declared.not_kmeans(weights, codes, rows.tables, weighted=method != "kmeans")
    else:
        assert rows.scales is not None
        differs = declared.not_half_rtn if piece.coreml else declared.not_rtn
        scales, step = rows.scales.reshape(-1), max(1, _IN_CACHE // weights.shape[1])
        parts = (slice(i, i + step) for i in range(0, len(weights), step))
        wrong = np.concatenate([differs(weights[i], codes[i], scales[i], bits) for i in parts])
    n_blocks = n_same = 0
    if this_release and method in declared.AGAIN and not wrong.any():
        again = _again(x, rows, piece)
        same = (codes == groups(again.numbers)).all(axis=1) & (_second(rows) == _second(again)).all(axis=1)
        n_blocks, n_same = same.size, int(same.sum())
        if n_same < n_blocks:
            errors = [declared.squared_error(weights, groups(r.weights())) for r in (_unscaled(rows), again)]
            wrong = ~same & declared.is_worse(method, weights, *errors)
    return _Verdict(misread, wrong.reshape(-1, 1) if rows.scales is None else wrong.reshape(len(x), -1), n_blocks, n_same)


def _misread(span: _Span, weights: Array) -> str:
    """Whether what the rest of the package reads is something else."""
    try:
        other = span.stored.rows(span.start, span.stop)
    except CheckpointError as e:
        return str(e)
    other = other if isinstance(other, np.ndarray) else other.dequantize()
    same = np.array_equal(other, weights)
    return "" if same else "the files hold other weights, by the documented format, than this release reads"


def _again(x: Array, rows: Rows, piece: Piece) -> Rows:
    """Quantize as the manifest says."""
    bits = piece.entry["bits"]
    if rows.tables is not None:
        lut = kmeans(x, bits=bits, rows=piece.entry["rows"])
        return Rows(lut.codes, None, lut.tables, 0, 1.0)
    q = rtn(x, bits=bits, block=rows.block)
    q = with_half_scales(x, q) if piece.coreml else q
    return Rows(q.codes, q.scales, None, rows.block, 1.0)


def _unscaled(rows: Rows) -> Rows:
    return Rows(rows.numbers, rows.scales, rows.tables, rows.block, 1.0)


def _second(rows: Rows) -> Array:
    """What the codes of every group go with, (groups, n)."""
    if rows.tables is not None:
        return rows.tables
    assert rows.scales is not None
    return rows.scales.reshape(-1, 1)


def _groups(rows: Rows, x: Array) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """What brings rows (n, I) to (groups, numbers): those that share a scale or a table, a short last block filled with 0."""
    if rows.tables is not None:
        n = len(rows.tables)
        return lambda a: a.reshape(n, -1)
    missing = -x.shape[1] % rows.block
    return lambda a: np.pad(a, ((0, 0), (0, missing))).reshape(-1, rows.block)


def _bits(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def _reason(parts: list[tuple[_Span, Mask]], n: int) -> str:
    """How many numbers, blocks or tables are wrong, and where the first one is."""
    span, mask = parts[0]
    entry, n_wrong = span.piece.entry, sum(int(mask.sum()) for _, mask in parts)
    at, *rest = (int(i) for i in np.argwhere(mask)[0])
    per_table = entry.get("rows")
    row = span.piece.start + span.start + at * (per_table or 1)
    if per_table:
        unit, place = "tables and their codes", f"of rows {row} to {row + per_table - 1}"
    elif entry["block"]:
        first = rest[0] * entry["block"]
        unit, place = "blocks", f"in row {row}, inputs {first} to {min(first + entry['block'], entry['shape'][1]) - 1}"
    else:
        unit, place = "numbers", f"at {[row, *rest]}"
    how = f"rounded by {entry['method']}" if entry["method"] else f"in float{entry['bits']}"
    return f"{n_wrong} of {n} {unit} are not the checkpoint's weights {how}, the first {place}"
