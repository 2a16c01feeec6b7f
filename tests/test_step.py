"""The step in numpy: equal to the rwkv package, in all its forms, and every part of its maths matters."""

import types
from pathlib import Path

import factory
import numpy as np
import pytest
from conftest import FORMS, REFERENCE, apart

from rwkv_edge import models, reference
from rwkv_edge.models import rwkv7
from rwkv_edge.reference import run_reference

MODELS = ["demo", *factory.SHAPES]


@pytest.mark.parametrize("name", MODELS)
def test_step_equals_the_rwkv_package(name, weights, golden):
    spec, W = weights(name)
    g = golden(name)
    logits, state = run_reference(spec, W, g["tokens"].tolist())
    assert len(g["tokens"]) >= 100
    assert np.abs(logits[g["positions"]] - g["logits"]).max() / g["std"] <= REFERENCE
    for tensor, x in state.items():
        assert apart(x, g[f"state.{tensor}"]) <= REFERENCE, tensor


@pytest.mark.parametrize("form", ["chunk", "linear_attention"])
@pytest.mark.parametrize("name", MODELS)
def test_forms_of_the_wkv_are_one_recurrence(name, form, weights):
    spec, W = weights(name)
    ids = factory.tokens(60, spec.n_vocab)
    _, before = run_reference(spec, W, factory.tokens(7, spec.n_vocab), dtype=np.float64)
    expected, after = run_reference(spec, W, ids, before, dtype=np.float64)
    logits, state = run_reference(spec, W, ids, before, wkv_form=form, dtype=np.float64)
    assert apart(logits, expected) <= FORMS
    for tensor, x in state.items():
        assert apart(x, after[tensor]) <= FORMS, tensor


@pytest.mark.parametrize("cut", [1, 2, 31, 59])
def test_reading_in_two_parts_is_reading_at_once(cut, weights):
    spec, W = weights("odd")
    ids = factory.tokens(60, spec.n_vocab)
    whole, end = run_reference(spec, W, ids)
    first, state = run_reference(spec, W, ids[:cut])
    second, state = run_reference(spec, W, ids[cut:], state)
    assert apart(np.concatenate([first, second]), whole) <= 1e-5
    assert max(apart(state[n], end[n]) for n in end) <= 1e-5


def mutate(line, mutant):
    """The model file as a module, with one line changed."""
    source = Path(rwkv7.__file__).read_text()
    assert line in source
    mutated = types.ModuleType("rwkv_edge.models.mutated")
    mutated.__package__ = "rwkv_edge.models"
    exec(compile(source.replace(line, mutant), "mutated", "exec"), mutated.__dict__)
    return mutated


# One textual change of the maths each: a sign, a dropped factor, an exchanged weight, a constant, a forgotten write.
MUTATIONS = [
    ("S = S * row(w) - (S @ col(kk))", "S = S * row(w) + (S @ col(kk))"),
    ("row(kk * a) + col(v)", "row(kk) + col(v)"),
    ("+ col(v) @ row(k)", "- col(v) @ row(k)"),
    ("col(v) @ row(k)", "col(k) @ row(v)"),
    ("S * row(w)", "S * col(w)"),
    ("S * row(w)", "S"),
    ("return S @ col(r), S", "return S @ col(k), S"),
    ("-math.exp(-0.5) * F.sigmoid", "-math.exp(-0.6) * F.sigmoid"),
    ("-math.exp(-0.5) * F.sigmoid", "-F.sigmoid"),
    ('F.tanh(F.linear(x_w, W["w1"]))', 'F.linear(x_w, W["w1"])'),
    ('F.sigmoid(F.linear(x_g, W["g1"]))', 'F.linear(x_g, W["g1"])'),
    ('F.linear(x_a, W["a1"])', 'F.linear(x_w, W["a1"])'),
    ('W["a2"], W["a0"]', 'W["a2"]'),
    ('W["w2"], W["w0"]', 'W["w2"]'),
    ('W["v2"], W["v0"]', 'W["v2"]'),
    ("v = v + (v_first - v)", "v = v - (v_first - v)"),
    ("v = v + (v_first - v)", "v = v_first + (v_first - v)"),
    ("v_first = v\n", "v_first = v * 1.01\n"),
    ('F.heads(k * W["k_k"])', "F.heads(k)"),
    ('k = k * (1 + (a - 1) * W["k_a"])', "k = k * a"),
    ('k = k * (1 + (a - 1) * W["k_a"])', "pass"),
    ('W["x_r"], W["x_w"]', 'W["x_w"], W["x_r"]'),
    ('W["x_k"], W["x_v"], W["x_a"]', 'W["x_v"], W["x_k"], W["x_a"]'),
    ('k = F.linear(x_k', 'k = F.linear(x_v'),
    ('W["receptance.weight"]', 'W["value.weight"]'),
    ("eps=64e-5", "eps=1e-5"),
    ("eps=1e-5)\n    for i", "eps=64e-5)\n    for i"),
    ('y = y + F.sum(r * k * W["r_k"]) * v', "pass"),
    ('F.sum(r * k * W["r_k"])', "F.sum(r * k)"),
    ("F.merge_heads(y) * g", "F.merge_heads(y)"),
    ("F.relu_squared(F.linear(x_k", "F.tanh(F.linear(x_k"),
    ("new[f\"{i}.att_x\"], new", "new[f\"{i}.other\"], new"),
    ("x = x + z\n        z = F.layer_norm", "x = z\n        z = F.layer_norm"),
    ('block["ln2.weight"], block["ln2.bias"]', 'block["ln1.weight"], block["ln1.bias"]'),
    ('W["ln_out.weight"], W["ln_out.bias"]', 'W["blocks.0.ln0.weight"], W["blocks.0.ln0.bias"]'),
    ('state[f"{i}.ffn_x"])', 'state[f"{i}.att_x"])'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "mutant"), MUTATIONS, ids=[f"{i}: {m[1]}" for i, m in enumerate(MUTATIONS)])
