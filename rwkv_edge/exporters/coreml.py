"""Core ML: F that records MIL operations. Running a model's step once gives the functions of one or several packages.

MIL is Core ML's intermediate language; a package (.mlpackage) is its protobuf and one file of weights. Both are written
directly, in the shapes that coremltools itself writes, so the order of operations, the arithmetic and every byte are ours.

Source  coremltools 9.0, proto/MIL.proto; MILBlob's StorageFormat.hpp for the file of weights
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import mil
from ..bundle import PACKED_STATE, packing
from ..errors import BackendError, ExportError
from ..models import model_of
from ..qtensor import HALF_NORMAL, Lut, Plan, QTensor, Recipe, pack_bits
from ..spec import Shape, Spec, StateTensor

FUNCTIONS = {"decode": 1, "prefill": 16}  # how many tokens a call of each takes
NEEDS = {"ios": "18.0", "macos": "15.0"}  # the first with integers of 4 bits, tables by groups of rows, and states
_OPSET, _SPECIFICATION = "CoreML8", 9
_MAX_ROWS = 16_384  # of one convolution on the Neural Engine
_PART_BYTES = 1 << 30  # of one package on it, about
# Powers of two that keep what is large within float16, and what is small above its subnormal numbers, which a unit may take as
# 0. Each is folded into weights and undone by a norm, so they cost no operation. That norm's eps has the square of it, and few
# digits are left of 1e-5 then: no smaller than needed.
_RESIDUAL = {0: 1 / 4, 24: 1 / 16}  # of the stream, from so many layers on (the rwkv package: by 2 after every 6 layers)
_KEY = 1 / 4  # relu(k)^2 leaves float16 beyond k = 255
_VALUES = 1 / 8  # in 5 and 6: what is remembered of values, where decays are slow; 7 erases what it writes over
_READ = 1 / 4  # in 5 and 6, of receptance: what is read of it is another sum of many
_EMBEDDING = 16.0  # its rows are small
_OF_VALUES = ("aa", "wkv")  # state tensors


@dataclass(frozen=True)
class Scales:
    """How large the graph keeps what norms take, in powers of two.

    residual  the stream
    values    state tensors of values
    heads     what is read of them, before the norm of every head
    """

    residual: float
    values: float
    heads: float

    @classmethod
    def of(cls, spec: Spec) -> "Scales":
        version = spec.version[0]
        residual = _RESIDUAL[max(n for n in _RESIDUAL if n <= spec.n_layer)]
        # 4 has no norm between what it remembers and the stream
        values = {"4": residual, "7": 1.0}.get(version, _VALUES)
        return cls(residual, values, values * (_READ if version in "56" else 1.0))


def factor(spec: Spec, name: str) -> float:
    """What a weight is multiplied by before it is stored: a power of two that cancels inside the graph."""
    scales = Scales.of(spec)
    ends = {
        "emb.weight": _EMBEDDING,
        ".ln0.weight": scales.residual,
        ".ln0.bias": scales.residual,
        ".ln_x.weight": scales.residual,
        ".ln_x.bias": scales.residual,
        ".r_k": scales.residual,
        ".ffn.value.weight": scales.residual / _KEY**2,
        ".att.value.weight": scales.values,
        ".att.receptance.weight": _READ if spec.version[0] in "56" else 1.0,
    }
    return next((f for end, f in ends.items() if name.endswith(end)), 1.0)


def held_eps(spec: Spec) -> dict[str, float]:
    """What float16 makes of the settings' eps: as the graph has them, without their scale."""
    scales = Scales.of(spec)
    at = {"norm_eps": scales.residual, "head_norm_eps": scales.heads, "out_norm_eps": scales.residual}
    return {name: _eps(eps, at[name]) / at[name] ** 2 for name, eps in spec.settings.items()}


def wkv_form(spec: Spec) -> str:
    """Which of a model's forms of the WKV is recorded: its own for float16, or the paper's line."""
    return "half_step" if "half_step" in model_of(spec.version).WKV else "step"


def state_about(spec: Spec, t: StateTensor) -> dict[str, float]:
    """What a manifest says of a state tensor: its first value, and what the graph's is multiplied by to be the model's."""
    return {"first": first_value(t), "factor": 1 / Scales.of(spec).values if t.name in _OF_VALUES else 1.0}


# --- what operations take ---


@dataclass(frozen=True)
class Const:
    """A small constant inside the graph; dtype by MIL's names."""

    dtype: str
    shape: Shape
    values: tuple[float | int | str | bool, ...]


@dataclass(frozen=True)
class Blob:
    """Rows of a weight as the graph sees them.

    what    "data"; "scales" of quantized rows; "whole": the weights themselves, which a constexpr makes of codes
    shape   as declared in the graph, of the same numbers in the same order
    """

    name: str
    recipe: Recipe
    rows: tuple[int, int]
    shape: Shape
    what: str = "whole"


@dataclass(frozen=True)
class Op:
    """An operation of the graph: its type, inputs by parameter, and outputs as (name, dtype, shape)."""

    type: str
    inputs: Mapping[str, "Ref | tuple[Ref, ...]"]
    outputs: tuple[tuple[str, str, Shape], ...]


Ref = str | Const | Blob  # a string names another operation's output


@dataclass(frozen=True)
class Parameter:
    """A weight by its name: becomes a constant when an operation takes it."""

    name: str
    shape: Shape
    recipe: Recipe

    __array_ufunc__ = None


