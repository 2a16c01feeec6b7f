"""The step in numpy: equal to the rwkv package, in all its forms, and every part of its maths matters."""

import types
from pathlib import Path

import factory
import numpy as np
import pytest
from conftest import FORMS, REFERENCE, apart

from rwkv_edge import models, reference
from rwkv_edge.models import rwkv4, rwkv5, rwkv6, rwkv7
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
@pytest.mark.parametrize("name", ["odd", *factory.BEFORE_7])
def test_reading_in_two_parts_is_reading_at_once(name, cut, weights):
    spec, W = weights(name)
    ids = factory.tokens(60, spec.n_vocab)
    whole, end = run_reference(spec, W, ids)
    first, state = run_reference(spec, W, ids[:cut])
    second, state = run_reference(spec, W, ids[cut:], state)
    assert apart(np.concatenate([first, second]), whole) <= 1e-5
    assert max(apart(state[n], end[n]) for n in end) <= 1e-5


def mutate(file, line, mutant):
    """The model file as a module, with one line changed."""
    source = Path(file.__file__).read_text()
    assert line in source
    mutated = types.ModuleType("rwkv_edge.models.mutated")
    mutated.__package__ = "rwkv_edge.models"
    exec(compile(source.replace(line, mutant), "mutated", "exec"), mutated.__dict__)
    return mutated