def test_no_part_of_the_maths_can_change_unseen(line, mutant, weights, golden, monkeypatch):
    mutated = mutate(line, mutant)
    monkeypatch.setattr(reference, "model_of", lambda version: mutated)
    spec, W = weights("odd")
    g = golden("odd")
    # begin inside the text: a wrong use of the state must show
    half = len(g["tokens"]) // 2
    try:
        first, state = run_reference(spec, W, g["tokens"][:half].tolist())
        second, state = run_reference(spec, W, g["tokens"][half:].tolist(), state)
    except (KeyError, ValueError):
        return
    worst = apart(np.concatenate([first, second]), g["logits"])
    worst = max(worst, *(apart(x, g[f"state.{n}"]) for n, x in state.items()))
    assert worst > 4 * REFERENCE


FORM_MUTATIONS = [
    ("chunk", "q = kk * F.exp(ln_c - ln_w)", "q = kk * F.exp(ln_c)"),
    ("chunk", "k = k * inverse_c", "k = k"),
    ("chunk", "b = kk * a * inverse_c", "b = kk * inverse_c"),
    ("chunk", "r = r * F.exp(ln_c)", "r = r * F.exp(ln_c - ln_w)"),
    ("chunk", "F.invert_unit_lower(q @ t(b))", "F.invert_unit_lower(q @ t(k))"),
    ("chunk", "F.tril(q @ t(k), -1)", "F.tril(q @ t(k), 0)"),
    ("chunk", "F.tril(r @ t(k), 0)", "F.tril(r @ t(k), -1)"),
    ("chunk", "- F.tril(r @ t(b), 0) @ U", "+ F.tril(r @ t(b), 0) @ U"),
    ("chunk", "(q @ t(S) +", "(q @ S +"),
    ("chunk", "S = (S + t(v) @ k - t(U) @ b)", "S = (S + t(v) @ k + t(U) @ b)"),
    ("chunk", "F.exp(F.last_token(ln_c))", "F.exp(F.last_token(ln_w))"),
    ("linear_attention", "(ln_w - ln_a) * 0.5, (ln_w + ln_a) * 0.5", "(ln_w - ln_a) * 0.5, (ln_w - ln_a) * 0.5"),
    ("linear_attention", "kk * F.exp(-d_erase)", "kk * F.exp(d_erase)"),
    ("linear_attention", "v * 2.0**44", "v * 2.0**43"),
    ("linear_attention", "beta=(1.0, 2.0**-44)", "beta=(0.9, 2.0**-44)"),
    ("linear_attention", "F.interleave(d_erase, d_write)", "F.interleave(d_write, d_erase)"),
    ("linear_attention", "F.interleave(F.fill_like(r, 0.0), r)", "F.interleave(r, F.fill_like(r, 0.0))"),
    ("linear_attention", "F.maximum(a, 1e-9)", "F.maximum(a, 0.5)"),
]


@pytest.mark.parametrize(("form", "line", "mutant"), FORM_MUTATIONS, ids=[m[2] for m in FORM_MUTATIONS])
def test_no_part_of_a_form_can_change_unseen(form, line, mutant, weights, monkeypatch):
    mutated = mutate(line, mutant)
    spec, W = weights("odd")
    ids = factory.tokens(30, spec.n_vocab)
    _, before = run_reference(spec, W, ids, dtype=np.float64)
    expected, after = run_reference(spec, W, ids, before, dtype=np.float64)
    monkeypatch.setattr(reference, "model_of", lambda version: mutated)
    logits, state = run_reference(spec, W, ids, before, wkv_form=form, dtype=np.float64)
    assert max(apart(logits, expected), *(apart(x, after[n]) for n, x in state.items())) > 1000 * FORMS


def test_parameters_are_counted_as_officially(weights):
    # RWKV-7 0.1B: 191,034,624, layer 0's unused v0 v1 v2 left out
    C, L, V, ranks = 768, 12, 65536, {"w": 64, "a": 64, "v": 32, "g": 128}
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    for i in range(L):
        b = f"blocks.{i}."
        for ln in ["ln0"] * (i == 0) + ["ln1", "ln2", "att.ln_x"]:
            shapes |= {f"{b}{ln}.weight": (C,), f"{b}{ln}.bias": (C,)}
        shapes |= {f"{b}att.x_{c}": (C,) for c in "rwkvag"} | {f"{b}att.k_k": (C,), f"{b}att.k_a": (C,)}
        shapes |= {f"{b}att.{m}.weight": (C, C) for m in ("receptance", "key", "value", "output")}
        for c, r in ranks.items():
            if c != "v" or i:
                shapes |= {f"{b}att.{c}1": (r, C), f"{b}att.{c}2": (C, r)} | ({f"{b}att.{c}0": (C,)} if c != "g" else {})
        shapes |= {f"{b}att.r_k": (12, 64), f"{b}ffn.x_k": (C,)}
        shapes |= {f"{b}ffn.key.weight": (4 * C, C), f"{b}ffn.value.weight": (C, 4 * C)}
    spec = models.spec_of(shapes)
    assert spec.n_parameters == 191_034_624
    assert spec.state_bytes == 4 * 12 * (2 * 768 + 12 * 64 * 64)
