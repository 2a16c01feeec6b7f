"""Tables of values: properties that hold for any matrix, and what flows into matrices."""

from importlib import import_module
from itertools import pairwise

import factory
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.errors import QuantizeError
from rwkv_edge.models import model_of
from rwkv_edge.ops import Numpy
from rwkv_edge.qtensor import Lut
from rwkv_edge.quantize import kmeans, mean_squares
from rwkv_edge.reference import Weights, run_reference

# float64's resolution of a group's squared error, in sums of squares, and of float32's middles between values
RESOLUTION = 1e-9

finite = st.floats(-6e4, 6e4, width=32)
lumpy = st.sampled_from([0.0, -0.0, 1e-42, 1e-7, -1e-7, 0.1, 0.3, -0.25, 1.0, 6e4, -6e4])
widths = st.sampled_from([4, 6])
sharing = st.integers(1, 3)


@st.composite
def matrices(draw, elements=None, n_in=70):
    """A matrix, and how many of its rows share a table."""
    rows, n_groups = draw(sharing), draw(st.integers(1, 3))
    elements = draw(st.sampled_from([finite, lumpy])) if elements is None else elements
    return draw(arrays(np.float32, (rows * n_groups, draw(st.integers(1, n_in))), elements=elements)), rows


def importances(n_in):
    return arrays(np.float32, n_in, elements=st.floats(0, 1e4, width=32))


def half(x):
    return np.asarray(x).astype(np.float16).astype(np.float64)


def errors(w, q, importance=1.0):
    """Weighted squared error of every group, in float64."""
    return ((q.dequantize().astype(np.float64) - w) ** 2 * importance).reshape(len(q.tables), -1).sum(1)


def errors_of_tables(w, tables, importance=1.0):
    """The least that these tables can do."""
    x = w.reshape(len(tables), -1).astype(np.float64)
    weight = np.broadcast_to(importance, w.shape).reshape(x.shape)
    return (np.abs(x[:, :, None] - half(tables)[:, None, :]).min(-1) ** 2 * weight).sum(1)


def even(w, bits, n_groups):
    """Even levels up to the largest weight of a group, of both signs."""
    largest = np.abs(w).reshape(n_groups, -1).max(1, keepdims=True)
    return largest * np.linspace(-1, 1, 2**bits)


def quantiles(w, bits, n_groups):
    x = np.sort(w.reshape(n_groups, -1), axis=1)
    return x[:, ((np.arange(2**bits) + 0.5) / 2**bits * x.shape[1]).astype(int)]


def squares(w, n_groups, importance=1.0):
    return (w.astype(np.float64) ** 2 * importance).reshape(n_groups, -1).sum(1)


def weights_like(seed, shape, tail=4):
    """Student's numbers: like weights, with some far from all the others."""
    return (0.02 * np.random.default_rng(seed).standard_t(tail, shape)).astype(np.float32)


