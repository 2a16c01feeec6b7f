"""RWKV-6 "Finch", one recurrent step.  Paper: arXiv 2404.05892, section 4

Symbols           shape           meaning                                       checkpoint
  x               (1, T, C)       residual stream, T tokens
  p               (1, T, C)       the token before, for every token             state att_x, ffn_x
  mu              (1, T, C)       how far to look back, from the tokens         att.time_maa_x w1 w2, time_maa_w k v r g
  r k v           (1, T, H, N)    receptance, key, value                        att.receptance key value
  w               (1, T, H, N)    decay per key channel, in (0, 1)              att.time_decay, time_decay_w1 w2
  u               (H, N)          bonus of the token itself                     att.time_faaaa
  g               (1, T, C)       gate                                          att.gate
  S               (1, H, N, N)    what the layer remembers, S[value, key]       state wkv

C = H N. `W` is the weights by name, matrices as (outputs, inputs); `F` is the operations (see ops.py).
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..spec import Shape, Spec, StateTensor
from .weights import Expected, Prefix

VERSIONS = ("6",)
MARKER = "blocks.0.att.time_maa_x"
UNUSED: tuple[str, ...] = ()
STACKED = {"time_maa_w2": "wkvrg"}  # stored as one tensor (5, rank, C)
INPUTS_FIRST = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")  # stored (inputs, outputs)


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
    x = F.layer_norm(F.embed(W["emb.weight"], tokens), W["blocks.0.ln0.weight"], W["blocks.0.ln0.bias"], eps=spec.norm_eps)
    for i in range(spec.n_layer):
        block = Prefix(W, f"blocks.{i}.")
        z = F.layer_norm(x, block["ln1.weight"], block["ln1.bias"], eps=spec.norm_eps)
        z, new[f"{i}.att_x"], new[f"{i}.wkv"] = time_mix(
            F, Prefix(W, f"blocks.{i}.att."), spec, z, state[f"{i}.att_x"], state[f"{i}.wkv"]
        )
        x = x + z
        z = F.layer_norm(x, block["ln2.weight"], block["ln2.bias"], eps=spec.norm_eps)
        z, new[f"{i}.ffn_x"] = channel_mix(F, Prefix(W, f"blocks.{i}.ffn."), z, state[f"{i}.ffn_x"])
        x = x + z
    x = F.layer_norm(F.take_tokens(x, positions), W["ln_out.weight"], W["ln_out.bias"], eps=spec.out_norm_eps)
    return F.rows(F.linear(x, W["head.weight"])), new


def time_mix(F: Any, W: Any, spec: Spec, x: Any, x_last: Any, S: Any) -> tuple[Any, Any, Any]:
    """Mix along time: read the memory with r, let it decay, write v at k."""
    p, x_last = F.token_shift(x, x_last)

    # mu_i = maa_i + tanh((x + (p - x) maa_x) w1)_i w2_i,   x_i = x + (p - x) mu_i
    (z,) = F.lerp(x, p, W["time_maa_x"])
    z_w, z_k, z_v, z_r, z_g = F.split(F.tanh(F.linear(z, W["time_maa_w1"])), 5)
    d = p - x
    x_w = x + d * F.linear(z_w, W["time_maa_w2.w"], W["time_maa_w"])
    x_k = x + d * F.linear(z_k, W["time_maa_w2.k"], W["time_maa_k"])
    x_v = x + d * F.linear(z_v, W["time_maa_w2.v"], W["time_maa_v"])
    x_r = x + d * F.linear(z_r, W["time_maa_w2.r"], W["time_maa_r"])
    x_g = x + d * F.linear(z_g, W["time_maa_w2.g"], W["time_maa_g"])

    r = F.heads(F.linear(x_r, W["receptance.weight"]))
    k = F.heads(F.linear(x_k, W["key.weight"]))
    v = F.heads(F.linear(x_v, W["value.weight"]))
    g = F.linear(x_g, W["gate.weight"])

    # ln w = -exp(time_decay + tanh(x_w w1) w2)
    ln_w = F.linear(F.tanh(F.linear(x_w, W["time_decay_w1"])), W["time_decay_w2"], W["time_decay"])
    ln_w = F.heads(-F.exp(ln_w))

    # y = S r + (r . (u k)) v,   y <- GroupNorm(y) silu(g)
    y, S = WKV[F.wkv_form](F, S, r, ln_w, k, v)
    y = y + F.sum(r * k * W["time_faaaa"]) * v
    y = F.head_norm(y, W["ln_x.weight"], W["ln_x.bias"], eps=spec.head_norm_eps)
    return F.linear(F.merge_heads(y) * (g * F.sigmoid(g)), W["output.weight"]), x_last, S


def channel_mix(F: Any, W: Any, x: Any, x_last: Any) -> tuple[Any, Any]:
    """Mix along channels: sigmoid(Wr x_r) Wv relu(Wk x_k)^2."""
    p, x_last = F.token_shift(x, x_last)
    x_k, x_r = F.lerp(x, p, W["time_maa_k"], W["time_maa_r"])
    k = F.linear(F.relu_squared(F.linear(x_k, W["key.weight"])), W["value.weight"])
    return F.sigmoid(F.linear(x_r, W["receptance.weight"])) * k, x_last


# --- the WKV in three forms of one recurrence; a test holds them equal ---


def wkv_step(F: Any, S: Any, r: Any, ln_w: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """The paper's line, one token after the other."""

    def one(S: Any, r: Any, ln_w: Any, k: Any, v: Any) -> tuple[Any, Any]:
        # y = S r,   S <- S diag(w) + v k^T
        return F.uncol(S @ F.col(r)), S * F.row(F.exp(ln_w)) + F.col(v) @ F.row(k)

    return F.each_token(one, S, r, ln_w, k, v)  # type: ignore[no-any-return]


