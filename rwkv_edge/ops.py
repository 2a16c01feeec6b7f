"""F: the operations that an RWKV step is written in, and their meaning in numpy.

A model file calls these and the operators + - * @ on whatever they return. `Numpy` computes: it is the reference that
every other target is held against. An exporter has the same methods, and records instead.

T tokens, C channels, H heads of N channels; activations are (1, T, C), by heads (1, T, H, N).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .qtensor import Lut, QTensor

Array = npt.NDArray[np.floating[Any]]
Matrix = Array | QTensor | Lut


class Numpy:
    """Compute every operation at once, in float32 or, as an oracle, in float64.

    n_head    heads, for the operations that split channels by heads
    wkv_form  "step", "chunk" or "linear_attention": which of a model's forms of the WKV to run
    """

    def __init__(self, n_head: int, wkv_form: str = "step", dtype: npt.DTypeLike = np.float32) -> None:
        self.n_head, self.wkv_form = n_head, wkv_form
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    def _matrix(self, W: Matrix) -> Array:
        return (W.dequantize() if isinstance(W, QTensor | Lut) else W).astype(self.dtype, copy=False)

    # --- matrices ---

    def embed(self, W: Matrix, tokens: Array) -> Array:
        """Give each token its row of W: (V, C), (T,) -> (1, T, C)."""
        rows = W.take(tokens).dequantize() if isinstance(W, QTensor | Lut) else W[tokens]
        return rows.astype(self.dtype)[None]

    def table_rows(self, W: Matrix, tokens: Array) -> Array:
        """The same as `embed`, of a table that stays outside a graph."""
        return self.embed(W, tokens)

    def each_token_matmul(self, x: Array, M: Array) -> Array:
        """x_t M_t, every token with a matrix of its own: (1, T, R), (1, T, R R) -> (1, T, R)."""
        _, T, R = x.shape
        return np.matmul(x.reshape(T, 1, R), M.reshape(T, R, R)).reshape(1, T, R)

    def linear(self, x: Array, W: Matrix, bias: Array | None = None) -> Array:
        """x W^T (+ bias): (1, T, I), (O, I) -> (1, T, O)."""
        y = x @ self._matrix(W).T
        return y if bias is None else y + bias

    # --- along tokens ---

    def token_shift(self, x: Array, x_last: Array) -> tuple[Array, Array]:
        """Give for every token the one before it, and the last token for the next call; x_last (1, 1, C)."""
        return np.concatenate([x_last, x[:, :-1]], axis=1), x[:, -1:]

    def lerp(self, x: Array, p: Array, *mu: Array) -> tuple[Array, ...]:
        """x + (p - x) mu, once for every mu (C,)."""
        d = p - x
        return tuple(x + d * m for m in mu)

    def next_token(self, x: Array) -> Array:
        """Give for every token the one after it, for the last one the first."""
        return np.roll(x, -1, axis=1)

    def first_token(self, x: Array) -> Array:
        """(1, T, H, N) -> (1, 1, H, N)."""
        return x[:, :1]

    def for_tokens(self, x: Array, like: Array) -> Array:
        """The same for every token: (H, N) -> (1, T, H, N)."""
        return np.broadcast_to(x, like.shape)

    def take_tokens(self, x: Array, positions: Array) -> Array:
        """Keep some tokens only: (1, T, C), (P,) -> (1, P, C)."""
        return x[:, positions]

    def split(self, x: Array, n: int) -> list[Array]:
        """Cut channels into n equal parts."""
        return np.split(x, n, axis=-1)

    def rows(self, x: Array) -> Array:
        """(1, P, V) -> (P, V)."""
        return x[0]

    # --- by element ---

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x)), by way of tanh, which does not overflow."""
        return np.tanh(x * 0.5) * 0.5 + 0.5

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def exp(self, x: Array) -> Array:
        return np.exp(x, dtype=self.dtype)

    def log(self, x: Array) -> Array:
        return np.log(x)

    def maximum(self, x: Array, floor: float) -> Array:
        return np.maximum(x, floor)

    def larger(self, x: Array, y: Array) -> Array:
        """The larger of two, by element."""
        return np.maximum(x, y)

    def relu_squared(self, x: Array) -> Array:
        """max(x, 0)^2."""
        x = np.maximum(x, 0)
        return x * x

    def fill_like(self, x: Array, value: float) -> Array:
        """One number in the shape of x."""
        return np.full_like(x, value)

    # --- norms ---

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        """(x - mean) / sqrt(variance + eps) weight + bias, over the last axis."""
        d = x - x.mean(-1, keepdims=True)
        return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * weight + bias

    def head_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        """Layer norm of every head on its own: (1, T, H, N), with weight and bias (C,)."""
        return self.layer_norm(x, weight.reshape(self.n_head, -1), bias.reshape(self.n_head, -1), eps=eps)

    def l2_normalize(self, x: Array, *, eps: float) -> Array:
        """x / max(|x|, eps), over the last axis."""
        return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), eps)

    def sum(self, x: Array) -> Array:
        """Sum over the last axis, which stays as 1."""
        return x.sum(-1, keepdims=True)

    # --- by heads ---

    def heads(self, x: Array) -> Array:
        """(1, T, C) -> (1, T, H, N)."""
        return x.reshape(1, x.shape[1], self.n_head, -1)

    def by_heads(self, x: Array) -> Array:
        """One number for every head, (H,), or channel, (H, N), to go with (1, T, H, N)."""
        return x.reshape(self.n_head, -1)

    def merge_heads(self, x: Array) -> Array:
        """(1, T, H, N) -> (1, T, C)."""
        return x.reshape(1, x.shape[1], -1)

    def heads_first(self, x: Array) -> Array:
        """(1, T, H, N) -> (1, H, T, N), and back."""
        return x.swapaxes(1, 2)

    # --- the WKV, step by step ---

    def each_token(self, one: Callable[..., tuple[Array, Array]], S: Array, *xs: Array) -> tuple[Array, Array]:
        """S, y_t = one(S, x_t ...) for every token t in turn: x (1, T, H, N); y (1, T, H, N) and the last S."""
        ys = []
        for t in range(xs[0].shape[1]):
            y, S = one(S, *(x[:, t] for x in xs))
            ys.append(y.reshape(xs[0][:, t].shape))
        return np.stack(ys, axis=1), S

    def row(self, x: Array) -> Array:
        """One token's heads as rows, (1, H, 1, N)."""
        return x[:, :, None, :]

    def col(self, x: Array) -> Array:
        """One token's heads as columns, (1, H, N, 1)."""
        return x[:, :, :, None]

    def uncol(self, x: Array) -> Array:
        """A column of one token's heads, (1, H, N, 1), as its result."""
        return x[..., 0]

    # --- the WKV, in chunks: (1, H, T, N) ---

    def transpose(self, x: Array) -> Array:
        """Exchange the last two axes."""
        return x.swapaxes(-1, -2)

    def cumsum(self, x: Array, *, exclusive: bool = False, reverse: bool = False) -> Array:
        """Running sum over tokens; exclusive of the token itself, reversed from the end."""
        x = x[:, :, ::-1] if reverse else x
        y = x.cumsum(axis=2)
        if exclusive:
            y = np.concatenate([np.zeros_like(y[:, :, :1]), y[:, :, :-1]], axis=2)
        return y[:, :, ::-1] if reverse else y

    def last_token(self, x: Array) -> Array:
        """(1, H, T, N) -> (1, H, 1, N)."""
        return x[:, :, -1:]

    def tril(self, x: Array, k: int) -> Array:
        """Keep what lies on or below the k-th diagonal: (1, H, T, T)."""
        return np.tril(x, k)

    def decayed_products(self, r: Array, k: Array, ln_w: Array) -> Array:
        """Sum over n of r_tn k_sn exp(the sum of ln_w_jn over s < j < t), for s < t: (1, T, H, N) -> (1, H, T, T)."""
        T = r.shape[1]
        decay = np.exp(np.tensordot(_between(T, inclusive=False).astype(r.dtype), ln_w[0], 1))  # (T, T, H, N)
        return np.tril((r[0, :, None] * k * decay).sum(-1).transpose(2, 0, 1)[None], -1)

    def invert_unit_lower(self, A: Array) -> Array:
        """(I + tril(A, -1))^-1, (1, H, T, T), by doubling the inverted diagonal blocks."""
        T = A.shape[-1]
        i = np.arange(T)
        X = np.broadcast_to(np.eye(T, dtype=A.dtype), A.shape)
        s = 1
        while s < T:
            # the blocks below the diagonal that join two inverted blocks of size s into one of size 2 s
            join = (i[:, None] // (2 * s) == i // (2 * s)) & (i[:, None] // s > i // s)
            X = X - X @ np.where(join, A, 0) @ X
            s *= 2
        return X

    # --- the WKV, as linear attention ---

    def interleave(self, x: Array, y: Array) -> Array:
        """Two sub-steps for every token, x then y: (1, T, H, N) -> (1, 2 T, H, N)."""
        return np.stack([x, y], axis=2).reshape(1, -1, *x.shape[2:])

    def every_second(self, x: Array) -> Array:
        """The second sub-step of every token: (1, 2 T, H, N) -> (1, T, H, N)."""
        return x[:, 1::2]

    def gated_delta(
        self, S: Array, *, query: Array, key: Array, value: Array, log_decay: Array, beta: tuple[float, float]
    ) -> tuple[Array, Array]:
        """S <- D + beta key (value - D^T key)^T with D = diag(exp(log_decay)) S, y = S^T query, for every sub-step.

        S     (1, H, N, N), [key, value]
        beta  of the first and of the second sub-step of every token

        Source  onnxruntime, docs/ContribOperators.md, com.microsoft.LinearAttention, update_rule gated_delta
        """
        ys = []
        for t in range(query.shape[1]):
            D = S * self.col(np.exp(log_decay[:, t]))
            rest = self.row(value[:, t]) - self.row(key[:, t]) @ D
            S = D + beta[t % 2] * (self.col(key[:, t]) @ rest)
            ys.append((self.row(query[:, t]) @ S)[:, :, 0])
        return np.stack(ys, axis=1), S

    def gated(self, S: Array, *, query: Array, key: Array, value: Array, log_decay: Array) -> tuple[Array, Array]:
        """S <- diag(exp(log_decay)) S + key value^T, y = S^T query, for every token.

        S  (1, H, N, N), [key, value]

        Source  onnxruntime, docs/ContribOperators.md, com.microsoft.LinearAttention, update_rule gated
        """
        ys = []
        for t in range(query.shape[1]):
            S = S * self.col(np.exp(log_decay[:, t])) + self.col(key[:, t]) @ self.row(value[:, t])
            ys.append((self.row(query[:, t]) @ S)[:, :, 0])
        return np.stack(ys, axis=1), S

    # --- decayed sums by channel: (1, T, C), first values (1, 1, C) ---

    def running_max(self, k: Array, w: Array, p: Array) -> Array:
        """p_t = max(p_(t-1) + w, k_t), from p before the first token."""
        ps = []
        for t in range(k.shape[1]):
            p = np.maximum(p + w, k[:, t : t + 1])
            ps.append(p)
        return np.concatenate(ps, axis=1)

    def decayed_sums(self, a: Array, b: Array, log_decay: Array, key: Array, value: Array) -> tuple[Array, Array]:
        """a_t = exp(log_decay_t) a_(t-1) + key_t value_t, and b_t without the value, for every token."""
        D = np.exp(np.tensordot(_between(key.shape[1], inclusive=True).astype(key.dtype), log_decay[0], 1))  # (T, T, C)
        D = np.where(np.tri(len(D), dtype=bool)[..., None], D, 0)
        first = np.exp(log_decay.cumsum(axis=1))
        return first * a + (D * key * value).sum(1)[None], first * b + (D * key).sum(1)[None]

    def decayed_sums_gated(self, a: Array, b: Array, log_decay: Array, key: Array, value: Array) -> tuple[Array, Array]:
        """The same, one token after the other, as onnxruntime's gated rule does it."""
        sums = []
        for t in range(key.shape[1]):
            d, k, v = (x[:, t : t + 1] for x in (log_decay, key, value))
            a, b = np.exp(d) * a + k * v, np.exp(d) * b + k
            sums.append((a, b))
        return np.concatenate([s[0] for s in sums], axis=1), np.concatenate([s[1] for s in sums], axis=1)


class HalfConstants(Numpy):
    """The same, with every number that stands in a model's formulas rounded to float16, as a graph in float16 has it.

    scales  at which the graph keeps what layer norms and head norms take: their eps is rounded with its square in it
    """

    def __init__(self, n_head: int, wkv_form: str, dtype: npt.DTypeLike, scales: tuple[float, float]) -> None:
        super().__init__(n_head, wkv_form, dtype)
        self.residual, self.of_heads = scales

    def sigmoid(self, x: Array) -> Array:
        return super().sigmoid(x).view(_HalfConstants)

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        return super().layer_norm(x, weight, bias, eps=_half_eps(eps, self.residual))

    def head_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        eps = _half_eps(eps, self.of_heads)
        return super().layer_norm(x, weight.reshape(self.n_head, -1), bias.reshape(self.n_head, -1), eps=eps)


def _half_eps(eps: float, scale: float) -> float:
    """As float16 holds it, at least its smallest number."""
    return max(float(np.float16(eps * scale**2)), 2.0**-24) / scale**2


class _HalfConstants(np.ndarray[Any, Any]):
    """An array whose products with plain numbers take them rounded to float16."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: Any, *inputs: Any, **options: Any) -> Any:
        plain = [float(np.float16(x)) if isinstance(x, float) else np.asarray(x) for x in inputs]
        return getattr(ufunc, method)(*plain, **options)


def _between(T: int, *, inclusive: bool) -> npt.NDArray[np.bool_]:
    """Which tokens j decay what token s wrote until t reads it: s < j < t, or s < j <= t; (t, s, j)."""
    t, s, j = np.ogrid[:T, :T, :T]
    return (s < j) & ((j <= t) if inclusive else (j < t))
