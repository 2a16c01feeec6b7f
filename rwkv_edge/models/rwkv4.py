"""RWKV-4 "Raven", one recurrent step.  Paper: arXiv 2305.13048, section 3 and appendix D

Symbols           shape           meaning                                       checkpoint
  x               (1, T, C)       residual stream, T tokens
  x_last          (1, 1, C)       the last token of the call before             state att_x, ffn_x
  mu              (C,)            how much of the token itself to take          att.time_mix_r k v, ffn.time_mix_k r
  r k v           (1, T, C)       receptance, key, value                        att.receptance key value
  w               (C,)            decay, a logarithm below 0                    att.time_decay
  u               (C,)            bonus of the token itself, a logarithm        att.time_first
  a b             (1, T, C)       sums of e^k v and of e^k, decayed, by e^p     state aa, bb
  p               (1, T, C)       the largest exponent in them so far           state pp

`W` is the weights by name, matrices as (outputs, inputs); `F` is the operations (see ops.py).
"""

from collections.abc import Mapping
from typing import Any

from ..spec import Shape, Spec, StateTensor
from .weights import Expected, Prefix

VERSIONS = ("4",)
MARKER = "blocks.0.att.time_mix_k"
UNUSED: tuple[str, ...] = ()
STACKED: dict[str, str] = {}
INPUTS_FIRST: tuple[str, ...] = ()