def wkv_chunk(F: Any, S: Any, r: Any, ln_w: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """T tokens as matrix products.

    With w_(i,j) the product of w from token i up to but not including j:
        Y_t = (r_t w_(0,t)) S^T + sum over s < t of (r_t . (k_s w_(s+1,t))) v_s
        S <- S diag(w_(0,T)) + sum over s of v_s (k_s w_(s+1,T))^T
    Decays have no floor here, so nothing is divided by them, and no logarithms are subtracted.
    """
    ln_w = F.maximum(ln_w, -1e4)  # exp(-1e4) is 0, and sums of these stay finite
    A = F.decayed_products(r, k, ln_w)
    r, ln_w, k, v = (F.heads_first(z) for z in (r, ln_w, k, v))  # (1, H, T, N)
    t = F.transpose
    Y = (r * F.exp(F.cumsum(ln_w, exclusive=True))) @ t(S) + A @ v
    S = S * F.exp(F.last_token(F.cumsum(ln_w))) + t(v) @ (k * F.exp(F.cumsum(ln_w, exclusive=True, reverse=True)))
    return F.heads_first(Y), S


def wkv_linear_attention(F: Any, S: Any, r: Any, ln_w: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """The same recurrence by onnxruntime's gated rule; S is [key, value] here.

    That rule, S <- diag(w) S + k v^T, gives S^T query after the token, and y wants S^T r before it: so every token
    asks with the next one's r, and the first y is S^T r by itself.
    """
    first = F.heads_first(F.heads_first(F.first_token(r)) @ S)
    y, S = F.gated(S, query=F.next_token(r), key=k, value=v, log_decay=ln_w)
    y, _ = F.token_shift(y, first)
    return y, S


WKV = {"step": wkv_step, "chunk": wkv_chunk, "linear_attention": wkv_linear_attention}
MAX_TOKENS = {"step": 1, "chunk": 32, "linear_attention": 256}  # in one call of an exported step


# --- what a checkpoint of this version holds ---


def spec(shapes: Mapping[str, Shape]) -> Spec:
    """Read every size from the canonical shapes, and check that they fit each other.

    Raises  CheckpointError if a tensor is missing, misshapen, or nobody's.
    """
    expect = Expected(shapes, "RWKV-6")
    H, N = expect.shape("blocks.0.att.time_faaaa", 2)
    V, C = expect.shape("emb.weight", 2)
    n_ffn, _ = expect.shape("blocks.0.ffn.key.weight", 2)
    if H * N != C:
        raise CheckpointError(f"blocks.0.att.time_faaaa has shape {(H, N)}, expected {C} values for n_embd={C}")
    expect("emb.weight", (V, C), "embedding")
    expect.layer_norm("blocks.0.ln0")
    for i in range(expect.n_layer):
        expect.layer_norm(f"blocks.{i}.ln1")
        att = f"blocks.{i}.att."
        expect(f"{att}time_maa_x", (C,))
        rank = expect.shape(f"{att}time_maa_w2.w", 2)[1]
        expect(f"{att}time_maa_w1", (5 * rank, C), "low_rank")
        for c in "wkvrg":
            expect(f"{att}time_maa_w2.{c}", (C, rank), "low_rank")
            expect(f"{att}time_maa_{c}", (C,))
        for c in ("receptance", "key", "value", "gate"):
            expect(f"{att}{c}.weight", (C, C), "matrix")
        rank, _ = expect.shape(f"{att}time_decay_w1", 2)
        expect(f"{att}time_decay_w1", (rank, C), "low_rank")
        expect(f"{att}time_decay_w2", (C, rank), "low_rank")
        expect(f"{att}time_decay", (C,))
        expect(f"{att}time_faaaa", (H, N))
        expect.layer_norm(f"{att}ln_x")
        expect(f"{att}output.weight", (C, C), "matrix")
        expect.layer_norm(f"blocks.{i}.ln2")
        expect(f"blocks.{i}.ffn.time_maa_k", (C,))
        expect(f"blocks.{i}.ffn.time_maa_r", (C,))
        expect(f"blocks.{i}.ffn.key.weight", (n_ffn, C), "matrix")
        expect(f"blocks.{i}.ffn.value.weight", (C, n_ffn), "matrix")
        expect(f"blocks.{i}.ffn.receptance.weight", (C, C), "matrix")
    expect.layer_norm("ln_out")
    expect("head.weight", (V, C), "head")
    expect.nothing_else()
    state = (StateTensor("att_x", (C,)), StateTensor("wkv", (H, N, N)), StateTensor("ffn_x", (C,)))
    return Spec("6", expect.n_layer, C, H, N, n_ffn, V, expect.weights, state)
