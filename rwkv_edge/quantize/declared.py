"""What each method declares of its result, to hold a result against that lies in a file.

Written from the declarations alone: nothing here is shared with what quantizes. Each function gives which blocks, or which
groups of rows with one table, are not what was declared.
"""

import numpy as np
import numpy.typing as npt

from ..qtensor import HALF_NORMAL, Array

Codes = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]

_ULP = 2.0**-24  # float32's rounding
# Quantizers sum and compare in float32: the squared error of what they find is known to so much of a block's sum of squares
_RESOLUTION = 1e-6
# What quantizing again may find better. On another processor, sums in float32 differ in their last bits, and so may the
# border at which kmeans begins: it ends within 1 % (16 values) or 4 % (64) of the least error there is.
AGAIN = {"rtn": 1.0, "kmeans": 1.05}
# With a calibration that is not known, the squared error that was made small is not known either. So values are only held
# against being those of other weights: an error of a group's weights below half of them, rms.
WEIGHTED_RMS = 0.5


def squared_error(x: Array, w: Array) -> Array:
    """Of every group: its weights and what became of them, (n, weights)."""
    return _squares(x - w)


def is_worse(method: str, x: Array, error: Array, again: Array) -> Mask:
    """Which groups have a larger squared error than quantizing again explains."""
    return error > AGAIN[method] * again + (_slack(x.T) if method == "rtn" else _RESOLUTION * _squares(x))


def not_rtn(x: Array, codes: Codes, scales: Array, bits: int) -> Mask:
    """Which blocks are not round-to-nearest with float32 scales: x, codes (n, block), scales (n,).

    1. One factor takes all of the block's weights to their codes by rounding; those beyond the levels take the last one.
    2. The scale is the least-squares one of these codes, <x, q> / <q, q>, to float32's rounding of a sum of so many.
    3. The squared error is at most that of the plain scale, largest / (2**(bits-1) - 1).

    Blocks whose largest weight is below 1e-30 are zeros.
    """
    y, q, largest = _columns(x, codes)
    qq = _dot(q, q)
    best = _dot(y, q) / np.maximum(qq, 1)
    least_squares = np.abs(scales - best) <= 2 * (len(y) + 2) * _ULP * np.abs(best)
    fine = _error(y, q * scales) <= _plain_error(y, largest, bits) + _slack(y)
    one_factor = _one_factor(y * np.where(scales < 0, np.float32(-1), np.float32(1)), q, bits)
    wrong: Mask = np.where(largest < 1e-30, qq > 0, ~(one_factor & least_squares & fine))
    return wrong


def not_half_rtn(x: Array, codes: Codes, scales: Array, bits: int) -> Mask:
    """Which blocks are not round-to-nearest with float16 scales, to which codes were rounded last: as above.

    1. Every code is the nearest to weight / scale that its bits allow.
    2. The squared error is at most that of the plain scale, and what float16 takes from the best one: 2^-11 of it at most, so
       2^-22 of the sum of squares. A block whose scale would be about 2^-14 or less has 2^-14, of either sign.
    """
    y, q, largest = _columns(x, codes)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    nearest = np.abs(np.clip(y / scales, low, high) - q).max(axis=0) <= 0.5 + 2.0**bits * _ULP
    small = (np.abs(scales) == HALF_NORMAL) & (largest <= 1.25 * HALF_NORMAL * high)
    fine = small | (_error(y, q * scales) <= _plain_error(y, largest, bits) + 2 * _slack(y))
    wrong: Mask = ~(nearest & fine & (np.abs(scales) >= HALF_NORMAL))
    return wrong


def not_kmeans(x: Array, codes: Codes, tables: Array, *, weighted: bool) -> Mask:
    """Which groups are not indices of the nearest values in ascending tables: x, codes (n, weights), tables (n, values).

    weighted  by a calibration: then a group's error is held against its weights; without, it is at most that of even levels
              up to the largest weight, of both signs, in float16
    """
    own = np.take_along_axis(tables, codes.astype(np.intp), axis=1)
    middles = (tables[:, 1:] + tables[:, :-1]) / 2  # of neighbours: exact, but for its last bit
    ends = np.pad(middles, ((0, 0), (1, 1)), constant_values=(-np.inf, np.inf))
    below, above = (np.take_along_axis(ends, codes.astype(np.intp) + i, axis=1) for i in (0, 1))
    room = 2 * _ULP * np.abs(x)
    nearest = ((x >= below - room) & (x <= above + room)).all(axis=1)
    ascending = (np.diff(tables, axis=1) >= 0).all(axis=1)
    if weighted:
        allowed = WEIGHTED_RMS**2 * _squares(x) + x.shape[1] * 2.0**-50  # half a step of float16's smallest numbers
    else:
        allowed = _even_error(x, tables.shape[1]) + _RESOLUTION * _squares(x)
    wrong: Mask = ~(nearest & ascending & (squared_error(x, own) <= allowed))
    return wrong


def _columns(x: Array, codes: Codes) -> tuple[Array, Array, Array]:
    """Blocks as columns, (block, n), along which numpy is fastest; their codes; and their largest weights."""
    y = np.ascontiguousarray(x.T)
    return y, np.ascontiguousarray(codes.T, np.float32), np.maximum(y.max(axis=0), -y.min(axis=0))


def _one_factor(y: Array, q: Array, bits: int) -> Mask:
    """Whether there is a positive factor for each block that takes y to q, rounded and clipped."""
    along, inverse = q * np.copysign(np.float32(1), y), 1 / np.abs(y)
    last = along - (y < 0) >= 2 ** (bits - 1) - 1  # there is one level more below zero
    least = ((along - np.float32(0.5)) * inverse).max(axis=0)
    most = np.where(last, np.float32(np.inf), (along + np.float32(0.5)) * inverse).min(axis=0)
    found: Mask = (most > 0) & (least <= most * (1 + 16 * _ULP))
    return found


def _dot(x: Array, y: Array) -> Array:
    total: Array = np.einsum("ij,ij->j", x, y)
    return total


def _error(y: Array, w: Array) -> Array:
    d = y - w
    return _dot(d, d)


def _slack(y: Array) -> Array:
    """What rtn's sums leave open of the squared error of every block (block, n); those of longer rows leave more."""
    return _dot(y, y) * np.float32(_RESOLUTION * max(1.0, len(y) / 256))


def _plain_error(y: Array, largest: Array, bits: int) -> Array:
    """The squared error of every block with scale = largest / (2**(bits-1) - 1)."""
    s = largest / np.float32(2 ** (bits - 1) - 1)
    return _error(y, np.rint(y / np.where(s > 0, s, 1)) * s)


def _squares(x: Array) -> Array:
    total: Array = np.einsum("ij,ij->i", x, x)
    return total


def _even_error(x: Array, k: int) -> Array:
    """The squared error of k even levels up to the largest weight, of both signs, each in float16."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    levels = (largest * np.linspace(-1, 1, k, dtype=np.float32)).astype(np.float16).astype(np.float32)
    nearest = np.rint((x / np.where(largest > 0, largest, 1) + 1) * np.float32((k - 1) / 2)).astype(np.intp)
    return squared_error(x, np.take_along_axis(levels, nearest, axis=1))