class Value:
    """A traced tensor.

    shape  in ane (1, C, 1, T), by heads (1, H, N, T); in gpu (1, T, C), by heads (1, T, H, N); or a matrix (1, H, ., .)
    form   "tokens"  as said, or whatever the operation gives
           "packed"  means heads but is still whole channels: what goes by element needs no reshape
           "split"   is by heads
           "column"  is by heads with one number for each
    token  this token of it only; an operation by element on one token is recorded once for all of them
    sign   1 if nothing in it is below zero, -1 if nothing is above, 0 if that is not known
    constant  computed from weights alone
    """

    __array_ufunc__ = None  # or numpy would swallow `array + value`

    def __init__(
        self,
        f: "Mil",
        ref: Ref,
        shape: Shape,
        form: str = "tokens",
        *,
        token: int | None = None,
        sign: int = 0,
        constant: bool = False,
    ) -> None:
        self.f, self.ref, self.shape, self.form = f, ref, shape, form
        self.token, self.sign, self.constant = token, sign, constant

    def like(self, **changes: Any) -> "Value":
        """The same tensor, meant otherwise."""
        said = dict(form=self.form, token=self.token, sign=self.sign, constant=self.constant) | changes
        return Value(self.f, self.ref, self.shape, **said)

    def __add__(self, other: Any) -> "Value":
        return self.f.binary("add", self, other)

    def __radd__(self, other: Any) -> "Value":
        return self.f.binary("add", other, self)

    def __sub__(self, other: Any) -> "Value":
        return self.f.binary("sub", self, other)

    def __rsub__(self, other: Any) -> "Value":
        return self.f.binary("sub", other, self)

    def __mul__(self, other: Any) -> "Value":
        return self.f.binary("mul", self, other)

    def __rmul__(self, other: Any) -> "Value":
        return self.f.binary("mul", other, self)

    def __truediv__(self, other: Any) -> "Value":
        return self.f.binary("real_div", self, other)

    def __matmul__(self, other: Any) -> "Value":
        return self.f.matmul(self, other)

    def __neg__(self) -> "Value":
        return self.f.binary("mul", self, -1.0)


@dataclass(frozen=True)
class Decay:
    """A factor w in (0, 1] by its complement d = 1 - w: float16 knows nothing between 1 and .9995, and d to 3 digits."""

    d: Value


@dataclass(frozen=True)
class Change:
    """S + d, not yet added: what is small is summed up first, and S is rounded once.

    A state that is rounded to float16 after a slow decay is as it was before; together with what is written it moves.
    """

    S: Value
    d: Value

    __array_ufunc__ = None

    def __add__(self, other: Value) -> "Change":
        return Change(self.S, self.d + other)

    def __sub__(self, other: Value) -> "Change":
        return Change(self.S, self.d - other)

    def __rsub__(self, other: Any) -> Value:
        found: Value = other - self.made
        return found

    def __mul__(self, other: Value) -> Value:
        return self.made * other

    def __matmul__(self, other: Value) -> Value:
        return self.made @ other

    @property
    def made(self) -> Value:
        """The sum."""
        return self.S + self.d