def step(
    F: Any, W: Mapping[str, Any], spec: Spec, tokens: Any, positions: Any, state: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Read T tokens and give the logits at `positions` and the state after the last token.

    tokens     (T,) int64
    positions  (P,) int64, of the tokens whose logits are wanted
    state      `{layer}.` att_x, aa, bb, pp, ffn_x, each (1, 1, C)

    Returns  logits (P, V), and the state in the same form.
    """
    new: dict[str, Any] = {}
    x = F.layer_norm(F.embed(W["emb.weight"], tokens), W["blocks.0.ln0.weight"], W["blocks.0.ln0.bias"], eps=spec.norm_eps)
    for i in range(spec.n_layer):
        block = Prefix(W, f"blocks.{i}.")
        z = F.layer_norm(x, block["ln1.weight"], block["ln1.bias"], eps=spec.norm_eps)
        S = tuple(state[f"{i}.{name}"] for name in ("aa", "bb", "pp"))
        z, new[f"{i}.att_x"], S = time_mix(F, Prefix(W, f"blocks.{i}.att."), z, state[f"{i}.att_x"], S)
        new[f"{i}.aa"], new[f"{i}.bb"], new[f"{i}.pp"] = S
        x = x + z
        z = F.layer_norm(x, block["ln2.weight"], block["ln2.bias"], eps=spec.norm_eps)
        z, new[f"{i}.ffn_x"] = channel_mix(F, Prefix(W, f"blocks.{i}.ffn."), z, state[f"{i}.ffn_x"])
        x = x + z
    x = F.layer_norm(F.take_tokens(x, positions), W["ln_out.weight"], W["ln_out.bias"], eps=spec.out_norm_eps)
    return F.rows(F.linear(x, W["head.weight"])), new


def time_mix(F: Any, W: Any, x: Any, x_last: Any, S: Any) -> tuple[Any, Any, Any]:
    """Mix along time: a mean of the values so far, weighed by e^k and decay."""
    x_before, x_last = F.token_shift(x, x_last)

    # x_i = x_before + (x - x_before) mu_i
    x_r, x_k, x_v = F.lerp(x_before, x, W["time_mix_r"], W["time_mix_k"], W["time_mix_v"])

    r = F.sigmoid(F.linear(x_r, W["receptance.weight"]))
    k = F.linear(x_k, W["key.weight"])
    v = F.linear(x_v, W["value.weight"])
    w = -F.exp(W["time_decay"])

    y, S = WKV[F.wkv_form](F, S, k, v, w, W["time_first"])
    return F.linear(r * y, W["output.weight"]), x_last, S


def channel_mix(F: Any, W: Any, x: Any, x_last: Any) -> tuple[Any, Any]:
    """Mix along channels: sigmoid(Wr x_r) Wv relu(Wk x_k)^2."""
    x_before, x_last = F.token_shift(x, x_last)
    x_k, x_r = F.lerp(x_before, x, W["time_mix_k"], W["time_mix_r"])
    k = F.linear(F.relu_squared(F.linear(x_k, W["key.weight"])), W["value.weight"])
    return F.sigmoid(F.linear(x_r, W["receptance.weight"])) * k, x_last


# --- the WKV in four forms of one recurrence; a test holds them equal ---


def read(F: Any, a: Any, b: Any, p: Any, k: Any, v: Any, u: Any) -> Any:
    """The mean of the values before, which a, b and p hold, and of the token's own."""
    # y = (e^p a + e^(u + k) v) / (e^p b + e^(u + k)),   both divided by e^q
    q = F.larger(p, u + k)
    e1, e2 = F.exp(p - q), F.exp(u + k - q)
    return (e1 * a + e2 * v) / (e1 * b + e2)


def wkv_step(F: Any, S: Any, k: Any, v: Any, w: Any, u: Any) -> tuple[Any, Any]:
    """The paper's line, one token after the other."""

    def one(S: Any, k: Any, v: Any) -> tuple[Any, Any]:
        a, b, p = S
        y = read(F, a, b, p, k, v, u)

        # a <- e^w a + e^k v,   b <- e^w b + e^k,   both divided by e^p
        new_p = F.larger(p + w, k)
        e1, e2 = F.exp(p + w - new_p), F.exp(k - new_p)
        return y, (e1 * a + e2 * v, e1 * b + e2, new_p)

    return F.each_token(one, S, k, v)  # type: ignore[no-any-return]


def wkv_half_step(F: Any, S: Any, k: Any, v: Any, w: Any, u: Any) -> tuple[Any, Any]:
    """The same with numbers of 11 bits, where p + w is p: here a and b decay, and p moves in coarse steps."""

    def one(S: Any, k: Any, v: Any) -> tuple[Any, Any]:
        a, b, p = S
        y = read(F, a, b, p, k, v, u)

        # a <- e^w a + e^k v,   b <- e^w b + e^k,   both divided by e^q
        q = F.larger(p, k)
        e1, e2 = F.exp(p - q), F.exp(k - q)
        a, b = (e1 * a) * F.exp(w) + e2 * v, (e1 * b) * F.exp(w) + e2

        # a e^q and b e^q by another exponent: 2.75 less if b is below 1/8, 2.75 more if it is above 8
        new_p = q + (F.sigmoid((8.0 - b) * -256.0) - F.sigmoid((0.125 - b) * 4096.0)) * 2.75
        e = F.exp(q - new_p)
        return y, (a * e, b * e, new_p)

    return F.each_token(one, S, k, v)  # type: ignore[no-any-return]


def wkv_sums(decayed_sums: Any, F: Any, S: Any, k: Any, v: Any, w: Any, u: Any) -> tuple[Any, Any]:
    """T tokens at once: first every p, then the sums of all of them, which need no more than e^(0 or less)."""
    a, b, p = S

    # p_t = max(p_(t-1) + w, k_t)
    after = F.running_max(k, w, p)
    before, p = F.token_shift(after, p)

    # a_t = e^(w + p_(t-1) - p_t) a_(t-1) + e^(k - p_t) v_t
    ln_decay = F.maximum(w + before - after, -1e4)  # exp(-1e4) is 0, and sums of these stay finite
    after_a, after_b = decayed_sums(a, b, ln_decay, F.exp(k - after), v)
    before_a, a = F.token_shift(after_a, a)
    before_b, b = F.token_shift(after_b, b)
    return read(F, before_a, before_b, before, k, v, u), (a, b, p)


def wkv_chunk(F: Any, *args: Any) -> tuple[Any, Any]:
    """T tokens by plain operations."""
    return wkv_sums(F.decayed_sums, F, *args)


def wkv_linear_attention(F: Any, *args: Any) -> tuple[Any, Any]:
    """The same by onnxruntime's gated rule: every channel is a head with a key of one and the value (v, 1)."""
    return wkv_sums(F.decayed_sums_gated, F, *args)


WKV = {"step": wkv_step, "half_step": wkv_half_step, "chunk": wkv_chunk, "linear_attention": wkv_linear_attention}
MAX_TOKENS = {"step": 1, "chunk": 32, "linear_attention": 64}  # in one call of an exported step


# --- what a checkpoint of this version holds ---


def spec(shapes: Mapping[str, Shape]) -> Spec:
    """Read every size from the canonical shapes, and check that they fit each other. Every channel counts as a head.

    Raises  CheckpointError if a tensor is missing, misshapen, or nobody's.
    """
    expect = Expected(shapes, "RWKV-4")
    V, C = expect.shape("emb.weight", 2)
    n_ffn, _ = expect.shape("blocks.0.ffn.key.weight", 2)
    expect("emb.weight", (V, C), "embedding")
    expect.layer_norm("blocks.0.ln0")
    for i in range(expect.n_layer):
        expect.layer_norm(f"blocks.{i}.ln1")
        att = f"blocks.{i}.att."
        for c in "rkv":
            expect(f"{att}time_mix_{c}", (C,))
        for c in ("receptance", "key", "value"):
            expect(f"{att}{c}.weight", (C, C), "matrix")
        expect(f"{att}time_decay", (C,))
        expect(f"{att}time_first", (C,))
        expect(f"{att}output.weight", (C, C), "matrix")
        expect.layer_norm(f"blocks.{i}.ln2")
        expect(f"blocks.{i}.ffn.time_mix_k", (C,))
        expect(f"blocks.{i}.ffn.time_mix_r", (C,))
        expect(f"blocks.{i}.ffn.key.weight", (n_ffn, C), "matrix")
        expect(f"blocks.{i}.ffn.value.weight", (C, n_ffn), "matrix")
        expect(f"blocks.{i}.ffn.receptance.weight", (C, C), "matrix")
    expect.layer_norm("ln_out")
    expect("head.weight", (V, C), "head")
    expect.nothing_else()
    vectors = [StateTensor(name, (C,), -1e30 if name == "pp" else 0.0) for name in ("att_x", "aa", "bb", "pp", "ffn_x")]
    return Spec("4", expect.n_layer, C, C, 1, n_ffn, V, expect.weights, tuple(vectors))
