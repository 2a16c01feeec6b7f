"""ONNX: F that records. Each operation appends a node; running a model's step once writes the graph.

The graph is for onnxruntime. Weights stay outside it, in one file that several graphs share.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..models import model_of
from ..qtensor import Plan, Recipe, packed_bytes
from ..spec import Shape, Spec

if TYPE_CHECKING:
    import onnx

OPSET = 21
MIN_ONNXRUNTIME = "1.25.1"  # the first wheels with com.microsoft.LinearAttention
WKV_FORMS = {
    "attention": "linear_attention",  # onnxruntime's operator: the fastest
    "plain": "chunk",  # plain operations only
    "step": "step",  # plain operations, one token a call
}
_PAGE, _LINE = 4096, 64

Part = tuple[str, str]  # a tensor's name, and "data" or "scales"


# --- where every tensor lies in the weights file ---


@dataclass(frozen=True)
class Place:
    offset: int
    nbytes: int


class Layout:
    """Places in one weights file, in the order in which the first graph reads them.

    Tensors that an operation takes together (the six mu of a layer) lie side by side, so that one initializer of the
    graph spans them while each keeps its own place.
    """

    def __init__(self, spec: Spec, plan: Plan) -> None:
        self.spec, self.plan = spec, plan
        self.places: dict[Part, Place] = {}
        self.end = 0

    @classmethod
    def of_tables(cls, spec: Spec, plan: Plan) -> "Layout":
        """The tables lie in a file of their own, one after the other."""
        layout = cls(spec, plan)
        for name in spec.tables:
            for what in ("data", "scales") if plan[name].block else ("data",):
                layout.place([(name, what)])
        return layout

    def place(self, parts: Sequence[Part]) -> Place:
        """Give the place of these parts, side by side; decide it if it is the first time."""
        sizes = [self._nbytes(part) for part in parts]
        if parts[0] not in self.places:
            total = sum(sizes)
            unit = _PAGE if total >= _PAGE else _LINE
            at = -(-self.end // unit) * unit
            for part, size in zip(parts, sizes, strict=True):
                self.places[part] = Place(at, size)
                at += size
            self.end = at
        first = self.places[parts[0]].offset
        assert [self.places[p].offset for p in parts] == [first + sum(sizes[:i]) for i in range(len(sizes))], parts
        return Place(first, sum(sizes))

    def _nbytes(self, part: Part) -> int:
        (name, what), shape = part, self.spec.weights[part[0]].shape
        recipe = self.plan[name]
        if recipe.block is None:
            return recipe.nbytes(shape)
        return packed_bytes(shape, recipe.bits, recipe.block)[what == "scales"]


# --- the graph while it is recorded ---


class Value:
    """A traced tensor.

    form  "tokens"  (1, T, C) or whatever the operation gives
          "packed"  means (1, T, H, N) but is still (1, T, C): what goes by element needs no reshape
          "split"   is (1, T, H, N)
          "column"  is (1, T, H, 1)
    """

    __array_ufunc__ = None  # or numpy would swallow `array + value`

    def __init__(self, f: "Onnx", name: str, form: str = "tokens") -> None:
        self.f, self.name, self.form = f, name, form

    def __add__(self, other: Any) -> "Value":
        return self.f.binary("Add", self, other)

    def __radd__(self, other: Any) -> "Value":
        return self.f.binary("Add", other, self)

    def __sub__(self, other: Any) -> "Value":
        return self.f.binary("Sub", self, other)

    def __rsub__(self, other: Any) -> "Value":
        return self.f.binary("Sub", other, self)

    def __mul__(self, other: Any) -> "Value":
        return self.f.binary("Mul", self, other)

    def __rmul__(self, other: Any) -> "Value":
        return self.f.binary("Mul", other, self)

    def __truediv__(self, other: Any) -> "Value":
        return self.f.binary("Div", self, other)

    def __matmul__(self, other: Any) -> "Value":
        return self.f.node("MatMul", self, other)

    def __neg__(self) -> "Value":
        return self.f.node("Neg", self, form=self.form)


@dataclass(frozen=True)
class Parameter:
    """A weight by its name: becomes an initializer when an operation takes it."""

    name: str
    shape: Shape
    recipe: Recipe

    __array_ufunc__ = None


@dataclass
class _Recording:
    """What will be the GraphProto."""

    nodes: list[tuple[str, str, list[str], list[str], dict[str, Any]]] = field(default_factory=list)
    external: dict[str, tuple[str, Shape, Place]] = field(default_factory=dict)
    inline: dict[str, tuple[str, Shape, tuple[float | int, ...]]] = field(default_factory=dict)


class Onnx:
    """Record operations as nodes.  Operations, their meaning and their shapes: rwkv_edge.ops.Numpy.

    The same operation on the same values is recorded once, so what layers share (masks, zeros) costs one node.

    exact  compute quantized matrix products in float32; otherwise activations are rounded to 8 bits in blocks, which
           is what makes them fast
    """

    def __init__(self, spec: Spec, layout: Layout, wkv: str, *, exact: bool) -> None:
        self.wkv_form = WKV_FORMS[wkv]
        self.max_tokens: int = model_of(spec.version).MAX_TOKENS[self.wkv_form]
        self.layout, self.exact = layout, exact
        self.C, self.H, self.N, self.V = spec.n_embd, spec.n_head, spec.head_size, spec.n_vocab
        self.tables = spec.tables
        self.table_width = spec.weights[spec.tables[0]].shape[1] if spec.tables else 0
        self.g = _Recording()
        self._memo: dict[Any, list[Value]] = {}

    # --- recording ---

    def node(self, op: str, *inputs: Any, form: str = "tokens", name: str | None = None, **attributes: Any) -> Value:
        return self.nodes(op, *inputs, n=1, form=form, name=name, **attributes)[0]

    def nodes(
        self, op: str, *inputs: Any, n: int, form: str = "tokens", name: str | None = None, **attributes: Any
    ) -> list[Value]:
        names = ["" if x is None else self.value(x).name for x in inputs]
        key = (op, tuple(names), n, repr(sorted(attributes.items())))
        if key not in self._memo:
            name = name or f"{op}_{len(self.g.nodes)}"
            outputs = [name] if n == 1 else [f"{name}.{i}" for i in range(n)]
            self.g.nodes.append((op, name, names, outputs, attributes))
            self._memo[key] = [Value(self, o, form) for o in outputs]
        return self._memo[key]

    def value(self, x: Any) -> Value:
        if isinstance(x, Parameter):
            return self.vector(x)
        return x if isinstance(x, Value) else self.constant((float(x),), ())

    def constant(self, values: Sequence[float | int], shape: Shape | None = None) -> Value:
        """A small constant inside the graph: floats, or int64."""
        dtype = "F32" if isinstance(values[0], float) else "I64"
        shape = (len(values),) if shape is None else shape
        name = f"{dtype}{list(shape)}{list(values)}" if len(values) <= 8 else f"{dtype}{list(shape)}_{len(self.g.inline)}"
        for known, content in self.g.inline.items():
            if content == (dtype, shape, tuple(values)):
                return Value(self, known)
        self.g.inline[name] = (dtype, shape, tuple(values))
        return Value(self, name)

    def weight(self, name: str, dtype: str, shape: Shape, *parts: Part) -> Value:
        """An initializer over these parts of the weights file."""
        self.g.external[name] = (dtype, shape, self.layout.place(parts))
        return Value(self, name)

    def vector(self, *ps: Parameter, shape: Shape | None = None) -> Value:
        name = ps[0].name if len(ps) == 1 else f"{ps[0].name}+{len(ps) - 1}"
        shape = shape or ps[0].shape
        return self.weight(name, "F32", shape, *((p.name, "data") for p in ps))

    def binary(self, op: str, x: Any, y: Any) -> Value:
        a, b = (self.head_vector(z) if isinstance(z, Parameter) else self.value(z) for z in (x, y))
        if "column" in (a.form, b.form):
            a, b = (z if z.form == "column" else self.unpack(z) for z in (a, b))
            return self.node(op, a, b, form="split")
        if {a.form, b.form} == {"packed", "split"}:
            a, b = self.pack(a), self.pack(b)
        return self.node(op, a, b, form=b.form if a.form == "tokens" else a.form)

    def head_vector(self, p: Parameter) -> Value:
        """Vectors, and those by heads (H, N), as (C,): packed values take them as they are."""
        return self.vector(p, shape=(self.C,)) if len(p.shape) == 2 else self.vector(p)

    def reshape(self, x: Value, *shape: int, form: str = "tokens") -> Value:
        return self.node("Reshape", x, self.constant(shape), form=form)

    def slice(self, x: Value, start: int | Value, stop: int | Value, axis: int, form: str = "tokens") -> Value:
        ends = [e if isinstance(e, Value) else self.constant((e,)) for e in (start, stop)]
        return self.node("Slice", x, *ends, self.constant((axis,)), form=form)

    # --- matrices ---

    def embed(self, W: Parameter, tokens: Value) -> Value:
        indices = self.reshape(tokens, 1, -1)
        if W.recipe.block:
            codes = self.weight(W.name, "U8", W.shape, (W.name, "data"))
            scales = self._scales(W)
            return self.node(
                "GatherBlockQuantized",
                codes,
                indices,
                scales,
                bits=8,
                block_size=W.recipe.block,
                gather_axis=0,
                quantize_axis=1,
            )
        if W.recipe.bits == 16:
            return self.node("Cast", self.node("Gather", self._half(W), indices, axis=0), to=1)
        return self.node("Gather", self.vector(W), indices, axis=0)

    def table_rows(self, W: Parameter, tokens: Value) -> Value:
        return self.node("Gather", self.deep_embed, self.constant((self.tables.index(W.name),), ()), axis=1)

    def each_token_matmul(self, x: Value, M: Value) -> Value:
        R = math.isqrt(self.table_width)
        y = self.node("MatMul", self.reshape(x, -1, 1, R), self.reshape(M, -1, R, R))
        return self.reshape(y, 1, -1, R)

    def linear(self, x: Value, W: Parameter, bias: Parameter | None = None) -> Value:
        b = None if bias is None else self.vector(bias)
        if W.recipe.block:
            n_out, n_in = W.shape
            bits, block = W.recipe.bits, W.recipe.block
            shape = (n_out, -(-n_in // block), block * bits // 8)
            codes = self.weight(W.name, "U8", shape, (W.name, "data"))
            inputs = [x, codes, self._scales(W)] + ([] if b is None else [None, None, b])
            level = 0 if self.exact else 4
            return self.node(
                "MatMulNBits",
                *inputs,
                name=f"{W.name}/linear",
                K=n_in,
                N=n_out,
                bits=bits,
                block_size=block,
                accuracy_level=level,
            )
        w = self.node("Cast", self._half(W), to=1) if W.recipe.bits == 16 else self.vector(W)
        y = self.node("FusedMatMul", x, w, name=f"{W.name}/linear", transB=1)
        return y if b is None else self.node("Add", y, b)

    def _scales(self, W: Parameter) -> Value:
        assert W.recipe.block
        shape = (W.shape[0], -(-W.shape[1] // W.recipe.block))
        return self.weight(f"{W.name}.scales", "F32", shape, (W.name, "scales"))

    def _half(self, W: Parameter) -> Value:
        return self.weight(W.name, "F16", W.shape, (W.name, "data"))

    # --- along tokens ---

    def token_shift(self, x: Value, x_last: Value) -> tuple[Value, Value]:
        if self.max_tokens == 1:
            return x_last, x
        joined = self.node("Concat", self.pack(x_last) if x.form == "packed" else x_last, x, axis=1)
        return self.slice(joined, 0, -1, 1, form=x.form), self.slice(joined, -1, _INT64_MAX, 1, form=x.form)

    def lerp(self, x: Value, p: Value, *mu: Parameter) -> tuple[Value, ...]:
        d = self.node("Sub", p, x)
        if len(mu) == 1:
            return (self.node("Add", x, self.node("Mul", d, self.vector(mu[0]))),)
        stacked = self.vector(*mu, shape=(len(mu), 1, self.C))  # one product for all of them
        z = self.node("Add", x, self.node("Mul", d, stacked))
        return tuple(self.nodes("Split", z, n=len(mu), axis=0, num_outputs=len(mu)))

    def next_token(self, x: Value) -> Value:
        x = self.pack(x)
        joined = self.node("Concat", x, self.first_token(x), axis=1, form="packed")
        return self.slice(joined, 1, _INT64_MAX, 1, form="packed")

    def first_token(self, x: Value) -> Value:
        return self.slice(self.pack(x), 0, 1, 1, form="packed")

    def for_tokens(self, x: Value, like: Value) -> Value:
        return self.node("Expand", self.reshape(x, 1, 1, -1), self.node("Shape", self.pack(like)), form="packed")

    def take_tokens(self, x: Value, positions: Value) -> Value:
        return self.node("Gather", x, positions, axis=1)

    def split(self, x: Value, n: int) -> list[Value]:
        return self.nodes("Split", x, n=n, axis=-1, num_outputs=n)

    def rows(self, x: Value) -> Value:
        return self.reshape(x, -1, self.V)

    # --- by element ---

    def sigmoid(self, x: Value) -> Value:
        return self.node("Sigmoid", x, form=x.form)

    def tanh(self, x: Value) -> Value:
        return self.node("Tanh", x, form=x.form)

    def exp(self, x: Value | Parameter) -> Value:
        x = self.value(x)
        return self.node("Exp", x, form=x.form)

    def log(self, x: Value) -> Value:
        return self.node("Log", x, form=x.form)

    def maximum(self, x: Value, floor: float) -> Value:
        return self.node("Max", x, floor, form=x.form)

    def larger(self, x: Value, y: Value) -> Value:
        return self.binary("Max", x, y)

    def relu_squared(self, x: Value) -> Value:
        x = self.node("Relu", x)
        return self.node("Mul", x, x)

    def fill_like(self, x: Value, value: float) -> Value:
        return self._for_each_token((value,), self.C)

    def _for_each_token(self, values: Sequence[float], width: int) -> Value:
        """These values for every token: (1, T, width)."""
        shape = self.node("Concat", self.constant((1,)), self.node("Shape", self.tokens), self.constant((width,)), axis=0)
        return self.node("Expand", self.constant(tuple(values), (1, 1, len(values))), shape, form="packed")

    # --- norms ---

    def layer_norm(self, x: Value, weight: Parameter, bias: Parameter, *, eps: float) -> Value:
        return self.node("LayerNormalization", x, self.vector(weight), self.vector(bias), axis=-1, epsilon=eps)

    def head_norm(self, x: Value, weight: Parameter, bias: Parameter, *, eps: float) -> Value:
        shape = (self.H, self.N)
        w, b = self.vector(weight, shape=shape), self.vector(bias, shape=shape)
        return self.node("LayerNormalization", self.unpack(x), w, b, axis=-1, epsilon=eps, form="split")

    def l2_normalize(self, x: Value, *, eps: float) -> Value:
        x = self.unpack(x)
        norm = self.node("ReduceL2", x, self.constant((-1,)), keepdims=1)
        return self.node("Div", x, self.node("Max", norm, eps), form="split")

    def sum(self, x: Value) -> Value:
        return self.node("ReduceSum", self.unpack(x), self.constant((-1,)), keepdims=1, form="column")

    # --- by heads ---

    def heads(self, x: Value) -> Value:
        return Value(self, x.name, "packed")

    def by_heads(self, x: Parameter) -> Value:
        if len(x.shape) == 2:
            return self.head_vector(x)
        per_head = self.vector(x, shape=(self.H, 1))
        return self.reshape(self.node("Expand", per_head, self.constant((self.H, self.N))), self.C)

    def unpack(self, x: Value) -> Value:
        return x if x.form == "split" else self.reshape(x, 1, -1, self.H, self.N, form="split")

    def pack(self, x: Value) -> Value:
        return x if x.form == "packed" else self.reshape(x, 1, -1, self.C, form="packed")

    def merge_heads(self, x: Value) -> Value:
        return Value(self, self.pack(x).name)

    def heads_first(self, x: Value) -> Value:
        if x.form == "tokens":  # (1, H, T, N), from here
            return self.node("Transpose", x, perm=[0, 2, 1, 3], form="split")
        return self.node("Transpose", self.unpack(x), perm=[0, 2, 1, 3])

    # --- the WKV, step by step: one token a call ---

    def each_token(self, one: Callable[..., tuple[Value, Value]], S: Value, *xs: Value) -> tuple[Value, Value]:
        return one(S, *xs)

    def row(self, x: Value) -> Value:
        return self.reshape(x, 1, self.H, 1, self.N)

    def col(self, x: Value) -> Value:
        return self.reshape(x, 1, self.H, self.N, 1)

    def uncol(self, x: Value) -> Value:
        return self.reshape(x, 1, 1, self.H, self.N, form="split")

    # --- the WKV, in chunks: (1, H, T, N) ---

    def transpose(self, x: Value) -> Value:
        return self.node("Transpose", x, perm=[0, 1, 3, 2])

    def cumsum(self, x: Value, *, exclusive: bool = False, reverse: bool = False) -> Value:
        return self.node("CumSum", x, self.constant((2,), ()), exclusive=int(exclusive), reverse=int(reverse))

    def last_token(self, x: Value) -> Value:
        return self.slice(x, -1, _INT64_MAX, 2)

    def tril(self, x: Value, k: int) -> Value:
        return self.node("Mul", x, self._mask(lambda i, j: j - i <= k))

    def invert_unit_lower(self, A: Value) -> Value:
        X, s = self._mask(lambda i, j: i == j), 1
        while s < self.max_tokens:
            join = self._mask(_join(s))
            X = self.node("Sub", X, self.node("MatMul", self.node("MatMul", X, self.node("Mul", A, join)), X))
            s *= 2
        return X

    def decayed_products(self, r: Value, k: Value, ln_w: Value) -> Value:
        decay = self.node("Exp", self.node("MatMul", self._between(inclusive=False), self.pack(ln_w)))  # (T, T, C)
        by_token = self.reshape(self.pack(r), -1, 1, self.C)
        products = self.node("Mul", self.node("Mul", by_token, self.pack(k)), decay)
        summed = self.node("ReduceSum", self.reshape(products, 0, 0, self.H, self.N), self.constant((-1,)), keepdims=0)
        return self.tril(self.node("Transpose", summed, perm=[2, 0, 1]), -1)

    def _mask(self, where: Callable[[int, int], bool]) -> Value:
        """Ones where the condition on row and column holds, (T, T)."""
        n = range(self.max_tokens)
        return self._cropped([float(where(i, j)) for i in n for j in n], 2)

    def _between(self, *, inclusive: bool) -> Value:
        """Ones for the tokens j that decay what s wrote until t reads it, s < j < t or s < j <= t: (T, T, T) by t, s, j."""
        n = range(self.max_tokens)
        return self._cropped([float(s < j < t + inclusive) for t in n for s in n for j in n], 3)

    def _cropped(self, values: Sequence[float], rank: int) -> Value:
        """A constant for the most tokens, cut to as many as there are on every axis."""
        x = self.constant(values, (self.max_tokens,) * rank)
        for axis in range(rank):
            x = self.slice(x, 0, self.node("Shape", self.tokens), axis)
        return x

    # --- the WKV, as linear attention ---

    def interleave(self, x: Value, y: Value) -> Value:
        return self.reshape(self.node("Concat", self.pack(x), self.pack(y), axis=2), 1, -1, self.C, form="packed")

    def every_second(self, x: Value) -> Value:
        return self.slice(self.reshape(x, 1, -1, 2 * self.C), self.C, _INT64_MAX, 2, form="packed")

    def gated_delta(
        self, S: Value, *, query: Value, key: Value, value: Value, log_decay: Value, beta: tuple[float, float]
    ) -> tuple[Value, Value]:
        b = self.reshape(self._for_each_token(beta, 2), 1, -1, 1)
        y, S = self.nodes(
            "LinearAttention",
            *(query, key, value, S, log_decay, b),
            n=2,
            q_num_heads=self.H,
            kv_num_heads=self.H,
            scale=1.0,
            update_rule="gated_delta",
        )
        return Value(self, y.name, "packed"), S

    def gated(self, S: Value, *, query: Value, key: Value, value: Value, log_decay: Value) -> tuple[Value, Value]:
        inputs = (self.pack(x) for x in (query, key, value))
        y, S = self._linear_attention(*inputs, S, self.pack(log_decay), heads=self.H)
        return Value(self, y.name, "packed"), S

    def _linear_attention(self, *inputs: Value, heads: int) -> list[Value]:
        return self.nodes(
            "LinearAttention", *inputs, n=2, q_num_heads=heads, kv_num_heads=heads, scale=1.0, update_rule="gated"
        )

    # --- decayed sums by channel ---

    def running_max(self, k: Value, w: Value, p: Value) -> Value:
        x = self.node("Concat", p, k, axis=1)
        n, d = self.max_tokens + 1, 1
        until = self.node("Add", self.node("Shape", self.tokens), self.constant((1,)))
        while d < n:
            # so far x_t is the largest of d tokens; before the first one it stands again, decayed for longer: never larger
            back = self.slice(self.constant([max(t - d, 0) for t in range(n)]), 0, until, 0)
            x = self.node("Max", x, self.node("Add", self.node("Gather", x, back, axis=1), self.node("Mul", w, d)))
            d *= 2
        return self.slice(x, 1, _INT64_MAX, 1)

    def decayed_sums(self, a: Value, b: Value, log_decay: Value, key: Value, value: Value) -> tuple[Value, Value]:
        decay = self.node("Exp", self.node("MatMul", self._between(inclusive=True), log_decay))  # (T, T, C)
        n = range(self.max_tokens)
        past = self._cropped([float(s <= t) for t in n for s in n], 2)
        decay = self.node("Mul", decay, self.node("Unsqueeze", past, self.constant((2,))))
        first = self.node("Exp", self.node("CumSum", log_decay, self.constant((1,), ())))

        def total(x: Value, first_sum: Value) -> Value:
            summed = self.node("ReduceSum", self.node("Mul", decay, x), self.constant((1,)), keepdims=0)
            return self.node("Add", self.node("Mul", first, first_sum), self.reshape(summed, 1, -1, self.C))

        return total(self.node("Mul", key, value), a), total(key, b)

    def decayed_sums_gated(self, a: Value, b: Value, log_decay: Value, key: Value, value: Value) -> tuple[Value, Value]:
        ones = self._for_each_token((1.0,), self.C)
        pairs = self.node("Concat", *(self.reshape(x, 1, -1, self.C, 1) for x in (value, ones)), axis=3)
        S = self.node("Concat", *(self.reshape(x, 1, self.C, 1, 1) for x in (a, b)), axis=3)
        y, _ = self._linear_attention(ones, key, self.reshape(pairs, 1, -1, 2 * self.C), S, log_decay, heads=self.C)
        halves = self.nodes("Split", self.reshape(y, 1, -1, self.C, 2), n=2, axis=3, num_outputs=2)
        after_a, after_b = (self.reshape(x, 1, -1, self.C) for x in halves)
        return after_a, after_b

    tokens: Value  # the graph's inputs, set by `trace`
    deep_embed: Value


def _join(s: int) -> Callable[[int, int], bool]:
    """The blocks below the diagonal that join two inverted blocks of size s into one."""
    return lambda i, j: i // (2 * s) == j // (2 * s) and i // s > j // s


_INT64_MAX = (1 << 63) - 1
_CONTRIB = {"MatMulNBits", "GatherBlockQuantized", "FusedMatMul", "LinearAttention"}


# --- from a spec to a file ---


@dataclass(frozen=True)
class Graph:
    """A traced step: the file's bytes, and what a manifest says of them."""

    data: bytes
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Recorded:
    """A step's operations, and what a manifest says of the graph that they make."""

    g: _Recording
    about: dict[str, Any]
    names: Mapping[str, str]  # of the outputs, by what they are called inside

    @property
    def nbytes(self) -> int:
        """About the bytes of the graph's file: within 1 %."""
        g, domain = self.g, "com.microsoft"
        nodes = sum(
            sum(len(s) + 2 for s in (op, name, *ins, *outs)) + 3 + sum(map(_attribute, attributes.items()))
            + (op in _CONTRIB) * (len(domain) + 2)
            for op, name, ins, outs, attributes in g.nodes
        )  # fmt: skip
        external = sum(len(n) + len(f"{at.offset}{at.nbytes}") + 3 * len(s) + 58 for n, (_, s, at) in g.external.items())
        inline = sum(len(n) + 10 + len(v) * (4 if d == "F32" else 1) for n, (d, _, v) in g.inline.items())
        values = sum(len(v["name"]) + 12 + 5 * len(v["shape"]) for v in self.about["inputs"] + self.about["outputs"])
        return nodes + external + inline + values


