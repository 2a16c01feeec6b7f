"""RWKV-5 "Eagle", one recurrent step.  Paper: arXiv 2404.05892, section 4; versions 5.0 and 5.1 from the code that trained them

Symbols           shape           meaning                                       checkpoint
  x               (1, T, C)       residual stream, T tokens
  p               (1, T, C)       the token before, for every token             state att_x, ffn_x
  mu              (C,)            how much of the token itself to take          att.time_mix_r k v g, ffn.time_mix_k r
  r k v           (1, T, H, N)    receptance, key, value                        att.receptance key value
  w               (H, N)          decay per key channel, 5.0 and 5.1 per head   att.time_decay
  u               (H, N)          bonus of the token itself, the same           att.time_faaaa, or its logarithm time_first
  g               (1, T, C)       gate, not in 5.0                              att.gate
  S               (1, H, N, N)    what the layer remembers, S[value, key]       state wkv

C = H N. `W` is the weights by name, matrices as (outputs, inputs); `F` is the operations (see ops.py).
"""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..spec import Shape, Spec, StateTensor
from .weights import Expected, Prefix

VERSIONS = ("5.0", "5.1", "5.2")
MARKER = "blocks.0.att.ln_x.weight"
UNUSED: tuple[str, ...] = ()
STACKED: dict[str, str] = {}
INPUTS_FIRST: tuple[str, ...] = ()


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
    gated = spec.version != "5.0"
    p, x_last = F.token_shift(x, x_last)

    # x_i = p + (x - p) mu_i
    mu = [W[f"time_mix_{c}"] for c in ("rkvg" if gated else "rkv")]
    x_r, x_k, x_v, *x_g = F.lerp(p, x, *mu)

    r = F.heads(F.linear(x_r, W["receptance.weight"]))
    k = F.heads(F.linear(x_k, W["key.weight"]))
    v = F.heads(F.linear(x_v, W["value.weight"]))

    # ln w = -exp(time_decay)
    ln_w = F.for_tokens(-F.exp(F.by_heads(W["time_decay"])), r)
    log_u = "blocks.0.att.time_first" in spec.weights
    u = F.exp(F.by_heads(W["time_first"])) if log_u else F.by_heads(W["time_faaaa"])

    # y = S r + (r . (u k)) v,   y <- GroupNorm(y) silu(g)
    y, S = WKV[F.wkv_form](F, S, r, ln_w, k, v)
    y = y + F.sum(r * k * u) * v
    y = F.merge_heads(F.head_norm(y, W["ln_x.weight"], W["ln_x.bias"], eps=spec.head_norm_eps))
    if gated:
        g = F.linear(x_g[0], W["gate.weight"])
        y = y * (g * F.sigmoid(g))
    return F.linear(y, W["output.weight"]), x_last, S


def channel_mix(F: Any, W: Any, x: Any, x_last: Any) -> tuple[Any, Any]:
    """Mix along channels: sigmoid(Wr x_r) Wv relu(Wk x_k)^2."""
    p, x_last = F.token_shift(x, x_last)
    x_k, x_r = F.lerp(p, x, W["time_mix_k"], W["time_mix_r"])
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
    gated = "blocks.0.att.gate.weight" in shapes
    by_channel = len(shapes.get("blocks.0.att.time_decay", ())) == 2
    version = "5.2" if by_channel and gated else "5.1" if gated else "5.0"
    expect = Expected(shapes, f"RWKV-{version}")
    decay = expect.shape("blocks.0.att.time_decay", 2 if version == "5.2" else 1)
    V, C = expect.shape("emb.weight", 2)
    n_ffn, _ = expect.shape("blocks.0.ffn.key.weight", 2)
    H = decay[0]
    N = C // H
    if C % H or decay not in ((H,), (H, N)):
        raise CheckpointError(f"blocks.0.att.time_decay has shape {decay}, expected heads that divide n_embd={C}")
    u = "time_first" if "blocks.0.att.time_first" in shapes else "time_faaaa"
    expect("emb.weight", (V, C), "embedding")
    expect.layer_norm("blocks.0.ln0")
    for i in range(expect.n_layer):
        expect.layer_norm(f"blocks.{i}.ln1")
        att = f"blocks.{i}.att."
        for c in "rkvg" if gated else "rkv":
            expect(f"{att}time_mix_{c}", (C,))
        for c in ("receptance", "key", "value", "gate") if gated else ("receptance", "key", "value"):
            expect(f"{att}{c}.weight", (C, C), "matrix")
        expect(f"{att}time_decay", decay)
        expect(f"{att}{u}", decay)
        expect.layer_norm(f"{att}ln_x")
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
    state = (StateTensor("att_x", (C,)), StateTensor("wkv", (H, N, N)), StateTensor("ffn_x", (C,)))
    return Spec(version, expect.n_layer, C, H, N, n_ffn, V, expect.weights, state)