def check(q, w, bits, rows):
    """What every Lut is."""
    assert q.codes.dtype == np.uint8
    assert q.tables.dtype == np.float32
    assert q.shape == w.shape
    assert q.tables.shape == (len(w) // rows, 2**bits)
    assert q.codes.max() < 2**bits
    assert np.isfinite(q.tables).all()
    assert (np.diff(q.tables) >= 0).all()
    np.testing.assert_array_equal(half(q.tables), q.tables)
    for i, table in enumerate(q.tables):
        codes, x = q.codes[i * rows : (i + 1) * rows], w[i * rows : (i + 1) * rows]
        assert set(table[codes].ravel()) == set(table), "a value that no weight uses is not another's"
        distance = np.abs(x.astype(np.float64) - table[codes])
        nearest = np.abs(x.astype(np.float64)[..., None] - table).min(-1)
        assert (distance <= nearest + 1e-6 * np.abs(x)).all()


@given(matrices(), widths)
def test_no_weight_has_a_nearer_value_and_no_value_is_unused(case, bits):
    w, rows = case
    check(kmeans(w, bits=bits, rows=rows), w, bits, rows)


@given(matrices(), widths)
def test_never_worse_than_even_levels_or_quantiles(case, bits):
    w, rows = case
    q = kmeans(w, bits=bits, rows=rows)
    n = len(q.tables)
    for tables in (even(w, bits, n), quantiles(w, bits, n)):
        assert (errors(w, q) <= errors_of_tables(w, tables) + RESOLUTION * squares(w, n)).all()


@pytest.mark.parametrize(("bits", "over_even", "over_quantiles"), [(4, 0.35, 0.4), (6, 0.15, 0.3)])
def test_far_better_than_even_levels_or_quantiles_on_weights(bits, over_even, over_quantiles):
    w = weights_like(0, (32, 512))
    error = errors(w, kmeans(w, bits=bits, rows=8)).sum()
    assert error < over_even * errors_of_tables(w, even(w, bits, 4)).sum()
    assert error < over_quantiles * errors_of_tables(w, quantiles(w, bits, 4)).sum()


NEAR = {4: 1.02, 6: 1.06}  # Lloyd's iteration alone: 1.05 to 1.1 and 1.2 to 4


def least(x, k, weight):
    """The least weighted squared error that any k values can have, by dynamic programming over sorted weights."""
    order = np.argsort(x)
    x, weight = x[order].astype(np.float64), np.asarray(weight, np.float64)[order]
    W, S, Q = (np.concatenate([[0], np.cumsum(weight * x**p)]) for p in range(3))
    i, j = np.triu_indices(len(W), 1)
    cost = np.full((len(W), len(W)), np.inf)
    cost[i, j] = Q[j] - Q[i] - (S[j] - S[i]) ** 2 / (W[j] - W[i])
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1]


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("tail", [1.5, 4, 1e6])
@pytest.mark.parametrize("calibrated", [False, True])
def test_near_the_least_error_there_is(bits, tail, calibrated):
    w = np.clip(weights_like(3, (3, 400), tail), -1e4, 1e4)
    importance = np.random.default_rng(1).gamma(1.0, size=400).astype(np.float32) + 0.01 if calibrated else np.ones(400)
    q = kmeans(w, bits=bits, rows=1, importance=importance.astype(np.float32) if calibrated else None)
    least_there_is = [least(x, 2**bits, importance) for x in w]
    found = errors(w, q, importance)
    assert (found >= 0.999 * np.array(least_there_is)).all()
    assert found.sum() <= NEAR[bits] * sum(least_there_is)


@given(matrices(), widths)
def test_few_different_weights_are_kept(case, bits):
    w, rows = case
    few = w.ravel()[: min(w.size, 2**bits)]
    w = few[np.arange(w.size) % len(few)].reshape(w.shape)
    np.testing.assert_array_equal(kmeans(w, bits=bits, rows=rows).dequantize(), half(w))


@pytest.mark.parametrize("bits", [4, 6])
def test_an_outlier_takes_one_value_and_no_more(bits):
    w = weights_like(0, (4, 1000), 1e6)
    plain = errors(w, kmeans(w, bits=bits, rows=4)).sum()
    w[2, 17] = 2048  # a float16
    q = kmeans(w, bits=bits, rows=4)
    assert q.dequantize()[2, 17] == 2048
    assert errors(w, q).sum() < (1.35 if bits == 4 else 1.15) * plain


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize(
    "w",
    [
        np.zeros((4, 8)),
        np.full((1, 1), -3.5),
        np.full((2, 3), 1e-45),
        np.full((2, 3), -65504),
        np.array([[65504, -65504, 0.0, -0.0]] * 2),
        np.array([[1e-8, 3e-8, 6e-8, -2e-7, 1e-45] * 40] * 2),
        np.linspace(-3e-7, 3e-7, 200).reshape(2, 100),
        np.concatenate([np.full((2, 300), 1e-3), np.linspace(1, 60000, 200).reshape(2, 100)], axis=1),
        -np.concatenate([np.full((2, 300), 1e-3), np.linspace(1, 60000, 200).reshape(2, 100)], axis=1),
    ],
    ids=["zeros", "one", "denormal", "largest", "both largest", "tiny", "tiny and many", "steps", "negative steps"],
)
def test_strange_groups(w, bits):
    w = w.astype(np.float32)
    for rows in {1, len(w)}:
        for importance in (None, np.ones(w.shape[1], np.float32), np.arange(w.shape[1], dtype=np.float32)):
            q = kmeans(w, bits=bits, rows=rows, importance=importance)
            check(q, w, bits, rows)
            if len(np.unique(w)) <= 16:
                np.testing.assert_array_equal(q.dequantize(), half(w))


