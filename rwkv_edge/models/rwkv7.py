"""RWKV-7 "Goose", one recurrent step.  Paper: arXiv 2503.14456, section 4 and appendix F; 7a from the code that trained it

Symbols           shape           meaning                                       checkpoint
  x               (1, T, C)       residual stream, T tokens
  p               (1, T, C)       the token before, for every token             state att_x, ffn_x
  mu              (C,)            how far to look back                          att.x_r ... x_g, ffn.x_k
  r k v           (1, T, H, N)    receptance, key, value                        att.receptance key value
  w               (1, T, H, N)    decay per key channel, in (0.545, 1)          att.w0 w1 w2
  a               (1, T, H, N)    in-context learning rate                      att.a0 a1 a2
  g               (1, T, C)       gate                                          att.g1 g2
  kk              (1, T, H, N)    removal key, of length one                    att.k_k
  v_first         (1, T, H, N)    the first layer's value, mixed into later ones  att.v0 v1 v2
  E               (1, T, R R)     7a: a matrix of every token's own, for every layer  ffn.s_emb s_emb_x
  S               (1, H, N, N)    what the layer remembers, S[value, key]       state wkv

C = H N. `W` is the weights by name, matrices as (outputs, inputs); `F` is the operations (see ops.py).
"""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..spec import Shape, Spec, StateTensor
from .weights import Expected, Prefix

VERSIONS = ("7", "7a")
MARKER = "blocks.0.att.r_k"
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # the first layer has no value to mix in
STACKED: dict[str, str] = {}
INPUTS_FIRST = (
    "w1",
    "w2",
    "a1",
    "a2",
    "v1",
    "v2",
    "g1",
    "g2",
    "s1",
    "s2",
)  # stored (inputs, outputs), unlike every other matrix