def _attribute(item: tuple[str, Any]) -> int:
    name, value = item
    return len(name) + 8 + (len(value) if isinstance(value, (str, list, tuple)) else 2)


def record(spec: Spec, plan: Plan, layout: Layout, *, wkv: str, exact: bool) -> Recorded:
    """Run one step of a model and write down its operations; the layout of the weights is filled in.

    The same spec and plan give the same operations, in any process.
    """
    f = Onnx(spec, layout, wkv, exact=exact)
    C, H, N = spec.n_embd, spec.n_head, spec.head_size
    W = {name: Parameter(name, w.shape, plan[name]) for name, w in spec.weights.items()}
    state_shapes = {n: (1, H, N, N) if len(t.shape) == 3 else (1, 1, C) for n, t in spec.state_tensors.items()}

    f.tokens, positions, f.deep_embed = Value(f, "tokens"), Value(f, "positions"), Value(f, "deep_embed")
    state = {name: Value(f, f"state.{name}") for name in state_shapes}
    logits, new = model_of(spec.version).step(f, W, spec, f.tokens, positions, state)

    names = {logits.name: "logits"} | {new[name].name: f"state.{name}.out" for name in state_shapes}
    assert len(names) == 1 + len(new), "an output is used twice"

    T: str | int = 1 if f.max_tokens == 1 else "T"
    layout_of_wkv = "key,value" if f.wkv_form == "linear_attention" else "value,key"

    def about(name: str, dtype: str, shape: Sequence[str | int]) -> dict[str, Any]:
        said: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(shape)}
        return said | {"layout": layout_of_wkv} if ".wkv" in name else said

    inputs = [about("tokens", "int64", [T]), about("positions", "int64", ["P"])]
    if spec.tables:
        inputs.append(about("deep_embed", "float32", [T, len(spec.tables), f.table_width]))
    inputs += [about(f"state.{n}", "float32", s) for n, s in state_shapes.items()]
    outputs = [about("logits", "float32", ["P", spec.n_vocab])]
    outputs += [about(f"state.{n}.out", "float32", s) for n, s in state_shapes.items()]
    quantized = any(r.block for r in plan.values())
    said = {
        "target": "onnx",
        "profile": "cpu",
        "wkv": wkv,
        "T": f.max_tokens,
        "arithmetic": "int8 activations" if quantized and not exact else "exact",
        "inputs": inputs,
        "outputs": outputs,
        "needs": {"onnxruntime": MIN_ONNXRUNTIME},
    }
    return Recorded(f.g, said, names)