@given(st.integers(0, 99), widths, sharing, st.booleans())
def test_twice_the_weights_are_twice_the_tables(seed, bits, rows, calibrated):
    w = 64 * weights_like(seed, (6 * rows, 50))
    importance = np.random.default_rng(seed).random(50, np.float32) if calibrated else None
    one, two = (kmeans(x, bits=bits, rows=rows, importance=importance) for x in (w, 2 * w))
    assume(np.abs(one.tables).min() > 2**-13)  # where float16 has all its digits
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(2 * one.tables, two.tables)


@given(matrices(), widths, st.randoms(use_true_random=False), st.booleans())
def test_columns_do_not_know_their_places(case, bits, random, calibrated):
    w, rows = case
    order = list(range(w.shape[1]))
    random.shuffle(order)
    importance = np.random.default_rng(len(order)).integers(0, 4, len(order)).astype(np.float32) if calibrated else None
    a = kmeans(w, bits=bits, rows=rows, importance=importance)
    b = kmeans(w[:, order], bits=bits, rows=rows, importance=None if importance is None else importance[order])
    np.testing.assert_array_equal(a.codes[:, order], b.codes)
    assert a.tables.tobytes() == b.tables.tobytes()


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("bits", "rows", "n_in"), [(4, 1, 65), (6, 1, 700), (4, 8, 48), (6, 3, 1)])
def test_a_group_does_not_know_its_neighbours(bits, rows, n_in, calibrated, monkeypatch):
    w = weights_like(0, (rows * 24, n_in))
    w[rows : 2 * rows] = 0
    w[2 * rows : 3 * rows, 0] = 1000
    importance = np.random.default_rng(0).gamma(1, size=n_in).astype(np.float32) if calibrated else None
    whole = kmeans(w, bits=bits, rows=rows, importance=importance)
    for at_once in (1, 5, 24):
        for i in range(0, 24, at_once):
            part = slice(i * rows, (i + at_once) * rows)
            q = kmeans(w[part], bits=bits, rows=rows, importance=importance)
            assert q.codes.tobytes() == whole.codes[part].tobytes()
            assert q.tables.tobytes() == whole.tables[i : i + at_once].tobytes()
    monkeypatch.setattr(import_module("rwkv_edge.quantize.kmeans"), "_AT_ONCE", 7 * rows * n_in)
    again = kmeans(w, bits=bits, rows=rows, importance=importance)
    assert (again.codes.tobytes(), again.tables.tobytes()) == (whole.codes.tobytes(), whole.tables.tobytes())


@given(matrices(n_in=200))
def test_six_bits_are_never_worse_than_four(case):
    w, rows = case
    four, six = (kmeans(w, bits=bits, rows=rows) for bits in (4, 6))
    slack = RESOLUTION * squares(w, len(w) // rows)
    assert (errors(w, six) <= errors(w, four) + slack).all()


def test_six_bits_and_fewer_rows_are_better_on_weights():
    w = weights_like(0, (32, 256))
    found = [errors(w, kmeans(w, bits=bits, rows=rows)).sum() for bits, rows in ((4, 32), (4, 8), (4, 2), (4, 1), (6, 32))]
    assert all(b < a for a, b in pairwise(found))
    assert found[-1] < found[0] / 10


@given(matrices().flatmap(lambda m: st.tuples(st.just(m), importances(m[0].shape[1]))), widths)
def test_importance_never_raises_the_weighted_error(case, bits):
    (w, rows), importance = case
    q = kmeans(w, bits=bits, rows=rows, importance=importance)
    check(q, w, bits, rows)
    n, slack = len(q.tables), RESOLUTION * squares(w, len(q.tables), importance)
    without = errors(w, kmeans(w, bits=bits, rows=rows), importance)
    # what a column counts is kept in 21 bits
    assert (errors(w, q, importance) <= without * (1 + 1e-6) + slack).all()
    assert (errors(w, q, importance) <= errors_of_tables(w, even(w, bits, n), importance) * (1 + 1e-6) + slack).all()


def test_importance_lowers_the_weighted_error():
    w, importance = weights_like(0, (16, 300)), np.full(300, 1e-3, np.float32)
    w[:, :100] *= 5
    importance[:100] = 1
    q, plain = (kmeans(w, bits=4, rows=4, importance=i) for i in (importance, None))
    assert errors(w, q, importance).sum() < 0.9 * errors(w, plain, importance).sum()
    assert errors(w, q).sum() > errors(w, plain).sum()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 3e38, 1e-45])
