"""k-means in one dimension: for every few rows, the table of values that their weights are nearest to.

Lloyd's iteration is not enough: it stops where no single weight wants another value, which for 64 values of 2048 weights
is 10 % above the least squared error, for 16 values of 32,768 weights 1 %. So all borders between values are moved
together, by dynamic programming over a few places near each.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import QuantizeError
from ..qtensor import Array, Lut, Packed

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

# How far each sweep moves borders, in distances to the next ones. After these the squared error is within 1 % (16 values)
# or 4 % (64) of the least there is, for 256 to 2048 weights, normal or with long tails; more sweeps gain .1 %.
_SWEEPS = (0.8, 0.6, 0.3, 0.1)
_MOVES = np.array([-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0])
_SAMPLES = 513  # of a group's distribution, to start from

# worked on at once: fewer cost time, in several threads above all
_AT_ONCE = 1 << 20  # weights
_VALUES = 1 << 14  # of all their tables


def kmeans(w: Array, *, bits: int, rows: int, importance: Array | None = None) -> Lut:
    """Find 2**bits values for every few rows, so that the squared error of the nearest ones is least.

    w           (O, I) float32; O divisible by rows
    bits        4 or 6
    rows        consecutive rows that share a table; what they get does not depend on the rows beside them
    importance  (I,) float32, what the squared error of every input's weights counts: the mean of its x^2 in calibration;
                0 is allowed. None: all count the same

    Error   of tables rounded to float16, at most that of 2**bits even levels up to the largest weight, of as many
            quantiles, and, if there is an importance, of the tables that are found without; and 1e-9 of the weighted sum
            of squares, the resolution of all this. Rows with no more than 2**bits different weights keep them, rounded.
    Raises  QuantizeError if bits, rows or importance do not fit, or w has a NaN, an infinity or values beyond float16.
    """
    _refuse(w, bits, rows, importance)
    groups = np.ascontiguousarray(w, np.float32).reshape(-1, rows * w.shape[1])
    weight = None
    if importance is not None and importance.any():
        weight = np.tile((importance / importance.max().astype(np.float64)).astype(np.float32), rows)
    tables, codes = np.empty((len(groups), 1 << bits), np.float32), np.empty(groups.shape, np.uint8)
    step = max(1, min(_AT_ONCE // groups.shape[1], _VALUES >> bits))
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
    found = [s.fit(k), s.quantiles(k), s.even(k)]
    if weight is not None:
        found.append(_with_sums(s.x).fit(k))
    rounded = np.stack([_half(t) for t in found])
    best = np.stack([s.score(t) for t in rounded]).argmin(axis=0)
    tables = s.used(rounded[best, np.arange(len(x))])
    n_different = 1 + (s.x[:, 1:] != s.x[:, :-1]).sum(axis=1)
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

    Weights that share a value lie side by side: between its borders, places 0 to n, ascending.
    """

    x: Array
    W: Doubles
    S: Doubles

    def sums(self, places: Places) -> tuple[Doubles, Doubles]:
        """W and S at these places, (G, ...)."""
        g = np.arange(len(self.x)).reshape(-1, *[1] * (places.ndim - 1))
        return self.W[g[: len(self.W)], places], self.S[g, places]

    def weights(self, places: Places) -> Doubles:
        """Weights at these places, (G, m) or (1, m); the last one at n."""
        found: Array = self.x[np.arange(len(self.x))[:, None], places.clip(0, self.x.shape[1] - 1)]
        return found.astype(np.float64)

    # --- tables and borders ---

    def borders(self, tables: Doubles) -> Places:
        """Where the weights begin and end that are nearest to each value: (G, k + 1)."""
        borders = np.empty((len(self.x), tables.shape[1] + 1), np.intp)
        borders[:, 0], borders[:, -1] = 0, self.x.shape[1]
        for x, middles, out in zip(self.x, _middles(tables), borders, strict=True):
            out[1:-1] = x.searchsorted(middles)
        return borders

    def means(self, borders: Places) -> Doubles:
        """The best values between these borders: (G, k), ascending."""
        W, S = (np.diff(sums) for sums in self.sums(borders))
        first, last = self.weights(borders[:, :-1]), self.weights(borders[:, 1:] - 1)
        # where hardly anything counts, differences of sums may leave the borders
        return np.clip(np.where(W > 0, S / np.where(W > 0, W, 1), first), first, np.maximum(first, last))

    def score(self, tables: Doubles) -> Doubles:
        """The squared error without the sum of squares of the weights, which is the same for all tables: (G,)."""
        W, S = (np.diff(sums) for sums in self.sums(self.borders(tables)))
        total: Doubles = (tables * (tables * W - 2 * S)).sum(axis=1)
        return total

    def used(self, tables: Doubles) -> Doubles:
        """The same tables, with those values that no weight is nearest to replaced by others."""
        empty = np.diff(self.borders(tables)) == 0
        before = np.maximum.accumulate(np.where(empty, -1, np.arange(tables.shape[1])), axis=1)
        return np.take_along_axis(tables, np.maximum(before, (~empty).argmax(axis=1)[:, None]), axis=1)

    # --- finding them ---

    def fit(self, k: int) -> Doubles:
        """Tables (G, k) of nearly the least squared error."""
        borders = self.borders(self.start(k))
        for reach in _SWEEPS:
            borders = self.sweep(borders, reach)
        tables = self.means(borders)
        for _ in range(2):  # Lloyd's rounds, from what float16 leaves
            tables = self.means(self.borders(_half(tables)))
        return tables

    def start(self, k: int) -> Doubles:
        """Values at even steps of the integral of the density's cube root: the best there is as k grows.

        Source  Panter and Dite, Quantization distortion in pulse-count modulation with nonuniform spacing of levels, 1951
        """
        share = np.sin(np.linspace(0, np.pi / 2, _SAMPLES)) ** 2  # densest at both ends: there outliers are alone
        places = self._quantile(share)
        x = self.weights(places)
        mass = np.diff(np.take_along_axis(self.W, places, axis=1)) / self.W[:, -1:]
        width = np.diff(x) / np.maximum(x[:, -1:] - x[:, :1], np.finfo(np.float64).tiny)
        integral = np.cbrt(width * width * mass)
        for _ in range(3):  # no more than one value between two samples: the way to an outlier is long, and empty
            integral = np.minimum(integral, integral.sum(axis=1, keepdims=True) / k)
        running = _running(integral)
        steps = (np.arange(k) + 0.5) / k
        return np.stack([np.interp(steps * r[-1], r, y) for r, y in zip(running, x, strict=True)])

    def sweep(self, borders: Places, reach: float) -> Places:
        """Move every border to one of some places near it, all together such that the squared error is least.

        reach  the farthest of these places, in distances to the next borders
        """
        G, k = borders.shape[0], borders.shape[1] - 1
        each = np.arange(G)
        size = np.maximum(reach * np.diff(borders), 1)[:, :, None]
        places = np.repeat(borders[:, :, None], len(_MOVES), axis=2)  # (G, k + 1, moves)
        places[:, 1:-1] += np.rint(np.where(_MOVES < 0, size[:, :-1], size[:, 1:]) * _MOVES).astype(np.intp)
        places = places.clip(0, self.x.shape[1])
        # cost (G, k, end, begin) of one value for all in between: its squared error without their squares, -S^2 / W
        W, S = (sums[:, 1:, :, None] - sums[:, :-1, None, :] for sums in self.sums(places))
        cost = np.divide(-S * S, W, out=np.zeros(S.shape), where=W > 0)
        cost[places[:, 1:, :, None] < places[:, :-1, None, :]] = np.inf
        least = np.zeros((G, len(_MOVES)))  # of all values before, by where they end
        begins = np.empty((k, G, len(_MOVES)), np.intp)
        for j in range(k):
            total = cost[:, j] + least[:, None, :]
            begins[j] = total.argmin(axis=2)
            least = np.take_along_axis(total, begins[j][:, :, None], axis=2)[:, :, 0]
        moved, chosen = borders.copy(), np.zeros(G, np.intp)
        for j in range(k - 1, 0, -1):
            chosen = begins[j][each, chosen]
            moved[:, j] = places[each, j, chosen]
        return moved

    def quantiles(self, k: int) -> Doubles:
        """Tables of the weights that as many count less than."""
        return self.weights(self._quantile((np.arange(k) + 0.5) / k))

    def even(self, k: int) -> Doubles:
        """Tables of even levels up to the largest weight, of both signs."""
        largest = np.maximum(-self.x[:, :1], self.x[:, -1:]).astype(np.float64)
        return largest * np.linspace(-1, 1, k)

    def _quantile(self, share: Doubles) -> Places:
        """Where these shares of all that counts are reached: (G, m), or (1, m) if all count the same."""
        return np.stack([W.searchsorted(share * W[-1]) - 1 for W in self.W]).clip(0)


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


def _half(tables: Floats) -> Doubles:
    """Round to float16; without zeros that have a sign."""
    return tables.astype(np.float16).astype(np.float64) + 0.0


def _middles(tables: Floats) -> Array:
    """Between neighbours in a table, where the nearest one changes."""
    return ((tables[:, 1:].astype(np.float64) + tables[:, :-1]) / 2).astype(np.float32)


def _nearest(x: Array, tables: Array) -> Packed:
    """Indices of the nearest values: how many middles are not above."""
    codes, above = np.zeros(x.shape, np.uint8), np.empty(x.shape, np.bool_)
    for middle in _middles(tables).T:
        codes += np.greater_equal(x, middle[:, None], out=above).view(np.uint8)
    return codes