def trace(spec: Spec, plan: Plan, layout: Layout, *, wkv: str, exact: bool, weights_file: str) -> Graph:
    """Record one step of a model as an ONNX graph over `weights_file`, whose layout is filled in.

    The same spec and plan give the same bytes, in any process.

    Raises  ExportError if the onnx package is missing.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as e:
        raise ExportError("exporting needs the onnx package: pip install 'rwkv-edge[export]'") from e
    recorded = record(spec, plan, layout, wkv=wkv, exact=exact)
    g, about = recorded.g, recorded.about

    def rename(values: list[str]) -> list[str]:
        return [recorded.names.get(v, v) for v in values]

    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    dtypes = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "U8": TensorProto.UINT8, "I64": TensorProto.INT64}

    def info(v: dict[str, Any]) -> "onnx.ValueInfoProto":
        return helper.make_tensor_value_info(v["name"], types[v["dtype"]], v["shape"])

    graph = helper.make_graph(
        [
            helper.make_node(
                op, rename(ins), rename(outs), name=name, domain="com.microsoft" if op in _CONTRIB else "", **attributes
            )
            for op, name, ins, outs, attributes in g.nodes
        ],
        "rwkv_step",
        [info(v) for v in about["inputs"]],
        [info(v) for v in about["outputs"]],
        [helper.make_tensor(n, dtypes[d], s, vals) for n, (d, s, vals) in g.inline.items()]
        + [_external(onnx, n, dtypes[d], s, at, weights_file) for n, (d, s, at) in g.external.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="rwkv-edge")
    return Graph(model.SerializeToString(deterministic=True), about)


def _external(onnx: Any, name: str, dtype: int, shape: Shape, place: Place, file: str) -> "onnx.TensorProto":
    t = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", place.offset), ("length", place.nbytes)):
        t.external_data.add(key=key, value=str(value))
    return t