class Mil:
    """Record operations of MIL.  Operations, their meaning and their shapes: rwkv_edge.ops.Numpy.

    The same operation on the same values is recorded once.
    """

    def __init__(self, spec: Spec, profile: str, T: int) -> None:
        self.wkv_form = wkv_form(spec)
        self.ane, self.T = profile == "ane", T
        self.C, self.H, self.N = spec.n_embd, spec.n_head, spec.head_size
        self.tables, self.scales = spec.tables, Scales.of(spec)
        self.ops: list[Op] = []
        self._named = 0
        self._memo: dict[Any, list[Value]] = {}
        self.channels, self.time = (1, 3) if self.ane else (2, 1)  # axes of what is (1, C, 1, T) or (1, T, C)
        self.within_head = 2 if self.ane else 3

    # --- recording ---

    def op(self, op: str, shape: Shape, form: str = "tokens", /, *, sign: int = 0, dtype: str = "fp16", **inputs: Any) -> Value:
        return self.op_n(op, (shape,), form, sign=sign, dtype=dtype, **inputs)[0]

    def op_n(
        self, op: str, shapes: Sequence[Shape], form: str = "tokens", /, *, sign: int = 0, dtype: str = "fp16", **inputs: Any
    ) -> list[Value]:
        values = [v for x in inputs.values() for v in (x if isinstance(x, tuple) else (x,)) if isinstance(v, Value)]
        assert all(v.token is None for v in values), op
        refs = {
            name.rstrip("_"): tuple(v.ref for v in x) if isinstance(x, tuple) else x.ref if isinstance(x, Value) else x
            for name, x in inputs.items()
        }
        key = (op, tuple(refs.items()), tuple(shapes))
        if key not in self._memo:
            n, self._named = self._named, self._named + 1
            names = [f"{op}_{n}" if len(shapes) == 1 else f"{op}_{n}_{i}" for i in range(len(shapes))]
            self.ops.append(Op(op, refs, tuple((o, dtype, s) for o, s in zip(names, shapes, strict=True))))
            constant = bool(values) and all(v.constant for v in values)
            self._memo[key] = [
                Value(self, o, s, form, sign=sign, constant=constant) for o, s in zip(names, shapes, strict=True)
            ]
        return [v.like(form=form, sign=sign) for v in self._memo[key]]

    def activation(self, T: int, C: int) -> Shape:
        return (1, C, 1, T) if self.ane else (1, T, C)

    def vector(self, p: Parameter) -> Value:
        """A vector for all tokens; one by heads (H, N) as channels, one number for every head (H,) as a column."""
        n = math.prod(p.shape)
        shape, form = self.activation(1, n), "tokens"
        if len(p.shape) == 2:
            form = "packed"
        elif n == self.H != self.C:
            shape, form = ((1, n, 1, 1) if self.ane else (1, 1, n, 1)), "column"
        return Value(self, _whole(p, shape), shape, form, constant=True)

    def value(self, x: Any) -> Value:
        if isinstance(x, Parameter):
            return self.vector(x)
        return x if isinstance(x, Value) else Value(self, _half(x), (), constant=True)

    def whole(self, x: Value) -> Value:
        """One token of a tensor as a tensor of its own."""
        if x.token is None:
            return x
        return self.cut(x.like(token=None), self.T, self.time)[x.token]

    def cut(self, x: Value, n: int, axis: int) -> list[Value]:
        """Cut an axis into n equal parts."""
        shape = tuple(s // n if i == axis else s for i, s in enumerate(x.shape))
        return self.op_n("split", [shape] * n, x.form, sign=x.sign, x=x, num_splits=_int(n), axis=_int(axis))

    def binary(self, op: str, x: Any, y: Any) -> "Value":
        if isinstance(y, Decay):
            assert op == "mul", op
            return Change(x, x * -y.d)  # type: ignore[return-value]
        a, b = self.value(x), self.value(y)
        tokens = {v.token for v in (a, b) if v.token is not None}
        if tokens and all(v.token is not None or v.constant for v in (a, b)) and len(tokens) == 1:
            (token,) = tokens  # for all tokens at once
            return self.binary(op, a.like(token=None), b.like(token=None)).like(token=token)
        a, b = self.whole(a), self.whole(b)
        forms = {v.form for v in (a, b)}
        if "column" in forms or forms == {"packed", "split"}:
            a, b = (v if v.form in ("column", "matrix") or v.shape == () else self.unpack(v) for v in (a, b))
        form = b.form if a.form in ("tokens", "column") and b.shape != () else a.form
        sign = 0
        if op == "mul":
            sign = a.sign * _sign(y) if _sign(y) else b.sign * _sign(x)
        return self.op(op, np.broadcast_shapes(a.shape, b.shape), form, sign=sign, x=a, y=b)

    def unary(self, op: str, x: Any, sign: int = 0) -> Value:
        x = self.value(x)
        return self.op(op, x.shape, x.form, sign=sign, x=x.like(token=None)).like(token=x.token)

    def matmul(self, x: Value, y: Value) -> Value:
        shape = (*np.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        if x.shape[-1] == 1:
            return self.op("mul", shape, "matrix", x=x, y=y)  # an outer product: no sum in it
        return self.op("matmul", shape, "matrix", x=x, y=y, transpose_x=_bool(False), transpose_y=_bool(False))

    def reshape(self, x: Value, shape: Shape, form: str = "tokens") -> Value:
        if x.shape == shape:
            return x.like(form=form)
        assert math.prod(shape) == math.prod(x.shape), (x.shape, shape)
        return self.op("reshape", shape, form, sign=x.sign, x=x, shape=_ints(shape))

    def transpose_axes(self, x: Value, perm: Sequence[int], form: str = "tokens") -> Value:
        return self.op("transpose", tuple(x.shape[i] for i in perm), form, sign=x.sign, x=x, perm=_ints(perm))

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        if (start, stop) == (0, x.shape[axis]):
            return x
        begin, end = [0] * len(x.shape), list(x.shape)
        begin[axis], end[axis] = start, stop
        shape = tuple(e - b for b, e in zip(begin, end, strict=True))
        return self.op("slice_by_index", shape, x.form, sign=x.sign, x=x, begin=_ints(begin), end=_ints(end))

    def concat(self, xs: Sequence[Value], axis: int) -> Value:
        if len(xs) == 1:
            return xs[0]
        shape = tuple(sum(x.shape[axis] for x in xs) if i == axis else n for i, n in enumerate(xs[0].shape))
        return self.op("concat", shape, xs[0].form, values=tuple(xs), axis=_int(axis), interleave=_bool(False))

    # --- matrices ---

    def embed(self, W: Parameter, tokens: Value) -> Value:
        C = W.shape[1]
        take: dict[str, Any] = dict(axis=_int(0), batch_dims=_int(0), validate_indices=_bool(False))
        rows = (0, W.shape[0])
        if W.recipe.block:
            # the row's codes, then its scale: a constexpr would make the whole table
            codes = Blob(W.name, W.recipe, rows, W.shape, "data")
            scales = Blob(W.name, W.recipe, rows, (W.shape[0], 1), "scales")
            x = self.op("gather", (self.T, C), dtype="int8", x=codes, indices=tokens, **take)
            x = self.op("cast", (self.T, C), x=x, dtype_=Const("string", (), ("fp16",)))
            x = x * self.op("gather", (self.T, 1), x=scales, indices=tokens, **take)
        else:
            x = self.op("gather", (self.T, C), x=_whole(W, W.shape), indices=tokens, **take)
        if self.ane and self.T > 1:
            x = self.transpose_axes(x, (1, 0))
        return self.reshape(x, self.activation(self.T, C))

    def table_rows(self, W: Parameter, tokens: Value) -> Value:
        i = self.tables.index(W.name)
        return self.slice(self.deep_embed, 1, i, i + 1)  # (T, 1, R R)

    def each_token_matmul(self, x: Value, M: Value) -> Value:
        R = math.isqrt(M.shape[-1])
        if self.ane:
            x = self.transpose_axes(x, (3, 2, 0, 1)) if self.T > 1 else x
        y = self.matmul(self.reshape(x, (self.T, 1, R)), self.reshape(M, (self.T, R, R)))
        if self.ane and self.T > 1:
            y = self.transpose_axes(y, (1, 2, 0))
        return self.reshape(y, self.activation(self.T, R))

    def linear(self, x: Value, W: Parameter, bias: Parameter | None = None) -> Value:
        n_out, n_in = W.shape
        T = x.shape[self.time]
        if not self.ane:
            b = _whole(bias, bias.shape) if bias else Blob("", Recipe(16), (0, n_out), (n_out,))  # zeros: it is not optional
            return self.op("linear", (1, T, n_out), x=x, weight=_whole(W, W.shape), bias=b)
        parts = []
        for start in range(0, n_out, _MAX_ROWS):
            stop = min(start + _MAX_ROWS, n_out)
            weight = Blob(W.name, W.recipe, (start, stop), (stop - start, n_in, 1, 1))
            given: dict[str, Any] = {"bias": Blob(bias.name, bias.recipe, (start, stop), (stop - start,))} if bias else {}
            parts.append(self.op("conv", (1, stop - start, 1, T), x=x, weight=weight, **given, **_POINTWISE))
        return self.concat(parts, 1)

    # --- along tokens ---

    def token_shift(self, x: Value, x_last: Value) -> tuple[Value, Value]:
        if self.T == 1:
            return x_last, x
        before = self.slice(x, self.time, 0, self.T - 1)
        return self.concat([x_last, before], self.time), self.slice(x, self.time, self.T - 1, self.T)

    def lerp(self, x: Value, p: Value, *mu: Parameter) -> tuple[Value, ...]:
        d = p - x
        return tuple(x + d * m for m in mu)

    def for_tokens(self, x: Value, like: Value) -> Value:
        return x

    def take_tokens(self, x: Value, positions: Value) -> Value:
        return self.slice(x, self.time, self.T - 1, self.T)

    def split(self, x: Value, n: int) -> list[Value]:
        return self.cut(x, n, self.channels)

    def rows(self, x: Value) -> Value:
        return self.reshape(x, (1, math.prod(x.shape)))

    # --- by element ---

    def sigmoid(self, x: Value) -> Value:
        return self.unary("sigmoid", x, sign=1)

    def tanh(self, x: Value) -> Value:
        return self.unary("tanh", x)

    def exp(self, x: Value | Parameter) -> "Value | Decay":
        x = self.value(x)
        if x.sign != -1:
            return self.unary("exp", x, sign=1)
        # 1 - e^x = 2 t / (1 + t) with t = tanh(-x / 2): no difference of two numbers near 1
        t = self.tanh(x * -0.5)
        return Decay(t / (1.0 + t) * 2.0)

    def larger(self, x: Value, y: Value) -> Value:
        return self.binary("maximum", x, y)

    def relu_squared(self, x: Value) -> Value:
        return self.unary("square", self.unary("relu", x) * _KEY)

    # --- norms ---

    def layer_norm(self, x: Value, weight: Parameter, bias: Parameter, *, eps: float) -> Value:
        given: dict[str, Any] = dict(gamma=_whole(weight, weight.shape), beta=_whole(bias, bias.shape))
        eps = _eps(eps, self.scales.residual)
        if weight.name == "blocks.0.ln0.weight":
            eps *= (_EMBEDDING / self.scales.residual) ** 2
        return self.op("layer_norm", x.shape, x=x, axes=_ints((self.channels,)), **given, epsilon=_half(eps))

    def head_norm(self, x: Value, weight: Parameter, bias: Parameter, *, eps: float) -> Value:
        T = x.shape[self.time]
        shape = (self.H, self.N, 1, T) if self.ane else (1, T, self.H, self.N)
        x = self.reshape(self.whole(x), shape)
        axes = _ints((1,) if self.ane else (3,))
        x = self.op("layer_norm", shape, x=x, axes=axes, epsilon=_half(_eps(eps, self.scales.heads)))
        x = self.reshape(x, self.activation(T, self.C))
        return (x * self.vector(weight) + self.vector(bias)).like(form="packed")

    def l2_normalize(self, x: Value, *, eps: float) -> Value:
        """Divided by the largest first: the sum of squares is then from 1 to N, and eps has nothing left to do. Where
        the largest is below float16's normal numbers, the sum is below 1, and still divides as it should."""
        x = self.unpack(x)
        axes, shape = _ints((self.within_head,)), self._reduced(x)
        largest = self.op("reduce_max", shape, "column", x=self.unary("abs", x), axes=axes, keep_dims=_bool(True))
        x = x / self.binary("maximum", largest, HALF_NORMAL)
        total = self.op("reduce_sum", shape, "column", x=self.unary("square", x), axes=axes, keep_dims=_bool(True))
        return x / self.unary("sqrt", self.binary("maximum", total, HALF_NORMAL))

    def sum(self, x: Value) -> Value:
        x = self.unpack(x)
        axes = _ints((self.within_head,))
        return self.op("reduce_sum", self._reduced(x), "column", x=x, axes=axes, keep_dims=_bool(True))

    def _reduced(self, x: Value) -> Shape:
        return tuple(1 if i == self.within_head else n for i, n in enumerate(x.shape))

    # --- by heads ---

    def heads(self, x: Value) -> Value:
        return x.like(form="packed")

    def by_heads(self, x: Parameter) -> Value:
        return self.vector(x)

    def unpack(self, x: Value) -> Value:
        if x.form in ("split", "column", "matrix"):
            return x
        T = x.shape[self.time]
        shape = (1, self.H, self.N, T) if self.ane else (1, T, self.H, self.N)
        return self.reshape(x.like(token=None), shape, "split").like(token=x.token)

    def merge_heads(self, x: Value) -> Value:
        return self.reshape(x, self.activation(self.T, self.C))

    # --- the WKV, token by token ---

    def each_token(self, one: Callable[..., tuple[Value, Any]], S: Any, *xs: Value) -> tuple[Value, Any]:
        ys = []
        for t in range(self.T):
            y, S = one(S, *(x if x.constant or self.T == 1 else x.like(token=t) for x in xs))
            S = S.made if isinstance(S, Change) else S
            ys.append(y)
        return self.concat(ys, self.time), S

    def row(self, x: "Value | Decay") -> Any:
        if isinstance(x, Decay):
            return Decay(self.row(x.d))
        return self._one_token(x, (1, self.H, 1, self.N), (0, 1, 3, 2) if self.ane else (0, 2, 1, 3), 2)

    def col(self, x: Value) -> Value:
        return self._one_token(x, (1, self.H, self.N, 1), None if self.ane else (0, 2, 3, 1), 3)

    def _one_token(self, x: Value, shape: Shape, perm: Sequence[int] | None, axis: int) -> Value:
        """Heads of one token as rows or columns: all tokens are turned at once, then cut."""
        if x.form == "column":
            return self.reshape(x, (1, self.H, 1, 1), "matrix")
        if x.token is None:
            return self.reshape(x, shape, "matrix")
        turned = self.unpack(x.like(token=None))
        if perm:
            turned = self.transpose_axes(turned, perm)
        return self.cut(turned, self.T, axis)[x.token].like(form="matrix")

    def uncol(self, x: Value) -> Value:
        return self.reshape(x, (1, self.H, self.N, 1) if self.ane else (1, 1, self.H, self.N), "split")

    deep_embed: Value  # set by `record`


_SMALLEST = 2.0**-24


def _eps(eps: float, scale: float) -> float:
    """For what is kept at a scale; never 0, for a token's numbers may all be the same."""
    return max(float(np.float16(eps * scale**2)), _SMALLEST)


def _sign(x: Any) -> int:
    return (x > 0) - (x < 0) if isinstance(x, (int, float)) else 0


def _half(x: float) -> Const:
    return Const("fp16", (), (float(np.float16(x)),))


def _int(x: int) -> Const:
    return Const("int32", (), (x,))


def _ints(xs: Sequence[int]) -> Const:
    return Const("int32", (len(xs),), tuple(xs))


def _bool(x: bool) -> Const:
    return Const("bool", (), (x,))


def _whole(p: Parameter, shape: Shape) -> Blob:
    return Blob(p.name, p.recipe, (0, p.shape[0]), shape)


_POINTWISE: dict[str, Any] = dict(
    strides=_ints((1, 1)), pad_type=Const("string", (), ("valid",)), pad=_ints((0, 0, 0, 0)), dilations=_ints((1, 1)),
    groups=_int(1),
)  # fmt: skip


# --- where every tensor lies in a package's file of weights ---


@dataclass(frozen=True)
class Place:
    """header  the record that a graph points at; it lies before the numbers"""

    offset: int
    nbytes: int
    header: bytes = b""


class Layout:
    """Records in one file of weights, in the order in which the functions read them.

    head    the first bytes of the file, known when all records are
    places  by weight, rows, and "data" or "scales"; the weight "" is zeros
    """

    def __init__(self) -> None:
        self.places: dict[tuple[str, tuple[int, int], str], Place] = {}
        self.end = mil.HEADER.size

    @property
    def head(self) -> bytes:
        return mil.HEADER.pack(len(self.places), 2, *[0] * 7)

    def place(self, b: Blob, what: str, inputs: int) -> int:
        """Give the offset of the record of a weight's rows; decide it if it is the first time."""
        key = (b.name, b.rows, what)
        if key not in self.places:
            dtype, nbytes = _stored(b, what, inputs)
            record = -(-self.end // 64) * 64
            at = record + mil.HEADER.size
            self.places[key] = Place(at, nbytes, mil.HEADER.pack(mil.SENTINEL, mil.BLOB_DTYPES[dtype], nbytes, at, *[0] * 5))
            self.end = at + nbytes
        return self.places[key].offset - mil.HEADER.size


def _stored(b: Blob, what: str, inputs: int) -> tuple[str, int]:
    """Dtype and bytes of a weight's rows, or of their scales or tables."""
    n = b.rows[1] - b.rows[0]
    r = b.recipe
    if what == "scales":
        return "fp16", 2 * (n // r.rows * 2**r.bits if r.rows else n * inputs // (r.block or 1))
    return code_dtype(r), n * inputs * r.bits // 8


def code_dtype(r: Recipe) -> str:
    """What a weight's numbers are in a file of weights, by MIL's names."""
    return f"uint{r.bits}" if r.rows else f"int{r.bits}" if r.block else f"fp{r.bits}"


# --- from a spec to packages ---


@dataclass
class Function:
    """The operations of one function of one package, its inputs and outputs as (name, dtype, shape).

    names   of the outputs, by what they are called inside
    packed  (name, shape) of the state that Core ML keeps, or None
    """

    ops: list[Op]
    inputs: list[tuple[str, str, Shape]]
    outputs: list[tuple[str, str, Shape]]
    names: dict[str, str]
    packed: tuple[str, Shape] | None


@dataclass
class Package:
    """A package that is not yet written: what a manifest says of its functions, the protobuf, and where weights lie."""

    file: str
    layout: Layout
    model: bytes = b""
    graphs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def weights(self) -> str:
        return f"{self.file}/{mil.WEIGHTS}"

    def files(self) -> dict[str, bytes]:
        """All files but the weights."""
        ids = [_uuid(self.model + end) for end in (b"model", b"weights")]
        items = {}
        for uuid, (path, what) in zip(
            ids, (("model.mlmodel", "CoreML Model Specification"), ("weights", "CoreML Model Weights")), strict=True
        ):
            author = "com.apple.CoreML"
            items[uuid] = {"author": author, "description": what, "name": path, "path": f"{author}/{path}"}
        said = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": ids[0]}
        return {
            f"{self.file}/Manifest.json": (json.dumps(said, indent=4) + "\n").encode(),
            f"{self.file}/{mil.MODEL}": self.model,
        }


def _uuid(data: bytes) -> str:
    """An id from the content, so that the same content gives the same bytes."""
    h = hashlib.sha256(data).hexdigest().upper()
    return "-".join((h[:8], h[8:12], h[12:16], h[16:20], h[20:32]))


class _Weights(Mapping[str, Parameter]):
    """The weights while a step is recorded: the first one of a layer, or of the head, marks where a package may end."""

    def __init__(self, f: Mil, spec: Spec, plan: Plan) -> None:
        self._f, self._spec, self._plan = f, spec, plan
        self.marks: dict[int, int] = {}

    def __getitem__(self, name: str) -> Parameter:
        place = (
            self._spec.n_layer if name == "ln_out.weight" else int(name.split(".")[1]) if name.endswith(".ln1.weight") else 0
        )
        if place:
            self.marks.setdefault(place, len(self._f.ops))
        return Parameter(name, self._spec.weights[name].shape, self._plan[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec.weights)

    def __len__(self) -> int:
        return len(self._spec.weights)


class _State(Mapping[str, Value]):
    """The state that goes in, each tensor in the part where it is asked for."""

    def __init__(self, f: Mil, spec: Spec, starts: Sequence[int], packed: bool) -> None:
        self._f, self._spec, self._starts, self._packed = f, spec, starts, packed

    def __getitem__(self, name: str) -> Value:
        f, shape = self._f, _inside(self._f, self._spec, name)
        if not self._packed:
            return f.reshape(Value(f, _input(name), _outside(f, self._spec, name)), shape, _form(shape))
        first = max(s for s in self._starts if s <= int(name.split(".")[0]))
        said = packing(self._spec, first, next((s for s in self._starts if s > first), self._spec.n_layer))
        whole = f.op("read_state", tuple(said["shape"]), input=f"state@{first}")
        layer, (start, stop) = int(name.split(".")[0]) - first, said["rows"][name.split(".")[1]]
        return f.reshape(f.slice(f.slice(whole, 0, layer, layer + 1), 1, start, stop), shape, _form(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec.state_tensors)

    def __len__(self) -> int:
        return len(self._spec.state_tensors)


def _input(name: str) -> str:
    return "state_" + name.replace(".", "_")


def _inside(f: Mil, spec: Spec, name: str) -> Shape:
    shape = spec.state_tensors[name].shape
    return (1, *shape) if len(shape) == 3 else f.activation(1, spec.n_embd)


def _outside(f: Mil, spec: Spec, name: str) -> Shape:
    """Vectors lie along the last axis: the Neural Engine pads what has one number there to 64 bytes."""
    shape = spec.state_tensors[name].shape
    return (1, *shape) if len(shape) == 3 else (1, 1, 1, spec.n_embd) if f.ane else (1, 1, spec.n_embd)


def _form(shape: Shape) -> str:
    return "matrix" if shape[-1] == shape[-2] != 1 else "tokens"


def first_value(t: StateTensor) -> float:
    """What a state tensor begins with in float16: RWKV-4's -1e30 would be an infinity, and e^-10000 is 0 as well."""
    return max(float(t.first), -1e4)


def split(spec: Spec, plan: Plan, profile: str, part_bytes: int | None = None) -> list[tuple[int, int]]:
    """The layer that begins each package, and the bytes of its weights; n_layer stands for the norm and the head.

    part_bytes  of a package, about; None is as much as the profile's unit takes
    """
    limit = part_bytes or (_PART_BYTES if profile == "ane" else 1 << 62)
    sizes = [0] * (spec.n_layer + 1)
    for name, w in spec.weights.items():
        if w.kind != "table":
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0 if w.kind == "embedding" else spec.n_layer
            sizes[layer] += plan[name].nbytes(w.shape)
    found = [(0, 0)]
    for i, n in enumerate(sizes):
        first, total = found[-1]
        if total and total + n > limit:
            found.append((i, n))
        else:
            found[-1] = (first, total + n)
    return found


def trace(spec: Spec, plan: Plan, *, profile: str, state: str, begins: Sequence[int]) -> list[Package]:
    """Record one step of a model as the two functions of one package, or of several, layer after layer.

    state       "explicit": every state tensor goes in and comes out; "packed": Core ML keeps one tensor
    begins      the layers that begin a package, the first of them 0: see `split`

    The same spec and plan give the same bytes, in any process.

    Raises  ExportError if coremltools is missing.
    """
    try:
        mil.messages()
    except BackendError as e:
        raise ExportError(str(e)) from e
    parts = [_record(spec, plan, profile, state == "packed", T, begins) for T in FUNCTIONS.values()]
    packages = []
    for i, first in enumerate(begins):
        package = Package("model.mlpackage" if len(begins) == 1 else f"part-{i + 1}.mlpackage", Layout())
        for (role, T), functions in zip(FUNCTIONS.items(), parts, strict=True):
            fn = functions[i]
            said = {
                "file": package.file,
                "function": role,
                "role": role,
                "part": i + 1,
                "parts": len(begins),
                "target": "coreml",
                "profile": profile,
                "wkv": wkv_form(spec),
                "T": T,
                "arithmetic": "float16",
                "scales": {"residual": Scales.of(spec).residual, "heads": Scales.of(spec).heads},
                "state": state,
                "inputs": [_said(x) for x in fn.inputs],
                "outputs": [_said(x) for x in fn.outputs],
                "needs": NEEDS,
            }
            if fn.packed:
                said["packed"] = packing(spec, first, min([*begins[i + 1 :], spec.n_layer]))
            package.graphs.append(said)
        package.model = _build(spec, {role: p[i] for role, p in zip(FUNCTIONS, parts, strict=True)}, package.layout)
        packages.append(package)
    return packages


_NAMES = {"fp16": "float16", "int32": "int32"}


def _said(x: tuple[str, str, Shape]) -> dict[str, Any]:
    name, dtype, shape = x
    return {"name": name, "dtype": _NAMES[dtype], "shape": list(shape)}


def _record(spec: Spec, plan: Plan, profile: str, packed: bool, T: int, begins: Sequence[int]) -> list[Function]:
    """Run the step once, and cut what it did into the parts."""
    f = Mil(spec, profile, T)
    tokens = Value(f, "tokens", (T,))
    rows = (T, len(spec.tables), spec.weights[spec.tables[0]].shape[1]) if spec.tables else ()
    f.deep_embed = Value(f, "deep_embed", rows)
    W = _Weights(f, spec, plan)
    logits, new = model_of(spec.version).step(f, W, spec, tokens, None, _State(f, spec, begins, packed))

    cuts = [W.marks[i] if i else 0 for i in begins] + [len(f.ops)]
    made = {name: (dtype, shape) for op in f.ops for name, dtype, shape in op.outputs}
    made |= {_input(n): ("fp16", _outside(f, spec, n)) for n in spec.state_tensors}
    made |= {"tokens": ("int32", (T,)), "deep_embed": ("fp16", rows)}
    functions: list[Function] = []
    carried: dict[str, str] = {}  # what one part makes and a later one takes, by its name inside
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        ops = f.ops[start:stop]
        own = {name for op in ops for name, _, _ in op.outputs}
        later = {r for op in f.ops[stop:] for r in _names(op)}
        going = [name for op in ops for name, _, _ in op.outputs if name in later]
        assert len(going) <= 2, going
        outputs: dict[str, Any] = {}
        if going:
            outputs |= {"hidden_out": going[-1]} | ({"v_first_out": going[0]} if going[1:] else {})
        if i + 1 == len(begins):
            outputs["logits"] = logits.ref
        first, last = begins[i], min([*begins[i + 1 :], spec.n_layer])
        mine = [n for n in spec.state_tensors if first <= int(n.split(".")[0]) < last]
        n_ops = len(f.ops)
        if packed and mine:
            said = packing(spec, first, last)
            per_layer = []
            for layer in range(first, last):
                width = said["shape"][2]
                flat = [
                    f.reshape(f.whole(new[n]), (1, math.prod(spec.state_tensors[n].shape) // width, width))
                    for n in (f"{layer}.{t.name}" for t in spec.state)
                ]
                per_layer.append(f.concat(flat, 1))
            whole = f.concat(per_layer, 0)
            f.ops.append(Op("write_state", {"input": f"state@{first}", "data": whole.ref}, ()))
        elif mine:
            for n in mine:
                outputs[f"{_input(n)}_out"] = f.reshape(new[n], _outside(f, spec, n)).ref
        tail, f.ops[n_ops:] = f.ops[n_ops:], []
        ops = ops + tail
        made |= {name: (dtype, shape) for op in tail for name, dtype, shape in op.outputs}
        own |= {name for op in tail for name, _, _ in op.outputs}
        assert len(set(outputs.values())) == len(outputs), "an output is used twice"
        takes = dict.fromkeys(r for op in ops for r in _names(op) if r not in own and not r.startswith("state@"))
        alias = {carried.get(r, r): r for r in takes}
        functions.append(
            Function(
                ops,
                [(outer, *made[inner]) for outer, inner in _ordered(alias)],
                [(outer, *made[inner]) for outer, inner in outputs.items()],
                {inner: outer for outer, inner in outputs.items()} | {inner: outer for outer, inner in alias.items()},
                (PACKED_STATE, tuple(packing(spec, first, last)["shape"])) if packed and mine else None,
            )
        )
        carried |= {
            inner: outer.removesuffix("_out") for outer, inner in outputs.items() if outer in ("hidden_out", "v_first_out")
        }
    return functions


def _ordered(alias: Mapping[str, str]) -> list[tuple[str, str]]:
    order = ["tokens", "hidden", "v_first", "deep_embed"]
    return sorted(alias.items(), key=lambda x: order.index(x[0]) if x[0] in order else len(order))


def _names(op: Op) -> Iterator[str]:
    for x in op.inputs.values():
        for ref in x if isinstance(x, tuple) else (x,):
            if isinstance(ref, str):
                yield ref


# --- the protobuf ---


def _build(spec: Spec, functions: Mapping[str, Function], layout: Layout) -> bytes:
    MIL, Model = mil.messages()
    model = Model.Model(specificationVersion=_SPECIFICATION)
    model.mlProgram.version = 1
    model.description.defaultFunctionName = next(iter(functions))
    model.description.metadata.shortDescription = f"RWKV-{spec.version}, one recurrent step"
    for role, fn in functions.items():
        about = model.description.functions.add(name=role)
        for features, values in ((about.input, fn.inputs), (about.output, fn.outputs)):
            for name, dtype, shape in values:
                array = features.add(name=name).type.multiArrayType
                array.shape.extend(shape)
                array.dataType = {"fp16": array.FLOAT16, "int32": array.INT32}[dtype]
        if fn.packed:
            array = about.state.add(name=fn.packed[0]).type.stateType.arrayType
            array.shape.extend(fn.packed[1])
            array.dataType = array.FLOAT16
        _Writer(MIL, model.mlProgram.functions[role], layout, spec).write(fn)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class _Writer:
    """Writes one function: constants where they are first used, then the operation."""

    def __init__(self, MIL: Any, function: Any, layout: Layout, spec: Spec) -> None:
        self.MIL, self.function, self.layout, self.spec = MIL, function, layout, spec
        function.opset = _OPSET
        self.block = function.block_specializations[_OPSET]
        self.known: dict[Ref, str] = {}

    def write(self, fn: Function) -> None:
        for name, dtype, shape in fn.inputs:
            self._type(self.function.inputs.add(name=name).type, dtype, shape)
        if fn.packed:
            kept = self.function.inputs.add(name=fn.packed[0]).type.stateType.wrappedType
            self._type(kept, "fp16", fn.packed[1])
        for n, op in enumerate(fn.ops):
            names = [(fn.names.get(name, name), dtype, shape) for name, dtype, shape in op.outputs]
            inputs = {
                param: [self._name(fn, r) for r in (x if isinstance(x, tuple) else (x,))] for param, x in op.inputs.items()
            }
            made = self._add(op.type, names[0][0] if names else f"{op.type}_{n}", names)
            for param, refs in inputs.items():
                for ref in refs:
                    made.inputs[param].arguments.add(name=ref)
        self.block.outputs.extend(name for name, _, _ in fn.outputs)

    def _add(self, type_: str, name: str, outputs: Sequence[tuple[str, str, Shape]]) -> Any:
        op = self.block.operations.add(type=type_)
        self._value(op.attributes["name"], Const("string", (), (name,)))
        for output, dtype, shape in outputs:
            self._type(op.outputs.add(name=output).type, dtype, shape)
        return op

    def _name(self, fn: Function, ref: Ref) -> str:
        if isinstance(ref, str):
            return PACKED_STATE if ref.startswith("state@") else fn.names.get(ref, ref)
        if ref not in self.known:
            self.known[ref] = self._const(ref) if isinstance(ref, Const) else self._weight(ref)
        return self.known[ref]

    def _const(self, c: Const) -> str:
        name = f"const_{len(self.known)}"
        op = self._add("const", name, [(name, c.dtype, c.shape)])
        self._value(op.attributes["val"], c)
        return name

    def _weight(self, b: Blob) -> str:
        name = "_".join([b.name.replace(".", "_") or "zeros", *([b.what] if b.what != "whole" else [])])
        if name in self.known.values():
            name = f"{name}_{len(self.known)}"
        r, n_in = b.recipe, math.prod(self.spec.weights[b.name].shape[1:]) if b.name else 1
        if b.what != "whole" or not (r.rows or r.block):
            dtype = "fp16" if b.what == "scales" else code_dtype(r)
            op = self._add("const", name, [(name, dtype, b.shape)])
            self._file(
                op.attributes["val"], dtype, b.shape, self.layout.place(b, "scales" if b.what == "scales" else "data", n_in)
            )
            return name
        trailing = (1,) * (len(b.shape) - 2)
        n = b.rows[1] - b.rows[0]
        if r.rows:
            op = self._add("constexpr_lut_to_dense", name, [(name, "fp16", b.shape)])
            second, shape = "lut", (n // r.rows, 1, *trailing, 2**r.bits, 1)
        else:
            assert r.block
            op = self._add("constexpr_blockwise_shift_scale", name, [(name, "fp16", b.shape)])
            second, shape = "scale", (n, n_in // r.block, *trailing)
        first = "indices" if r.rows else "data"
        self._file(op.inputs[first].arguments.add().value, code_dtype(r), b.shape, self.layout.place(b, "data", n_in))
        self._file(op.inputs[second].arguments.add().value, "fp16", shape, self.layout.place(b, "scales", n_in))
        return name

    def _type(self, t: Any, dtype: str, shape: Shape) -> None:
        t.tensorType.dataType = self._dtype(dtype)
        t.tensorType.rank = len(shape)
        for n in shape:
            t.tensorType.dimensions.add().constant.size = n

    def _dtype(self, dtype: str) -> int:
        number: int = self.MIL.DataType.Value(_PROTO_NAMES.get(dtype, dtype.upper()))
        return number

    def _value(self, value: Any, c: Const) -> None:
        self._type(value.type, c.dtype, c.shape)
        tensor = value.immediateValue.tensor
        match c.dtype:
            case "string":
                tensor.strings.values.extend(c.values)
            case "bool":
                tensor.bools.values.extend(c.values)
            case "int32":
                tensor.ints.values.extend(c.values)
            case _:
                tensor.bytes.values = np.array(c.values, "<f2").tobytes()

    def _file(self, value: Any, dtype: str, shape: Shape, offset: int) -> None:
        self._type(value.type, dtype, shape)
        value.blobFileValue.fileName = mil.AT_MODEL_PATH
        value.blobFileValue.offset = offset


_PROTO_NAMES = {"fp16": "FLOAT16", "fp32": "FLOAT32"}


# --- the bytes of tensors ---


def pack(x: npt.NDArray[np.float32] | QTensor | Lut) -> tuple[bytes, npt.NDArray[np.float16] | None]:
    """The bytes of a tensor's rows in a file of weights, and of its scales or tables."""
    if isinstance(x, Lut):
        return pack_bits(x.codes, x.bits), x.tables.astype("<f2")
    if isinstance(x, QTensor):
        return (x.codes.tobytes() if x.bits == 8 else pack_bits(x.codes.view(np.uint8), 4)), x.scales.astype("<f2")
    return x.astype("<f2").tobytes(), None