# One textual change of the maths each: a sign, a dropped factor, an exchanged weight, a constant, a forgotten write.
MUTATIONS = {
    (rwkv7, "odd"): [
        ("S = S * row(w) - (S @ col(kk))", "S = S * row(w) + (S @ col(kk))"),
        ("row(kk * a) + col(v)", "row(kk) + col(v)"),
        ("+ col(v) @ row(k)", "- col(v) @ row(k)"),
        ("col(v) @ row(k)", "col(k) @ row(v)"),
        ("S * row(w)", "S * col(w)"),
        ("S * row(w)", "S"),
        ("return F.uncol(S @ col(r)), S", "return F.uncol(S @ col(k)), S"),
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
        ("eps=spec.head_norm_eps", "eps=spec.norm_eps"),
        ("eps=spec.norm_eps)\n    for i", "eps=spec.head_norm_eps)\n    for i"),
        ('y = y + F.sum(r * k * W["r_k"]) * v', "pass"),
        ('F.sum(r * k * W["r_k"])', "F.sum(r * k)"),
        ("F.merge_heads(y) * g", "F.merge_heads(y)"),
        ("F.relu_squared(F.linear(x_k", "F.tanh(F.linear(x_k"),
        ("new[f\"{i}.att_x\"], new", "new[f\"{i}.other\"], new"),
        ("x = x + z\n        z = F.layer_norm", "x = z\n        z = F.layer_norm"),
        ('block["ln2.weight"], block["ln2.bias"]', 'block["ln1.weight"], block["ln1.bias"]'),
        ('W["ln_out.weight"], W["ln_out.bias"]', 'W["blocks.0.ln0.weight"], W["blocks.0.ln0.bias"]'),
        ('state[f"{i}.ffn_x"])', 'state[f"{i}.att_x"])'),
    ],
    (rwkv7, "v7a"): [
        ('k = k * F.linear(F.each_token_matmul(F.linear(x, W["s1"]), E), W["s2"], W["s0"])', "pass"),
        ('F.linear(x, W["s1"]), E', 'F.linear(x_k, W["s1"]), E'),
        ('E), W["s2"], W["s0"])', 'E), W["s2"])'),
        ('F.each_token_matmul(F.linear(x, W["s1"]), E)', 'F.linear(x, W["s1"])'),
    ],
    (rwkv6, "v6"): [
        ("F.uncol(S @ F.col(r)), S *", "F.uncol(S @ F.col(k)), S *"),
        ("S * F.row(F.exp(ln_w))", "S"),
        ("S * F.row(F.exp(ln_w))", "S * F.col(F.exp(ln_w))"),
        ("+ F.col(v) @ F.row(k)", "- F.col(v) @ F.row(k)"),
        ("F.col(v) @ F.row(k)", "F.col(k) @ F.row(v)"),
        ('F.lerp(x, p, W["time_maa_x"])', 'F.lerp(p, x, W["time_maa_x"])'),
        ('F.tanh(F.linear(z, W["time_maa_w1"]))', 'F.linear(z, W["time_maa_w1"])'),
        ("z_w, z_k, z_v, z_r, z_g =", "z_w, z_k, z_v, z_g, z_r ="),
        ("z_w, z_k, z_v, z_r, z_g =", "z_k, z_w, z_v, z_r, z_g ="),
        ("d = p - x", "d = x - p"),
        ('W["time_maa_w2.v"], W["time_maa_v"]', 'W["time_maa_w2.v"]'),
        ('W["time_maa_w2.k"], W["time_maa_k"]', 'W["time_maa_w2.k"], W["time_maa_v"]'),
        ('F.linear(z_r, W["time_maa_w2.r"]', 'F.linear(z_r, W["time_maa_w2.g"]'),
        ("x_w = x + d", "x_w = p + d"),
        ('F.linear(x_g, W["gate.weight"])', 'F.linear(x_r, W["gate.weight"])'),
        ('F.tanh(F.linear(x_w, W["time_decay_w1"]))', 'F.linear(x_w, W["time_decay_w1"])'),
        ('W["time_decay_w2"], W["time_decay"]', 'W["time_decay_w2"]'),
        ("F.heads(-F.exp(ln_w))", "F.heads(-F.sigmoid(ln_w))"),
        ('y = y + F.sum(r * k * W["time_faaaa"]) * v', "pass"),
        ('F.sum(r * k * W["time_faaaa"])', "F.sum(r * k)"),
        ("eps=spec.head_norm_eps", "eps=spec.norm_eps"),
        ("(g * F.sigmoid(g))", "F.sigmoid(g)"),
        ('k = F.linear(F.relu_squared(F.linear(x_k', 'k = F.linear(F.tanh(F.linear(x_k'),
        ('F.sigmoid(F.linear(x_r, W["receptance.weight"])) * k', "k"),
        ('W["time_maa_k"], W["time_maa_r"])', 'W["time_maa_r"], W["time_maa_k"])'),
        ('state[f"{i}.ffn_x"])', 'state[f"{i}.att_x"])'),
    ],
    (rwkv5, "v5.2"): [
        ("F.uncol(S @ F.col(r)), S *", "F.uncol(S @ F.col(k)), S *"),
        ("S * F.row(F.exp(ln_w))", "S"),
        ("S * F.row(F.exp(ln_w))", "S * F.col(F.exp(ln_w))"),
        ("F.col(v) @ F.row(k)", "F.col(k) @ F.row(v)"),
        ("F.lerp(p, x, *mu)", "F.lerp(x, p, *mu)"),
        ("x_r, x_k, x_v, *x_g", "x_k, x_r, x_v, *x_g"),
        ("F.for_tokens(-F.exp(F.by_heads", "F.for_tokens(-F.sigmoid(F.by_heads"),
        ('F.by_heads(W["time_faaaa"])', 'F.exp(F.by_heads(W["time_faaaa"]))'),
        ("y = y + F.sum(r * k * u) * v", "y = y + F.sum(r * u) * v"),
        ("y = y + F.sum(r * k * u) * v", "pass"),
        ("eps=spec.head_norm_eps", "eps=spec.norm_eps"),
        ("y = y * (g * F.sigmoid(g))", "y = y * F.sigmoid(g)"),
        ("y = y * (g * F.sigmoid(g))", "pass"),
        ('F.sigmoid(F.linear(x_r, W["receptance.weight"])) * k', "k"),
        ("F.lerp(p, x, W[", "F.lerp(x, p, W["),
        ('state[f"{i}.ffn_x"])', 'state[f"{i}.att_x"])'),
    ],
    (rwkv5, "v5.0"): [
        ('gated = spec.version != "5.0"', "gated = True"),
        ('u = F.exp(F.by_heads(W["time_first"])) if', 'u = F.by_heads(W["time_first"]) if'),
    ],
    (rwkv5, "v5.1"): [
        ('gated = spec.version != "5.0"', "gated = False"),
        ("F.for_tokens(-F.exp(", "F.for_tokens(-F.tanh("),
    ],
    (rwkv4, "v4"): [
        ('F.lerp(x_before, x, W["time_mix_r"], W["time_mix_k"]', 'F.lerp(x_before, x, W["time_mix_k"], W["time_mix_r"]'),
        ('F.lerp(x_before, x, W["time_mix_k"]', 'F.lerp(x, x_before, W["time_mix_k"]'),
        ('r = F.sigmoid(F.linear(x_r, W["receptance.weight"]))', 'r = F.linear(x_r, W["receptance.weight"])'),
        ('w = -F.exp(W["time_decay"])', 'w = F.exp(W["time_decay"])'),
        ('w = -F.exp(W["time_decay"])', 'w = -W["time_decay"]'),
        ("F.linear(r * y, ", "F.linear(y, "),
        ("q = F.larger(p, u + k)", "q = F.larger(p, k)\n    u = u * 0"),
        ("e1, e2 = F.exp(p - q), F.exp(u + k - q)", "e1, e2 = F.exp(p - q), F.exp(k - q)"),
        ("e1, e2 = F.exp(p - q), F.exp(u + k - q)", "e1, e2 = F.exp(q - p), F.exp(u + k - q)"),
        ("(e1 * a + e2 * v) / (e1 * b + e2)\n", "(e1 * a + e2 * v) / (e1 * b)\n"),
        ("(e1 * a + e2 * v) / (e1 * b + e2)\n", "(e1 * b + e2 * v) / (e1 * b + e2)\n"),
        ("new_p = F.larger(p + w, k)", "new_p = F.larger(p, k)"),
        ("e1, e2 = F.exp(p + w - new_p)", "e1, e2 = F.exp(p - new_p)"),
        ("e1 * b + e2, new_p)", "e1 * b, new_p)"),
        ("(e1 * a + e2 * v, e1", "(e1 * a - e2 * v, e1"),
        ('F.sigmoid(F.linear(x_r, W["receptance.weight"])) * k', "k"),
        ('state[f"{i}.ffn_x"])', 'state[f"{i}.att_x"])'),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "name", "line", "mutant"),
    [pytest.param(f, n, *m, id=f"{n} {i}: {m[1]}") for (f, n), ms in MUTATIONS.items() for i, m in enumerate(ms)],
)
def test_no_part_of_the_maths_can_change_unseen(file, name, line, mutant, weights, golden, monkeypatch):
    mutated = mutate(file, line, mutant)
    monkeypatch.setattr(reference, "model_of", lambda version: mutated)
    spec, W = weights(name)
    g = golden(name)
    # begin inside the text: a wrong use of the state must show
    half = len(g["tokens"]) // 2
    try:
        first, state = run_reference(spec, W, g["tokens"][:half].tolist())
        second, state = run_reference(spec, W, g["tokens"][half:].tolist(), state)
    except (KeyError, ValueError, RuntimeWarning):
        return
    worst = apart(np.concatenate([first, second]), g["logits"])
    worst = max(worst, *(apart(x, g[f"state.{n}"]) for n, x in state.items()))
    assert not worst <= 4 * REFERENCE


