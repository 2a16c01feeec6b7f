"""Rounding and packing: properties that hold for any matrix."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rwkv_edge.errors import QuantizeError
from rwkv_edge.qtensor import BLOCKS, QTensor, Recipe
from rwkv_edge.quantize import plan, rtn
from rwkv_edge.spec import Spec, Weight

finite = st.floats(-1e4, 1e4, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(lambda s: arrays(np.float32, s, elements=finite))
widths = st.sampled_from([4, 8])
blocks = st.sampled_from(BLOCKS)


def blockwise(x, block):
    """Sums over blocks, in float64."""
    padded = np.zeros((x.shape[0], -(-x.shape[1] // block) * block))
    padded[:, : x.shape[1]] = x
    return padded.reshape(x.shape[0], -1, block).sum(-1)


def absmax(w, bits, block):
    """Plain rounding: largest / (2**(bits-1) - 1) as the scale; no weight is more than scale / 2 away."""
    n = 2 ** (bits - 1) - 1
    padded = np.zeros((w.shape[0], -(-w.shape[1] // block) * block))
    padded[:, : w.shape[1]] = w
    padded = padded.reshape(w.shape[0], -1, block)
    scale = np.abs(padded).max(-1, keepdims=True) / n
    rounded = np.round(padded / np.where(scale == 0, 1, scale)) * scale
    assert (np.abs(rounded - padded) <= scale / 2 * (1 + 1e-9)).all()
    return rounded.reshape(w.shape[0], -1)[:, : w.shape[1]]


@given(matrices, widths, blocks)
def test_rtn_is_never_worse_than_plain_rounding(w, bits, block):
    q = rtn(w, bits=bits, block=block)
    error = blockwise((q.dequantize().astype(np.float64) - w) ** 2, block)
    plain = blockwise((absmax(w.astype(np.float64), bits, block) - w) ** 2, block)
    assert (error <= plain + 1e-6 * blockwise(w.astype(np.float64) ** 2, block)).all()


def test_rtn_beats_plain_rounding_on_normal_weights():
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    for bits, block, gain in ((4, 32, 0.75), (4, 128, 0.75), (8, 32, 1.0)):
        found = ((rtn(w, bits=bits, block=block).dequantize() - w) ** 2).mean()
        assert found < gain * ((absmax(w, bits, block) - w) ** 2).mean()


@given(matrices, widths, blocks)
def test_packing_is_a_bijection(w, bits, block):
    q = rtn(w, bits=bits, block=block)
    packed = q.pack()
    assert packed.dtype == np.uint8
    assert packed.nbytes + q.scales.nbytes == q.nbytes
    back = QTensor.unpack(packed, q.scales, bits=bits, block=block, n_in=w.shape[1])
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.pack(), packed)


@given(st.integers(0, 2**32 - 1), widths, st.sampled_from([16, 32]))
def test_every_byte_can_be_unpacked_and_packed(seed, bits, block):
    packed = np.random.default_rng(seed).integers(0, 256, (3, 2, block * bits // 8), dtype=np.uint8)
    q = QTensor.unpack(packed, np.ones((3, 2), np.float32), bits=bits, block=block, n_in=2 * block)
    np.testing.assert_array_equal(q.pack(), packed)


@given(matrices, widths, blocks)
def test_twice_the_weights_are_twice_the_result(w, bits, block):
    one, two = rtn(w, bits=bits, block=block), rtn(2 * w, bits=bits, block=block)
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(2 * one.scales, two.scales)


@given(matrices, widths, blocks, st.randoms(use_true_random=False))
def test_rows_do_not_know_each_other(w, bits, block, random):
    order = list(range(len(w)))
    random.shuffle(order)
    a, b = rtn(w, bits=bits, block=block), rtn(w[order], bits=bits, block=block)
    np.testing.assert_array_equal(a.codes[order], b.codes)
    np.testing.assert_array_equal(a.scales[order], b.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_does_not_notice_that_it_is_alone(block, bits):
    w = np.random.default_rng(0).standard_normal((20, block)).astype(np.float32)
    whole = rtn(w, bits=bits, block=block)
    for i in range(len(w)):
        alone = rtn(w[i : i + 1], bits=bits, block=block)
        np.testing.assert_array_equal(alone.codes[0], whole.codes[i])
        np.testing.assert_array_equal(alone.scales[0], whole.scales[i])


def test_weights_beyond_float32_sums_are_refused():
    with pytest.raises(QuantizeError, match=r"weights up to 1\.0e\+38 are beyond what can be quantized"):
        rtn(np.full((2, 32), 1e38, np.float32), bits=8, block=32)


@given(st.integers(1, 40), widths)
def test_levels_are_kept_exactly(n, bits):
    """What is on the grid already stays there."""
    codes = np.random.default_rng(n).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, 64)).astype(np.float32)
    codes[:, 0::32] = -(2 ** (bits - 1))
    np.testing.assert_allclose(rtn(codes * 0.5, bits=bits, block=32).dequantize(), codes * 0.5, rtol=1e-6)


@given(matrices)
def test_what_is_not_finite_is_refused(w):
    assume(w.size)
    for bad in (np.nan, np.inf, -np.inf):
        w.flat[w.size // 2] = bad
        with pytest.raises(QuantizeError, match="a NaN or an infinity"):
            rtn(w, bits=4, block=32)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 33), (4, 8), (16, 32)])
def test_unknown_widths_are_refused(bits, block):
    with pytest.raises(QuantizeError, match=f"{bits} bits in blocks of {block}: expected 4 or 8 bits"):
        rtn(np.ones((2, 32), np.float32), bits=bits, block=block)


# --- the plan ---


def test_plan_by_kind(weights):
    spec, _ = weights("plain")
    recipes = plan(spec, "int4", block=128)
    assert recipes["emb.weight"] == Recipe(8, 128, "rtn")
    assert recipes["head.weight"] == Recipe(4, 128, "rtn")
    assert recipes["blocks.1.ffn.value.weight"] == Recipe(4, 128, "rtn")
    assert recipes["blocks.1.att.w1"] == Recipe(8, 128, "rtn")
    assert recipes["blocks.1.att.w2"] == Recipe(8, 32, "rtn")  # 32 inputs
    assert recipes["blocks.1.att.x_r"] == Recipe(32)
    assert {r.bits for r in plan(spec, "fp16").values()} == {16, 32}
    assert {r.bits for r in plan(spec, "none").values()} == {32}


def test_an_embedding_of_uneven_rows_takes_the_advice_it_is_given():
    w = {n: Weight(s, k) for n, s, k in (("emb.weight", (50, 24), "embedding"), ("head.weight", (50, 24), "head"))}
    spec = Spec("7", 1, 24, 3, 8, 96, 50, w, ())
    with pytest.raises(QuantizeError, match=r"give --override 'emb\.weight=16'"):
        plan(spec, "int4")
    assert plan(spec, "int4", overrides=["emb.weight=16"]) == {"emb.weight": Recipe(16), "head.weight": Recipe(4, 16, "rtn")}


def test_the_last_override_that_matches_decides(weights):
    spec, _ = weights("plain")
    recipes = plan(spec, "int4", overrides=["*=8", "blocks.0.*=32", "blocks.*.ffn.key.weight=4:64", "emb.weight=16"])
    assert recipes["head.weight"] == Recipe(8, 32, "rtn")
    assert recipes["blocks.0.att.key.weight"] == Recipe(32)
    assert recipes["blocks.0.ffn.key.weight"] == Recipe(4, 64, "rtn")
    assert recipes["blocks.0.ln1.weight"] == Recipe(32)  # vectors are never touched
    assert recipes["emb.weight"] == Recipe(16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "q4"}, "quant 'q4' is unknown: expected one of none, fp16, int8, int4"),
        ({"block": 48}, "block 48 is not possible: expected one of 16, 32, 64, 128, 256"),
        ({"overrides": ["haed.weight=8"]}, "override 'haed.weight=8' matches no matrix: inspect lists their names"),
        ({"overrides": ["*.x_r=8"]}, "matches no matrix"),
        ({"overrides": ["head.weight=5"]}, "is not PATTERN=BITS or PATTERN=BITS:BLOCK"),
        ({"overrides": ["head.weight"]}, "is not PATTERN=BITS"),
        ({"overrides": ["head.weight=8:24"]}, "is not PATTERN=BITS"),
        ({"overrides": ["head.weight=16:32"]}, "is not PATTERN=BITS"),
        ({"overrides": ["emb.weight=4"]}, "the embedding takes 8 bits"),
    ],
)
def test_plans_that_cannot_be_are_refused(options, message, weights):
    spec, _ = weights("plain")
    with pytest.raises(QuantizeError, match=message.replace("*", r"\*").replace(".", r"\.")):
        plan(spec, **{"quant": "int4"} | options)