def test_the_same_importance_everywhere_is_none(value):
    w = weights_like(0, (8, 100))
    q, plain = (kmeans(w, bits=4, rows=2, importance=i) for i in (np.full(100, value, np.float32), None))
    np.testing.assert_array_equal(q.tables, plain.tables)
    np.testing.assert_array_equal(q.codes, plain.codes)


def test_columns_that_count_nothing_take_no_values_and_get_the_nearest():
    w, importance = weights_like(0, (4, 200)), np.ones(200, np.float32)
    w[:, 150:], importance[150:] = 7 + 1000 * w[:, 150:], 0
    q = kmeans(w, bits=4, rows=4, importance=importance)
    alone = kmeans(w[:, :150], bits=4, rows=4)
    np.testing.assert_allclose(errors(w, q, importance), errors(w[:, :150], alone), rtol=0.03)
    check(q, w, 4, 4)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (np.ones((4, 4)), {"bits": 5}, "tables for 5 bits: expected 4 or 6 bits"),
        (np.ones((4, 4)), {"bits": 8}, "tables for 8 bits: expected 4 or 6 bits"),
        (np.ones((4, 4)), {"rows": 3}, "3 rows that share a table do not divide a matrix of 4 rows of 4"),
        (np.ones((4, 4)), {"rows": 0}, "0 rows that share a table do not divide a matrix of 4 rows of 4"),
        (np.ones((4, 4)), {"rows": -2}, "-2 rows that share a table do not divide a matrix of 4 rows of 4"),
        (np.ones((4, 4)), {"rows": 8}, "8 rows that share a table do not divide a matrix of 4 rows of 4"),
        (np.ones((0, 4)), {}, "1 rows that share a table do not divide a matrix of 0 rows of 4"),
        (np.ones((4, 0)), {}, "1 rows that share a table do not divide a matrix of 4 rows of 0"),
        (np.array([[1, np.nan]]), {}, "the weights hold a NaN or an infinity"),
        (np.array([[1, np.inf]]), {}, "the weights hold a NaN or an infinity"),
        (np.array([[1, -np.inf]]), {}, "the weights hold a NaN or an infinity"),
        (np.array([[1, -65520]]), {}, r"weights up to 6\.6e\+04 are beyond 65504, the largest that a table in float16"),
        (np.array([[1, 1e30]]), {}, r"weights up to 1\.0e\+30 are beyond 65504"),
        (np.ones((4, 4)), {"importance": np.ones(3)}, r"importance of shape \(3,\) for 4 inputs: expected one number for each"),
        (np.ones((4, 4)), {"importance": np.ones((4, 4))}, r"importance of shape \(4, 4\) for 4 inputs"),
        (np.ones((1, 2)), {"importance": np.array([1, np.nan])}, "importance holds a NaN, an infinity or a negative number"),
        (np.ones((1, 2)), {"importance": np.array([1, np.inf])}, "importance holds a NaN, an infinity or a negative number"),
        (np.ones((1, 2)), {"importance": np.array([1, -1e-9])}, "importance holds a NaN, an infinity or a negative number"),
    ],
)
def test_what_does_not_fit_is_refused(w, options, message):
    options = {"bits": 4, "rows": 1} | options
    if "importance" in options:
        options["importance"] = options["importance"].astype(np.float32)
    with pytest.raises(QuantizeError, match=message):
        kmeans(w.astype(np.float32), **options)


# --- as a matrix ---