FORM_MUTATIONS = {
    (rwkv7, "odd"): [
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
    ],
    (rwkv6, "v6"): [
        ("chunk", "F.cumsum(ln_w, exclusive=True))) @ t(S)", "F.cumsum(ln_w))) @ t(S)"),
        ("chunk", "@ t(S) + A @ v", "@ S + A @ v"),
        ("chunk", "@ t(S) + A @ v", "@ t(S) - A @ v"),
        ("chunk", "F.exp(F.last_token(F.cumsum(ln_w)))", "F.exp(F.last_token(ln_w))"),
        ("chunk", "exclusive=True, reverse=True)", "exclusive=False, reverse=True)"),
        ("chunk", "exclusive=True, reverse=True)", "exclusive=True, reverse=False)"),
        ("chunk", "F.decayed_products(r, k, ln_w)", "F.decayed_products(k, r, ln_w)"),
        ("chunk", "F.maximum(ln_w, -1e4)", "F.maximum(ln_w, -0.1)"),
        ("linear_attention", "query=F.next_token(r)", "query=r"),
        ("linear_attention", "F.first_token(r)", "F.first_token(k)"),
        ("linear_attention", "log_decay=ln_w", "log_decay=-ln_w"),
        ("linear_attention", "y, _ = F.token_shift(y, first)", "pass"),
    ],
    (rwkv5, "v5.1"): [
        ("chunk", "F.cumsum(ln_w, exclusive=True))) @ t(S)", "F.cumsum(ln_w))) @ t(S)"),
        ("chunk", "F.exp(F.last_token(F.cumsum(ln_w)))", "F.exp(F.last_token(ln_w))"),
        ("chunk", "exclusive=True, reverse=True)", "exclusive=False, reverse=True)"),
        ("linear_attention", "query=F.next_token(r)", "query=r"),
        ("linear_attention", "F.first_token(r)", "F.first_token(v)"),
        ("linear_attention", "y, _ = F.token_shift(y, first)", "pass"),
    ],
    (rwkv4, "v4"): [
        *((form, *m) for form in ("chunk", "linear_attention") for m in [
            ("F.running_max(k, w, p)", "F.running_max(k, w * 0, p)"),
            ("before, p = F.token_shift(after, p)", "before = after"),
            ("w + before - after, -1e4", "before - after, -1e4"),
            ("w + before - after, -1e4", "w + before - after, -0.1"),
            ("F.exp(k - after), v)", "F.exp(k), v)"),
            ("before_a, a = F.token_shift(after_a, a)", "before_a = after_a"),
            ("before_b, b = F.token_shift(after_b, b)", "before_b = after_b"),
        ]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "name", "form", "line", "mutant"),
    [pytest.param(f, n, *m, id=f"{n} {m[0]} {m[2]}") for (f, n), ms in FORM_MUTATIONS.items() for m in ms],
)
def test_no_part_of_a_form_can_change_unseen(file, name, form, line, mutant, weights, monkeypatch):
    mutated = mutate(file, line, mutant)
    spec, W = weights(name)
    ids = factory.tokens(30, spec.n_vocab)
    _, before = run_reference(spec, W, ids, dtype=np.float64)
    expected, after = run_reference(spec, W, ids, before, dtype=np.float64)
    monkeypatch.setattr(reference, "model_of", lambda version: mutated)
    logits, state = run_reference(spec, W, ids, before, wkv_form=form, dtype=np.float64)
    assert not max(apart(logits, expected), *(apart(x, after[n]) for n, x in state.items())) <= 1000 * FORMS


def half_step(weights, monkeypatch, mutated=rwkv4):
    """How far RWKV-4's form for float16 is from the paper's line; p may be any, so what counts is a e^p. b stays small."""
    spec, W = weights("v4")
    W = {n: x * 4 if n.endswith("att.key.weight") else x - 3 if n.endswith("time_decay") else x for n, x in W.items()}
    ids = [*factory.tokens(120, spec.n_vocab), *[7] * 100]  # where a token is repeated, b grows
    _, before = run_reference(spec, W, factory.tokens(120, spec.n_vocab), dtype=np.float64)
    expected, after = run_reference(spec, W, ids, before, dtype=np.float64)
    monkeypatch.setattr(reference, "model_of", lambda version: mutated)
    logits, state = run_reference(spec, W, ids, before, wkv_form="half_step", dtype=np.float64)
    for n in [n for n in state if n.endswith("pp")]:
        if not state[n[:-2] + "bb"].max() < 9:
            return np.inf
        for sums in (n[:-2] + "aa", n[:-2] + "bb"):
            state[sums] = state[sums] * np.exp(state[n] - after[n])
        state[n] = after[n]
    return max(apart(logits, expected), *(apart(x, after[n]) for n, x in state.items()))


def test_the_form_for_float16_is_the_same_recurrence(weights, monkeypatch):
    assert half_step(weights, monkeypatch) <= FORMS


@pytest.mark.parametrize(
    ("line", "mutant"),
    [
        ("(e1 * a) * F.exp(w) + e2 * v,", "e1 * a + e2 * v,"),
        ("(e1 * a) * F.exp(w) + e2 * v,", "(e1 * a) * F.exp(w) - e2 * v,"),
        ("(e1 * b) * F.exp(w) + e2\n", "(e1 * b) * F.exp(w)\n"),
        ("F.exp(p - q), F.exp(k - q)", "F.exp(k - q), F.exp(p - q)"),
        ("e = F.exp(q - new_p)", "e = F.exp(new_p - q)"),
        ("(a * e, b * e, new_p)", "(a, b * e, new_p)"),
        ("(a * e, b * e, new_p)", "(a * e, b * e, q)"),
        ("F.sigmoid((8.0 - b) * -256.0) - ", "0.0 - "),
    ],
)
def test_no_part_of_the_form_for_float16_can_change_unseen(line, mutant, weights, monkeypatch):
    assert not half_step(weights, monkeypatch, mutate(rwkv4, line, mutant)) <= 1000 * FORMS


@pytest.mark.parametrize("form", ["chunk", "linear_attention"])
@pytest.mark.parametrize("name", ["v4", "v5.2", "v6"])
def test_decays_without_a_floor_do_no_harm(name, form, weights):
    """Decays that underflow, as no division by them would survive, and keys of any size in version 4."""
    spec, W = weights(name)
    W = dict(W)
    for i in range(spec.n_layer):
        W[f"blocks.{i}.att.time_decay"] = W[f"blocks.{i}.att.time_decay"] * 3 + 2  # e^(-e^5) and less
        W[f"blocks.{i}.att.key.weight"] = W[f"blocks.{i}.att.key.weight"] * (20 if name == "v4" else 1)
    ids = factory.tokens(60, spec.n_vocab)
    expected, after = run_reference(spec, W, ids, dtype=np.float64)

    def off(form):
        logits, state = run_reference(spec, W, ids, wkv_form=form)
        return max(apart(logits, expected), *(apart(x, after[n]) for n, x in state.items()))

    # large keys make e^k inexact in float32, whatever the form: the step itself is 4e-4 off then
    assert off(form) <= max(REFERENCE, 2 * off("step"))


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
