"""What each method declares holds for whatever it quantizes, however strange: check raises no false alarm."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rwkv_edge.qtensor import BLOCKS
from rwkv_edge.quantize import declared, kmeans, rtn, with_half_scales

finite = st.floats(-1e3, 1e3, width=32)
lumpy = st.sampled_from([0.0, -0.0, 1e-35, 1e-7, 0.1, 0.3, -0.25, 0.5, -0.5, 1.5, 1.0, 7.0, -8.0, 127.0, 1e3])
widths, blocks = st.sampled_from([4, 8]), st.sampled_from(BLOCKS)


@st.composite
def matrices(draw, step=1):
    n_out, n_in = draw(st.integers(1, 6)), step * draw(st.integers(1, 300 // step))
    return draw(arrays(np.float32, (n_out, n_in), elements=draw(st.sampled_from([finite, lumpy]))))


def in_blocks(x, block):
    return np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(-1, block)


def check_rtn(w, bits, block):
    q = rtn(w, bits=bits, block=block)
    with np.errstate(all="ignore"):
        assert not declared.not_rtn(in_blocks(w, block), in_blocks(q.codes, block), q.scales.reshape(-1), bits).any()


@given(matrices(), widths, blocks)
def test_rtn_is_what_it_declares(w, bits, block):
    check_rtn(w, bits, block)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-3, 1.0, 300.0]), widths, blocks)
def test_rtn_is_what_it_declares_of_usual_weights(seed, size, bits, block):
    """Normal, and with outliers."""
    w = np.random.default_rng(seed).standard_t(3, (64, 512)).astype(np.float32) * np.float32(size)
    check_rtn(w, bits, block)


def check_half(w, bits, block):
    q = rtn(w, bits=bits, block=block)
    if 0 < np.abs(q.scales).max() < 2**-20 or np.abs(q.scales).max() * 2.0**bits > 6e4:
        return
    q = with_half_scales(w, q)
    with np.errstate(all="ignore"):
        assert not declared.not_half_rtn(w.reshape(-1, block), q.codes.reshape(-1, block), q.scales.reshape(-1), bits).any()


@given(matrices(step=32), widths)
def test_half_scales_are_what_they_declare(w, bits):
    check_half(w, bits, 32)
    check_half(w, bits, w.shape[1])


@given(st.integers(0, 2**32 - 1), st.floats(-5, 1), widths, st.sampled_from([32, 512]))
def test_half_scales_are_what_they_declare_of_usual_weights(seed, size, bits, block):
    """Of any size: below some, scales are the smallest normal number of float16."""
    w = np.random.default_rng(seed).standard_t(3, (64, 512)).astype(np.float32) * np.float32(10**size)
    check_half(w, bits, block)


@given(matrices(), st.sampled_from([4, 6]), st.booleans())
def test_tables_are_what_they_declare(w, bits, by_row):
    rows = 1 if by_row else len(w)
    q = kmeans(w, bits=bits, rows=rows)
    groups = (a.reshape(len(q.tables), -1) for a in (w, q.codes))
    assert not declared.not_kmeans(*groups, q.tables, weighted=False).any()


@pytest.mark.parametrize("bits", [4, 6])
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 3))
def test_weighted_tables_are_what_they_declare(bits, seed, spread):
    """Of inputs whose mean squares differ by up to some millions."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((16, 128)).astype(np.float32)
    importance = np.exp(spread * rng.standard_normal(128)).astype(np.float32)
    q = kmeans(w, bits=bits, rows=16, importance=importance)
    x, codes = w.reshape(1, -1), q.codes.reshape(1, -1)
    assert not declared.not_kmeans(x, codes, q.tables, weighted=True).any()
    one = np.full_like(q.tables, w.mean())
    assert declared.not_kmeans(x, np.zeros_like(codes), one, weighted=True).all()  # one value for all is no table of these


# --- by hand ---

X = np.array([[7.0, 3.4, -1.6, 0.4]], np.float32)
CODES = np.array([[7, 3, -2, 0]], np.int16)
SCALE = np.array([(49 + 10.2 + 3.2) / (49 + 9 + 4)], np.float32)  # <x, q> / <q, q>
EVEN = np.array([np.arange(16)], np.float32)


@pytest.mark.parametrize(
    ("codes", "scale", "wrong"),
    [
        (CODES, SCALE, False),
        (-CODES, -SCALE, False),  # no code is beyond its levels
        ([[7, 4, -2, 0]], SCALE, True),  # no factor takes 3.4 to 4 and 7 to 7
        ([[7, 3, -2, 0]], SCALE * 1.0001, True),  # not the least-squares scale
        ([[1, 0, 0, 0]], [7.0], True),  # a rounding with its best scale, and a coarse one
        ([[7, 3, -2, 0]], [np.nan], True),
    ],
)
def test_blocks_by_hand(codes, scale, wrong):
    assert declared.not_rtn(X, np.array(codes), np.array(scale, np.float32), 4).tolist() == [wrong]


@pytest.mark.parametrize(
    ("codes", "scale", "wrong"),
    [
        ([[7, 3, -2, 0]], [1.0], False),
        ([[7, 4, -2, 0]], [1.0], True),
        ([[3, 2, -1, 0]], [2.0], True),
        ([[0, 0, 0, 0]], [0.0], True),
    ],
)
def test_half_blocks_by_hand(codes, scale, wrong):
    """7 / 2 = 3.5 may become 3 or 4: what is wrong with the third is its error."""
    with np.errstate(all="ignore"):
        assert declared.not_half_rtn(X, np.array(codes), np.array(scale, np.float32), 4).tolist() == [wrong]


@pytest.mark.parametrize(
    ("x", "codes", "tables", "wrong"),
    [
        ([[0.0, 1.4, 15.0]], [[0, 1, 15]], EVEN, False),
        ([[0.0, 1.5, 15.0]], [[0, 1, 15]], EVEN, False),  # as near to 1 as to 2
        ([[0.0, 1.4, 15.0]], [[0, 2, 15]], EVEN, True),
        ([[0.0, 1.4, 15.0]], [[0, 1, 15]], EVEN[:, ::-1], True),
        # even levels are -15, -13 ... 15: their squared error is 1 for 0 and .01 for .9, or .16 for 1.4
        ([[0.0, 0.9, 15.0]], [[14, 14, 15]], np.array([[0.0] * 15 + [15]]), False),
        ([[0.0, 1.4, 15.0]], [[14, 14, 15]], np.array([[0.0] * 15 + [15]]), True),
        ([[0.0, 1.4, 15.0]], [[0, 0, 0]], np.full((1, 16), 3.0), True),
    ],
)
def test_tables_by_hand(x, codes, tables, wrong):
    found = declared.not_kmeans(np.array(x, np.float32), np.array(codes), tables.astype(np.float32), weighted=False)
    assert found.tolist() == [wrong]