def step(
    F: Any, W: Mapping[str, Any], spec: Spec, tokens: Any, positions: Any, state: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Read T tokens and give the logits at `positions` and the state after the last token.

    tokens     (T,) int64
    positions  (P,) int64, of the tokens whose logits are wanted
    state      `{layer}.att_x`, `{layer}.ffn_x` (1, 1, C) and `{layer}.wkv` (1, H, N, N)

    Returns  logits (P, V), and the state in the same form.
    """
    new: dict[str, Any] = {}
    v_first = None
    x = F.layer_norm(F.embed(W["emb.weight"], tokens), W["blocks.0.ln0.weight"], W["blocks.0.ln0.bias"], eps=spec.norm_eps)
    for i in range(spec.n_layer):
        block = Prefix(W, f"blocks.{i}.")
        z = F.layer_norm(x, block["ln1.weight"], block["ln1.bias"], eps=spec.norm_eps)
        z, new[f"{i}.att_x"], new[f"{i}.wkv"], v_first = time_mix(
            F, Prefix(W, f"blocks.{i}.att."), spec, z, state[f"{i}.att_x"], state[f"{i}.wkv"], v_first
        )
        x = x + z
        z = F.layer_norm(x, block["ln2.weight"], block["ln2.bias"], eps=spec.norm_eps)
        z, new[f"{i}.ffn_x"] = channel_mix(F, Prefix(W, f"blocks.{i}.ffn."), spec, tokens, z, state[f"{i}.ffn_x"])
        x = x + z
    x = F.layer_norm(F.take_tokens(x, positions), W["ln_out.weight"], W["ln_out.bias"], eps=spec.out_norm_eps)
    return F.rows(F.linear(x, W["head.weight"])), new


def time_mix(F: Any, W: Any, spec: Spec, x: Any, x_last: Any, S: Any, v_first: Any) -> tuple[Any, Any, Any, Any]:
    """Mix along time: read the memory with r, erase along kk, write v at k."""
    p, x_last = F.token_shift(x, x_last)

    # x_i = x + (p - x) mu_i
    x_r, x_w, x_k, x_v, x_a, x_g = F.lerp(x, p, W["x_r"], W["x_w"], W["x_k"], W["x_v"], W["x_a"], W["x_g"])

    r = F.linear(x_r, W["receptance.weight"])
    k = F.linear(x_k, W["key.weight"])
    v = F.linear(x_v, W["value.weight"])

    # ln w = -e^(-1/2) sigmoid(w0 + tanh(x_w w1) w2)
    ln_w = -math.exp(-0.5) * F.sigmoid(F.linear(F.tanh(F.linear(x_w, W["w1"])), W["w2"], W["w0"]))

    # a = sigmoid(a0 + x_a a1 a2)
    a = F.sigmoid(F.linear(F.linear(x_a, W["a1"]), W["a2"], W["a0"]))

    # g = sigmoid(x_g g1) g2
    g = F.linear(F.sigmoid(F.linear(x_g, W["g1"])), W["g2"])

    # v <- v + (v_first - v) sigmoid(v0 + x_v v1 v2)
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * F.sigmoid(F.linear(F.linear(x_v, W["v1"]), W["v2"], W["v0"]))

    # kk = k k_k / |k k_k|,   k <- k (1 + (a - 1) k_a)
    kk = F.l2_normalize(F.heads(k * W["k_k"]), eps=1e-12)
    k = k * (1 + (a - 1) * W["k_a"])

    r, k, v, ln_w, a = F.heads(r), F.heads(k), F.heads(v), F.heads(ln_w), F.heads(a)
    y, S = WKV[F.wkv_form](F, S, r, ln_w, k, v, kk, a)

    # y <- GroupNorm(y) + (r . (k r_k)) v
    y = F.head_norm(y, W["ln_x.weight"], W["ln_x.bias"], eps=spec.head_norm_eps)
    y = y + F.sum(r * k * W["r_k"]) * v
    return F.linear(F.merge_heads(y) * g, W["output.weight"]), x_last, S, v_first


def channel_mix(F: Any, W: Any, spec: Spec, tokens: Any, x: Any, x_last: Any) -> tuple[Any, Any]:
    """Mix along channels: Wv relu(Wk x_k)^2."""
    p, x_last = F.token_shift(x, x_last)
    (x_k,) = F.lerp(x, p, W["x_k"])
    k = F.relu_squared(F.linear(x_k, W["key.weight"]))
    if spec.version == "7a":
        # k <- k (s0 + (x s1) E s2)
        E = F.table_rows(W["s_emb.weight"], tokens)
        k = k * F.linear(F.each_token_matmul(F.linear(x, W["s1"]), E), W["s2"], W["s0"])
    return F.linear(k, W["value.weight"]), x_last


# --- the WKV in three forms of one recurrence; a test holds them equal ---


def wkv_step(F: Any, S: Any, r: Any, ln_w: Any, k: Any, v: Any, kk: Any, a: Any) -> tuple[Any, Any]:
    """The paper's line, one token after the other."""

    def one(S: Any, r: Any, ln_w: Any, k: Any, v: Any, kk: Any, a: Any) -> tuple[Any, Any]:
        row, col = F.row, F.col  # (1, H, 1, N) and (1, H, N, 1)
        w = F.exp(ln_w)

        # S <- S diag(w) - (S kk)(kk a)^T + v k^T,   y = S r
        S = S * row(w) - (S @ col(kk)) @ row(kk * a) + col(v) @ row(k)
        return F.uncol(S @ col(r)), S

    return F.each_token(one, S, r, ln_w, k, v, kk, a)  # type: ignore[no-any-return]


def wkv_chunk(F: Any, S: Any, r: Any, ln_w: Any, k: Any, v: Any, kk: Any, a: Any) -> tuple[Any, Any]:
    """T tokens as matrix products.  T <= 64: 1 / c must not overflow.

    With c_t the product of w up to t, and rows t of Q, K, B, R:
        q = kk c / w     k~ = k / c     b = kk a / c     r~ = r c
        (I + tril(q b^T, -1)) U = q S^T + tril(q k~^T, -1) V
        Y = r~ S^T + tril(r~ k~^T) V - tril(r~ b^T) U
        S <- (S + V^T k~ - U^T b) diag(c_T)
    """
    r, ln_w, k, v, kk, a = (F.heads_first(z) for z in (r, ln_w, k, v, kk, a))  # (1, H, T, N)
    t = F.transpose
    ln_c = F.cumsum(ln_w)
    inverse_c = F.exp(-ln_c)
    q = kk * F.exp(ln_c - ln_w)
    k = k * inverse_c
    b = kk * a * inverse_c
    r = r * F.exp(ln_c)

    inverse = F.invert_unit_lower(q @ t(b))
    U = inverse @ (q @ t(S) + F.tril(q @ t(k), -1) @ v)
    Y = r @ t(S) + F.tril(r @ t(k), 0) @ v - F.tril(r @ t(b), 0) @ U
    S = (S + t(v) @ k - t(U) @ b) * F.exp(F.last_token(ln_c))
    return F.heads_first(Y), S


def wkv_linear_attention(F: Any, S: Any, r: Any, ln_w: Any, k: Any, v: Any, kk: Any, a: Any) -> tuple[Any, Any]:
    """The same recurrence by onnxruntime's gated delta rule; S is [key, value] here.

    That rule, S <- diag(e^d) S + b key (value - (e^d S)^T key)^T, erases and writes along one key. Erasing along kk
    and writing at k a times two tokens of it:
        erase   key kk sqrt(a / w)   value 0        b 1       d (ln w - ln a) / 2
        write   key k                value v 2^44   b 2^-44   d (ln w + ln a) / 2
    The two decays make w; 2^44 lets the write's own erasing vanish below float32. In float32 e^d e^d rounds with a bias
    where w is 1 and a constant: then S drifts by 7e-8 of its size a token, which no trained model was seen to do.
    """
    ln_a = F.log(F.maximum(a, 1e-9))
    d_erase, d_write = (ln_w - ln_a) * 0.5, (ln_w + ln_a) * 0.5
    y, S = F.gated_delta(
        S,
        query=F.interleave(F.fill_like(r, 0.0), r),
        key=F.interleave(kk * F.exp(-d_erase), k),
        value=F.interleave(F.fill_like(v, 0.0), v * 2.0**44),
        log_decay=F.interleave(d_erase, d_write),
        beta=(1.0, 2.0**-44),
    )
    return F.every_second(y), S


WKV = {"step": wkv_step, "chunk": wkv_chunk, "linear_attention": wkv_linear_attention}
MAX_TOKENS = {"step": 1, "chunk": 64, "linear_attention": 256}  # in one call of an exported step


# --- what a checkpoint of this version holds ---


def spec(shapes: Mapping[str, Shape]) -> Spec:
    """Read every size from the canonical shapes, and check that they fit each other.

    Raises  CheckpointError if a tensor is missing, misshapen, or nobody's.
    """
    version = "7a" if "blocks.0.ffn.s_emb.weight" in shapes else "7"
    expect = Expected(shapes, f"RWKV-{version}")
    H, N = expect.shape("blocks.0.att.r_k", 2)
    V, C = expect.shape("emb.weight", 2)
    n_ffn, _ = expect.shape("blocks.0.ffn.key.weight", 2)
    if H * N != C:
        raise CheckpointError(f"blocks.0.att.r_k has shape {(H, N)}, expected {C} values for n_embd={C}")
    expect("emb.weight", (V, C), "embedding")
    expect.layer_norm("blocks.0.ln0")
    for i in range(expect.n_layer):
        expect.layer_norm(f"blocks.{i}.ln1")
        att = f"blocks.{i}.att."
        for c in "rwkvag":
            expect(f"{att}x_{c}", (C,))
        for c in ("receptance", "key", "value"):
            expect(f"{att}{c}.weight", (C, C), "matrix")
        for c in "wag" if i == 0 else "wagv":
            rank, _ = expect.shape(f"{att}{c}1", 2)
            expect(f"{att}{c}1", (rank, C), "low_rank")
            expect(f"{att}{c}2", (C, rank), "low_rank")
            if c != "g":
                expect(f"{att}{c}0", (C,))
        expect(f"{att}k_k", (C,))
        expect(f"{att}k_a", (C,))
        expect(f"{att}r_k", (H, N))
        expect.layer_norm(f"{att}ln_x")
        expect(f"{att}output.weight", (C, C), "matrix")
        expect.layer_norm(f"blocks.{i}.ln2")
        expect(f"blocks.{i}.ffn.x_k", (C,))
        expect(f"blocks.{i}.ffn.key.weight", (n_ffn, C), "matrix")
        if version == "7a":
            rank, _ = expect.shape(f"blocks.{i}.ffn.s1", 2)
            expect(f"blocks.{i}.ffn.s_emb.weight", (V, rank * rank), "table")
            expect(f"blocks.{i}.ffn.s1", (rank, C), "low_rank")
            expect(f"blocks.{i}.ffn.s2", (n_ffn, rank), "low_rank")
            expect(f"blocks.{i}.ffn.s0", (n_ffn,))
        expect(f"blocks.{i}.ffn.value.weight", (C, n_ffn), "matrix")
    expect.layer_norm("ln_out")
    expect("head.weight", (V, C), "head")
    expect.nothing_else()
    state = (StateTensor("att_x", (C,)), StateTensor("wkv", (H, N, N)), StateTensor("ffn_x", (C,)))
    return Spec(version, expect.n_layer, C, H, N, n_ffn, V, expect.weights, state)
