"""Round to nearest, with the scale of every block searched for the least squared error."""

import numpy as np

from ..errors import QuantizeError
from ..qtensor import BLOCKS, HALF_NORMAL, Array, QTensor

# The search for a block's scale at 4 bits: first the level, not yet rounded, that the largest weight is brought to, for
# either sign of the scale (clipping it a little, or leaving levels unused, often pays); then factors around the best;
# then the least-squares scale of its codes. That is within .1 % of the squared error of trying 100 levels, and takes a
# seventh of the time. At 8 bits the largest weight goes to the last level: a search
# would lower the squared error by 5 %, of which the perplexity shows nothing.
_LEVELS = {4: (-8.6, -8.0, -7.4, 6.6, 7.0, 7.6), 8: (-128.0, 127.0)}
_NEAR = {4: (1.05, 0.95, 1.03, 0.97, 1.015, 0.985), 8: ()}
_IN_CACHE = 1 << 18  # weights worked on at once


def rtn(w: Array, *, bits: int, block: int) -> QTensor:
    """Round every block of weights to the nearest of 2**bits levels.

    w      (O, I) float32; a short last block is allowed
    bits   4 or 8
    block  weights along I that share one scale: 16, 32, 64, 128 or 256, or all of I

    Error   the squared error of every block is at most that of scale = largest / (2**(bits-1) - 1), where no weight is
            more than scale / 2 from its code, and 1e-6 of the block's sum of squares: float32's resolution of the search.
            Blocks whose largest weight is below 1e-30 become zeros.
    Raises  QuantizeError if bits or block are not of these, or w has a NaN, an infinity, or weights beyond about 1e36.
    """
    if bits not in _LEVELS or block not in (*BLOCKS, w.shape[-1]):
        raise QuantizeError(f"{bits} bits in blocks of {block}: expected 4 or 8 bits, blocks of {BLOCKS}")
    if not np.isfinite(w).all():
        raise QuantizeError("the weights hold a NaN or an infinity")
    n_out, n_in = w.shape
    n_blocks = -(-n_in // block)
    x = np.zeros((n_out, n_blocks * block), np.float32) if n_in % block else np.ascontiguousarray(w, np.float32)
    if n_in % block:
        x[:, :n_in] = w
    x = x.reshape(-1, block)
    codes, scales = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    step = max(1, _IN_CACHE // block)
    for i in range(0, len(x), step):
        q, scales[i : i + step] = _blocks(np.ascontiguousarray(x[i : i + step].T), bits)
        codes[i : i + step] = q.T
    if not np.isfinite(scales).all():
        raise QuantizeError(f"weights up to {np.abs(w).max():.1e} are beyond what can be quantized in float32")
    return QTensor(codes.reshape(n_out, -1)[:, :n_in], scales.reshape(n_out, n_blocks), bits, block)


def with_half_scales(w: Array, q: QTensor) -> QTensor:
    """Round the scales to float16, and the weights to the levels that these make.

    No scale is below 2^-14, but for 0: a unit may take smaller numbers of float16 as 0, and all of a row would be lost.

    Raises  QuantizeError if a scale is beyond float16, or all are so small that little of them is left.
    """
    with np.errstate(over="ignore"):
        floor = np.where(q.scales < 0, -HALF_NORMAL, HALF_NORMAL).astype(np.float32)
        scales = np.where(np.abs(q.scales) < HALF_NORMAL, floor, q.scales).astype(np.float16).astype(np.float32)
    largest = np.abs(scales).max() * 2.0 ** (q.bits - 1)
    if not largest <= np.finfo(np.float16).max or 0 < np.abs(q.scales).max() < 2**-20:
        raise QuantizeError(f"scales from {np.abs(q.scales).min():.1e} to {np.abs(q.scales).max():.1e} do not fit float16")
    each = np.repeat(scales, q.block, axis=1)[:, : w.shape[1]]
    levels = np.divide(w, each, out=np.zeros_like(w), where=each != 0)
    codes = np.clip(np.rint(levels), -(2 ** (q.bits - 1)), 2 ** (q.bits - 1) - 1).astype(np.int8)
    return QTensor(codes, scales, q.bits, q.block)


def _blocks(x: Array, bits: int) -> tuple[Array, Array]:
    """Codes (as floats) and scales of blocks as columns, (block, n): numpy is fastest along long rows."""
    if x.shape[1] == 1:  # numpy sums a single column in another order: a block must not notice that it is alone
        q, scales = _blocks(np.repeat(x, 2, axis=1), bits)
        return q[:, :1], scales[:1]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    top, bottom = x.max(axis=0), x.min(axis=0)
    largest = np.where(top > -bottom, top, bottom)
    largest[np.abs(largest) < 1e-30] = 1  # a block of zeros; its codes are zeros at any scale
    q = np.empty_like(x)

    def fit(inverse: Array) -> tuple[Array, Array]:
        """Round x * inverse into q: least-squares scale <x, q> / <q, q>, squared error |x|^2 - <x, q>^2 / <q, q>."""
        np.multiply(x, inverse, out=q)
        np.rint(q, out=q)
        np.clip(q, low, high, out=q)
        return np.einsum("ij,ij->j", x, q), np.maximum(np.einsum("ij,ij->j", q, q), 1)

    best, chosen, scale = np.full((3, x.shape[1]), -1, np.float32)

    def attempt(inverse: Array) -> None:
        xq, qq = fit(inverse)
        score = np.abs(xq) / np.sqrt(qq)
        better = score > best
        best[better], chosen[better], scale[better] = score[better], inverse[better], (xq / qq)[better]

    for level in _LEVELS[bits]:
        attempt(np.float32(level) / largest)
    for factor in _NEAR[bits]:
        attempt(chosen * np.float32(factor))
    attempt(np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0))
    fit(chosen)
    return q, scale
