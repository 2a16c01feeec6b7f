"""k-means in one dimension: for every few rows, the table of values that their weights are nearest to."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import QuantizeError
from ..qtensor import Array, Lut

Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

# Lloyd's rounds. The start is so near that these come within .5 % of the squared error of 1000 rounds, on weights of
# trained models and on normal, Laplace's and Student's (3 and 1.5) numbers, at 16 and at 64 values.
_ROUNDS = 12
_SAMPLES = 513  # of a group's distribution, to start from

_AT_ONCE = 1 << 19  # weights: fewer cost time, more only memory


def kmeans(w: Array, *, bits: int, rows: int, importance: Array | None = None) -> Lut:
    """Find 2**bits values for every few rows, so that the squared error of the nearest ones is least.

    w           (O, I) float32; O divisible by rows
    bits        4 or 6
    rows        consecutive rows that share a table; what they get does not depend on the rows beside them
    importance  (I,) float32, what the squared error of every input's weights counts: the mean of its x^2 in calibration;
                0 is allowed. None: all count the same

    Error   of tables rounded to float16, at most that of 2**bits even levels up to the largest weight, of as many
            quantiles, and, if there is an importance, of the tables that are found without; and 1e-12 of the weighted sum
            of squares, float64's resolution of it. Rows with no more than 2**bits different weights keep them, rounded.
    Raises  QuantizeError if bits, rows or importance do not fit, or w has a NaN, an infinity or values beyond float16.
    """
    _refuse(w, bits, rows, importance)
    groups = np.ascontiguousarray(w, np.float32).reshape(-1, rows * w.shape[1])
    weight = None
    if importance is not None and importance.any():
        weight = np.tile(np.abs(importance.astype(np.float32)), rows)  # abs: there is a zero with a sign
    tables, codes = np.empty((len(groups), 1 << bits), np.float32), np.empty(groups.shape, np.uint8)
    step = max(1, _AT_ONCE // groups.shape[1])
    for i in range(0, len(groups), step):
        x = groups[i : i + step]
        tables[i : i + step] = _tables(x, weight, 1 << bits)
        codes[i : i + step] = _nearest(x, tables[i : i + step])
    return Lut(codes.reshape(w.shape), tables, bits, rows)


def _refuse(w: Array, bits: int, rows: int, importance: Array | None) -> None:
    n_out, n_in = w.shape
    if bits not in (4, 6):
        raise QuantizeError(f"tables for {bits} bits: expected 4 or 6 bits")
    if rows < 1 or n_out % rows or not w.size:
        raise QuantizeError(f"{rows} rows that share a table do not divide a matrix of {n_out} rows of {n_in}")
    largest, limit = float(max(w.max(), -w.min())), float(np.finfo(np.float16).max)
    if not math.isfinite(largest):
        raise QuantizeError("the weights hold a NaN or an infinity")
    if largest > limit:
        raise QuantizeError(f"weights up to {largest:.1e} are beyond {limit:.0f}, the largest that a table in float16 holds")
    if importance is None:
        return
    if importance.shape != (n_in,):
        raise QuantizeError(f"importance of shape {importance.shape} for {n_in} inputs: expected one number for each")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise QuantizeError("the importance holds a NaN, an infinity or a negative number")


def _tables(x: Array, weight: Array | None, k: int) -> Doubles:
    """The best tables (G, k) of groups (G, n); weight (n,)."""
    s = _sort(x) if weight is None else _sort_weighted(x, weight)
    found = [s.lloyd(s.start(k)), s.quantiles(k), s.even(k)]
    if weight is not None:
        plain = _with_sums(s.x)
        found.append(plain.lloyd(plain.start(k)))
    rounded = np.stack([_half(t) for t in found])
    best = np.stack([s.score(t) for t in rounded]).argmin(0)
    tables = s.used(rounded[best, np.arange(len(x))])
    n_different = 1 + (s.x[:, 1:] != s.x[:, :-1]).sum(1)
    for g in np.flatnonzero(n_different <= k):
        different = np.unique(s.x[g])
        tables[g] = _half(np.pad(different, (0, k - len(different)), mode="edge"))
    return tables


@dataclass(frozen=True)
class _Sorted:
    """Groups of weights in order, and sums over all that come before: what any table costs follows from a few of them.

    x  (G, n) float32
    W  (G, n + 1) what they count; (1, n + 1) if all count the same
    S  (G, n + 1) what they count, times x
    """

    x: Array
    W: Doubles
    S: Doubles

    def at(self, i: Places) -> Doubles:
        """Weights by their places in order, (G, m) or (1, m)."""
        return self.x[np.arange(len(self.x))[:, None], i].astype(np.float64)

    def cells(self, tables: Doubles) -> tuple[Places, Doubles, Doubles]:
        """Where the weights begin and end that are nearest to each value, (G, k + 1); their W and S, (G, k)."""
        ends = np.empty((len(self.x), tables.shape[1] + 1), np.intp)
        ends[:, 0], ends[:, -1] = 0, self.x.shape[1]
        for x, middles, out in zip(self.x, _middles(tables), ends, strict=True):
            out[1:-1] = x.searchsorted(middles)
        g = np.arange(len(ends))[:, None]
        return ends, np.diff(self.W[g[: len(self.W)], ends]), np.diff(self.S[g, ends])

    def lloyd(self, tables: Doubles) -> Doubles:
        """Move every value to the mean of the weights that are nearest to it, again and again; at last from rounded ones."""
        for i in range(_ROUNDS):
            ends, W, S = self.cells(_half(tables) if i == _ROUNDS - 1 else tables)
            # where hardly anything counts, differences of sums may leave the cell
            first, last = self.at(np.minimum(ends[:, :-1], self.x.shape[1] - 1)), self.at(np.maximum(ends[:, 1:] - 1, 0))
            means = np.clip(S / np.where(W > 0, W, 1), first, np.maximum(first, last))
            tables = np.where((W > 0) & (ends[:, 1:] > ends[:, :-1]), means, tables)
        return np.sort(tables, axis=1)

    def score(self, tables: Doubles) -> Doubles:
        """The squared error without the sum of squares of the weights, which is the same for all tables: (G,)."""
        _, W, S = self.cells(tables)
        return np.sum(tables * (tables * W - 2 * S), axis=1, dtype=np.float64)

    def used(self, tables: Doubles) -> Doubles:
        """The same tables, with those values that no weight is nearest to replaced by others."""
        k = tables.shape[1]
        empty = np.diff(self.cells(tables)[0]) == 0
        before = np.maximum.accumulate(np.where(empty, -1, np.arange(k)), axis=1)
        first = (~empty).argmax(axis=1)[:, None]
        return np.take_along_axis(tables, np.maximum(before, first), axis=1)

    def quantile(self, share: Doubles) -> Places:
        """Where these shares of all that counts are reached."""
        places = np.stack([W.searchsorted(share * W[-1]) - 1 for W in self.W])
        return places.clip(0)

    def quantiles(self, k: int) -> Doubles:
        return self.at(self.quantile((np.arange(k) + 0.5) / k))

    def even(self, k: int) -> Doubles:
        largest = np.maximum(-self.x[:, :1], self.x[:, -1:]).astype(np.float64)
        return largest * np.linspace(-1, 1, k)

    def start(self, k: int) -> Doubles:
        """As many values wherever the cube root of the density has the same integral: the best there is as k grows.

        Source  Panter and Dite, Quantization distortion in pulse-count modulation with nonuniform spacing of levels, 1951
        """
        share = np.sin(np.linspace(0, np.pi / 2, _SAMPLES)) ** 2  # densest at both ends: there outliers are alone
        places = self.quantile(share)
        x = self.at(places)
        mass = np.diff(self.W[np.arange(len(self.W))[:, None], places]) / self.W[:, -1:]
        width = np.diff(x) / np.maximum(x[:, -1:] - x[:, :1], np.finfo(np.float64).tiny)
        integral = np.cbrt(width * width * mass)
        for _ in range(3):  # no more than one value between two samples: the way to an outlier is long, and empty
            integral = np.minimum(integral, integral.sum(1, keepdims=True) / k)
        running = _running(integral)
        even = (np.arange(k) + 0.5) / k
        return np.stack([np.interp(even * r[-1], r, y) for r, y in zip(running, x, strict=True)])


def _sort(x: Array) -> _Sorted:
    return _with_sums(np.sort(x, axis=1))


def _with_sums(x: Array) -> _Sorted:
    return _Sorted(x, np.arange(x.shape[1] + 1.0)[None], _running(x.astype(np.float64)))


def _sort_weighted(x: Array, weight: Array) -> _Sorted:
    """Sort x, and weight along with it in the 29 bits that a float32 leaves in a float64: much faster than argsort."""
    keys = x.astype(np.float64)
    keys.view(np.uint64)[...] |= weight.view(np.uint32) >> 2
    keys.sort(axis=1)
    low = np.uint64((1 << 29) - 1)
    count = ((keys.view(np.uint64) & low) << 2).astype(np.uint32).view(np.float32).astype(np.float64)
    keys.view(np.uint64)[...] &= ~low
    return _Sorted(keys.astype(np.float32), _running(count), _running(np.multiply(count, keys, out=count)))


def _running(x: Doubles) -> Doubles:
    """Sums of all before: (G, n) -> (G, n + 1)."""
    out = np.zeros((x.shape[0], x.shape[1] + 1))
    np.cumsum(x, axis=1, out=out[:, 1:])
    return out


def _half(tables: npt.NDArray[np.floating[Any]]) -> Doubles:
    """Round to float16; without zeros that have a sign."""
    return tables.astype(np.float16).astype(np.float64) + 0.0


def _middles(tables: npt.NDArray[np.floating[Any]]) -> Array:
    """Between neighbours in a table, where the nearest one changes."""
    return ((tables[:, 1:].astype(np.float64) + tables[:, :-1]) / 2).astype(np.float32)


def _nearest(x: Array, tables: Array) -> npt.NDArray[np.uint8]:
    """Indices of the nearest values: how many middles are not above."""
    codes, above = np.zeros(x.shape, np.uint8), np.empty(x.shape, np.bool_)
    for middle in _middles(tables).T:
        codes += np.greater_equal(x, middle[:, None], out=above).view(np.uint8)
    return codes