def test_a_lut_is_its_tables_at_its_codes():
    codes = np.array([[0, 1, 2], [3, 0, 0], [1, 1, 3], [0, 2, 2]], np.uint8)
    tables = np.zeros((2, 16), np.float32)
    tables[:, :4] = [[1, 2, 3, 4], [-5, -6, -7, -8]]
    q = Lut(codes, tables, 4, 2)
    assert q.shape == (4, 3)
    assert q.nbytes == 6 + 64
    assert Lut(codes[:, :1], tables, 6, 2).nbytes == 3 + 64
    expected = np.array([[1, 2, 3], [4, 1, 1], [-6, -6, -8], [-5, -7, -7]], np.float32)
    assert q.dequantize().dtype == np.float32
    np.testing.assert_array_equal(q.dequantize(), expected)
    np.testing.assert_array_equal(q.take(np.array([3, 1, 1])).dequantize(), expected[[3, 1, 1]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_computes_with_it_as_with_its_weights(dtype):
    q = kmeans(weights_like(0, (12, 20)), bits=4, rows=3)
    x, F = np.random.default_rng(0).standard_normal((1, 5, 20)).astype(dtype), Numpy(1, dtype=dtype)
    y, rows = F.linear(x, q), F.embed(q, np.array([11, 0, 4, 4]))
    assert (y.dtype, rows.dtype) == (dtype, dtype)
    np.testing.assert_array_equal(y, F.linear(x, q.dequantize()))
    np.testing.assert_array_equal(rows, q.dequantize()[None, [11, 0, 4, 4]])


def test_a_model_runs_on_tables(weights):
    spec, W = weights("plain")
    quantized = {n: kmeans(x, bits=6, rows=8) if spec.weights[n].kind in ("matrix", "head") else x for n, x in W.items()}
    plain = {n: x.dequantize() if isinstance(x, Lut) else x for n, x in quantized.items()}
    ids = factory.tokens(20, spec.n_vocab)
    np.testing.assert_array_equal(run_reference(spec, quantized, ids)[0], run_reference(spec, plain, ids)[0])


# --- what flows into matrices ---


class Recorder(Numpy):
    """What `linear` is given, by the matrix's own number in it."""

    def __init__(self, n_head):
        super().__init__(n_head, dtype=np.float64)
        self.seen = []

    def linear(self, x, W, bias=None):
        self.seen.append((W, x[0]))
        return super().linear(x, W, bias)


@pytest.mark.parametrize("name", factory.SHAPES)
def test_mean_squares_are_those_of_all_inputs(name, weights):
    """Against the plain step in float64, one token after the other, which names nothing: matrices by identity."""
    spec, W = weights(name)
    ids = factory.tokens(150, spec.n_vocab)
    F = Recorder(spec.n_head)
    state = {
        n: np.full((1, *t.shape) if len(t.shape) == 3 else (1, 1, t.shape[0]), t.first) for n, t in spec.state_tensors.items()
    }
    model_of(spec.version).step(F, W, spec, np.asarray(ids), np.arange(len(ids)), state)
    expected = {next(n for n in W if W[n] is matrix): (x**2).mean(0) for matrix, x in F.seen}
    found = mean_squares(spec, W, ids)
    assert set(found) == {n for n, w in spec.weights.items() if w.kind in ("matrix", "low_rank", "head")} == set(expected)
    for n, x in expected.items():
        assert found[n].dtype == np.float32
        np.testing.assert_allclose(found[n], x, rtol=1e-3, atol=1e-6 * x.max(), err_msg=n)


def test_calibration_reads_one_tensor_at_a_time(random_pth):
    """None is asked for while another is held; the head is never read; progress ends at all tokens."""
    checkpoint = open_checkpoint(random_pth("odd"))
    told = []

    class Counted(Weights):
        def __getitem__(self, name):
            assert name != "head.weight"
            return super().__getitem__(name)

    lazy = mean_squares(
        checkpoint.spec, Counted(checkpoint.tensors), factory.tokens(130, 61), progress=lambda *n: told.append(n)
    )
    assert told == [(64, 130), (128, 130), (130, 130)]
    whole = mean_squares(checkpoint.spec, dict(Weights(checkpoint.tensors)), factory.tokens(130, 61))
    assert all((lazy[n] == whole[n]).all() for n in whole)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "a calibration without tokens measures nothing"),
        ([3, 61], "tokens from 3 to 61: the vocabulary has 61"),
        ([-1, 5], "tokens from -1 to 5: the vocabulary has 61"),
    ],
)
def test_calibrations_that_cannot_be_are_refused(ids, message, weights):
    spec, W = weights("odd")
    with pytest.raises(QuantizeError, match=message):
        mean_squares(spec, W, ids)


def test_a_model_that_overflows_cannot_be_calibrated(weights):
    spec, W = weights("odd")
    W = W | {"blocks.0.ffn.key.weight": W["blocks.0.ffn.key.weight"] * np.float32(1e30)}
    with pytest.raises(QuantizeError, match=r"what flows into blocks\.0\.ffn\.value\.weight overflows float32"):
        mean_squares(spec, W, [1, 2, 3])
