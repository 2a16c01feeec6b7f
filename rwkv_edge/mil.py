"""MIL, the language of Core ML's packages: its files, and an interpreter of them in numpy.

The interpreter reads a package as it lies on disk, protobuf and file of weights, and computes every operation itself. It
knows nothing of how a package is made; so what it computes is what the file says. Each result is held against the type
that the file declares.

Source  coremltools 9.0, proto/MIL.proto; MILBlob's StorageFormat.hpp; the operations' documentation there (iOS 15 to 18)
"""

import contextlib
import functools
import importlib.util
import itertools
import logging
import math
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BackendError, BundleError
from .qtensor import HALF_NORMAL
from .unpacking import codes_of, signed

Array = npt.NDArray[Any]

# a record in a file of weights: sentinel, dtype, bytes, offset of the numbers, bits of padding, 4 unused; the file itself
# begins with the number of records and its version in the same form
HEADER, SENTINEL = struct.Struct("<II7Q"), 0xDEADBEEF
BLOB_DTYPES = {"fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "int4": 8, "uint4": 11, "uint6": 13}
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
AT_MODEL_PATH = "@model_path/weights/weight.bin"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """coremltools speaks at import, of what is missing on Linux and of versions of torch: to nobody's use."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@functools.cache
def messages() -> tuple[Any, Any]:
    """The protobuf messages MIL_pb2 and Model_pb2, of coremltools; the rest of which, 4 seconds of imports, is left alone.

    Raises  BackendError if coremltools is missing.
    """
    advice = "pip install 'rwkv-edge[coreml]'"
    try:
        found = importlib.util.find_spec("coremltools")
    except ValueError:  # it stands in sys.modules, but not as a package
        found = None
    if found is None or not found.submodule_search_locations:
        raise BackendError(f"Core ML needs coremltools: {advice}")
    folder = Path(found.submodule_search_locations[0], "proto")
    name = "_rwkv_edge_coremltools_proto"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    try:
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return importlib.import_module(f"{name}.MIL_pb2"), importlib.import_module(f"{name}.Model_pb2")
    except Exception as e:  # a protobuf of another release raises anything
        raise BackendError(f"Core ML needs coremltools, which cannot be read here ({e}): {advice}") from e


# --- reading a package ---

_DTYPES: dict[int, tuple[str, npt.DTypeLike]] = {
    1: ("bool", np.bool_),
    2: ("string", np.str_),
    10: ("fp16", np.float16),
    11: ("fp32", np.float32),
    21: ("int8", np.int8),
    23: ("int32", np.int32),
    25: ("int4", np.int8),
    35: ("uint4", np.uint8),
    38: ("uint6", np.uint8),
}
_BITS = {"fp16": 16, "fp32": 32, "int8": 8, "int4": 4, "uint4": 4, "uint6": 6}


class Package:
    """A package on disk: its functions, and its weights as arrays that are read when they are needed.

    path  the .mlpackage folder

    Raises  BundleError if it is not readable as one; BackendError if coremltools is missing.
    """

    def __init__(self, path: Path) -> None:
        _, Model = messages()
        self.path = path
        try:
            self.model = Model.Model.FromString((path / MODEL).read_bytes())
            self._weights = np.memmap(path / WEIGHTS, np.uint8, mode="r")
        except Exception as e:  # protobuf's DecodeError is of no public class
            raise BundleError(f"{path} cannot be read as a Core ML package: {e}") from e

    def value(self, value: Any) -> Any:
        """The content of a Value message: an array, a text, or a tuple of texts.

        Integers of 4 and 6 bits come as int8 and uint8.
        """
        t = value.type.tensorType
        shape = tuple(d.constant.size for d in t.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            name, dtype = self._dtype(t.dataType)
            return self._blob(value.blobFileValue, name, np.dtype(dtype), shape)
        tensor = value.immediateValue.tensor
        match tensor.WhichOneof("value"):
            case "strings":
                (text,) = tensor.strings.values
                return text
            case "ints":
                return np.array(tensor.ints.values, np.int32).reshape(shape)
            case "bools":
                return np.array(tensor.bools.values, np.bool_).reshape(shape)
            case "bytes":
                return np.frombuffer(tensor.bytes.values, self._dtype(t.dataType)[1]).reshape(shape)
        raise BundleError(f"{self.path} holds a constant of a kind that nothing here writes")

    def _dtype(self, number: int) -> tuple[str, npt.DTypeLike]:
        if number not in _DTYPES:
            raise BundleError(f"{self.path} holds a tensor of MIL's type {number}, which nothing here writes")
        return _DTYPES[number]

    def _blob(self, place: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        at, n_bits = place.offset, int(np.prod(shape)) * _BITS[name]
        if place.fileName != AT_MODEL_PATH or at % 64 or not 0 < at <= len(self._weights) - HEADER.size:
            raise BundleError(f"{self.path} points at {place.fileName}, byte {at}, where no record can be")
        sentinel, code, nbytes, offset, *_ = HEADER.unpack(self._weights[at : at + HEADER.size].tobytes())
        found = (sentinel, code, nbytes)
        if found != (SENTINEL, BLOB_DTYPES[name], n_bits // 8) or offset + nbytes > len(self._weights):
            raise BundleError(f"{self.path}: the record at byte {at} is not of {name} {shape}")
        data = self._weights[offset : offset + nbytes]
        if name in ("int4", "uint4", "uint6"):
            codes = codes_of(data, _BITS[name])
            return (signed(codes, 4).astype(np.int8) if name == "int4" else codes).reshape(shape)
        return data.view(dtype).reshape(shape)


def type_of(t: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a ValueType message; of a state, what it holds."""
    t = (t.stateType.wrappedType if t.WhichOneof("type") == "stateType" else t).tensorType
    if t.dataType not in _DTYPES:
        raise BundleError(f"a tensor of MIL's type {t.dataType}, which nothing here writes")
    return _DTYPES[t.dataType][0], tuple(d.constant.size for d in t.dimensions)


# --- the operations ---


def _conv(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
    """A convolution over single points: (1, I, 1, T), (O, I, 1, 1) -> (1, O, 1, T)."""
    said = {k: v if isinstance(v, str) else v.tolist() for k, v in options.items()}
    if said != _POINTWISE or weight.shape[2:] != (1, 1):
        raise BundleError(f"a convolution with {said} and weights of {weight.shape} is none over single points")
    y: Array = np.tensordot(weight[:, :, 0, 0], x[0], 1)[None]
    return y if bias is None else y + bias[:, None, None]


_POINTWISE = {"strides": [1, 1], "pad_type": "valid", "pad": [0, 0, 0, 0], "dilations": [1, 1], "groups": 1}


def _layer_norm(x: Array, axes: Array, epsilon: Array, gamma: Array | None = None, beta: Array | None = None) -> Array:
    (axis,) = axes.tolist()
    d = x - x.mean(axis, keepdims=True)
    y: Array = d / np.sqrt((d * d).mean(axis, keepdims=True) + epsilon.astype(x.dtype))
    shape = [n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _matmul(x: Array, y: Array, transpose_x: Array, transpose_y: Array) -> Array:
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def _gather(x: Array, indices: Array, axis: Array, batch_dims: Array, validate_indices: Array) -> Array:
    if axis != 0 or batch_dims != 0:
        raise BundleError("a gather along another axis than the first is not what is written here")
    return x[indices]


def _cast(x: Array, dtype: str) -> Array:
    if dtype != "fp16":
        raise BundleError(f"a cast to {dtype}, which nothing here writes")
    return x


def _concat(values: list[Array], axis: Array, interleave: Array) -> Array:
    if interleave:
        raise BundleError("a concat that interleaves, which nothing here writes")
    return np.concatenate(values, int(axis))


def _slice(x: Array, begin: Array, end: Array) -> Array:
    if not all(0 <= a < b <= n for a, b, n in zip(begin, end, x.shape, strict=True)):
        raise BundleError(f"a slice from {begin} to {end} of {x.shape}")
    return x[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]


def _sigmoid(x: Array) -> Array:
    y: Array = np.tanh(x * 0.5) * 0.5 + 0.5
    return y


def _dense(indices: Array, lut: Array) -> Array:
    """(O, I ...) indices, (O / rows, 1 ..., 2**bits, 1) tables."""
    n_out, tables = indices.shape[0], lut.reshape(lut.shape[0], -1)
    if lut.shape[1:-2] != (1,) * (indices.ndim - 1) or lut.shape[-1] != 1 or n_out % len(tables):
        raise BundleError(f"tables of {lut.shape} do not fit indices of {indices.shape}")
    codes, out = indices.reshape(len(tables), -1), np.empty((len(tables), indices.size // len(tables)), lut.dtype)
    for i, table in enumerate(tables):
        np.take(table, codes[i], out=out[i], mode="clip")  # no code is beyond its table
    return out.reshape(indices.shape)


def _scaled(data: Array, scale: Array) -> Array:
    if scale.ndim != data.ndim or any(n % m for n, m in zip(data.shape, scale.shape, strict=True)):
        raise BundleError(f"scales of {scale.shape} do not fit codes of {data.shape}")
    for axis, (n, m) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, n // m, axis) if 1 != m != n else scale
    return data * scale


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "cast": _cast,
    "concat": _concat,
    "conv": _conv,
    "exp": lambda x: np.exp(x),
    "gather": _gather,
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias: x @ weight.T + bias,
    "matmul": _matmul,
    "maximum": lambda x, y: np.maximum(x, y),
    "mul": lambda x, y: x * y,
    "read_state": lambda input: input.copy(),  # noqa: A006 (MIL's name)
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.max(tuple(axes), keepdims=bool(keep_dims)),
    "reduce_sum": lambda x, axes, keep_dims: x.sum(tuple(axes), keepdims=bool(keep_dims)),
    "relu": lambda x: np.maximum(x, 0),
    "reshape": lambda x, shape: x.reshape(tuple(shape)),
    "sigmoid": _sigmoid,
    "slice_by_index": _slice,
    "split": lambda x, num_splits, axis: np.split(x, int(num_splits), int(axis)),
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: x * x,
    "sub": lambda x, y: x - y,
    "tanh": lambda x: np.tanh(x),
    "transpose": lambda x, perm: x.transpose(tuple(perm)),
    "write_state": lambda input, data: np.copyto(input, data),  # noqa: A006
}
_CONSTEXPR: dict[str, Callable[..., Array]] = {
    "constexpr_lut_to_dense": _dense,
    "constexpr_blockwise_shift_scale": _scaled,
}
_NUMBERS = {
    "x",
    "y",
    "values",
    "weight",
    "bias",
    "gamma",
    "beta",
    "epsilon",
    "input",
    "data",
}  # what an operation computes with


def _memory() -> int:
    """Of this machine, in bytes; 6 GiB where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 6 << 30


KEPT = _memory() // 3  # bytes of weights that interpreters keep made ready; others they make anew when they are taken
_BY_TOKEN = {"conv": 3, "linear": 1}  # operations that are computed for every token alone, by the axis of tokens


@dataclass(frozen=True)
class _Step:
    """An operation as it is run.

    compute   from arguments by parameter to its result, or a list of several
    inputs    by parameter, the name of a value, or the names of several
    results   (name, dtype, shape)
    """

    type: str
    compute: Callable[..., Any]
    inputs: dict[str, str | list[str]]
    results: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def taken(self) -> Iterator[str]:
        """The names of all values that it takes."""
        for names in self.inputs.values():
            yield from [names] if isinstance(names, str) else names


@dataclass
class _Section:
    """Operations that hand nothing on to another section's of the next call.

    back      inputs that are taken here, and whose next are given here
    together  what it takes besides constants, if it is one operation that is computed for every token alone
    ended     by operation, values that no later one takes
    """

    steps: list[_Step]
    back: list[str]
    together: str | None
    ended: list[list[str]]


class Interpreter:
    """One function of a package, computed in numpy.

    arithmetic  "exact"   everything in float64: what the file says
                "native"  every result rounded to the type that the file declares; sums inside an operation in float32
                "flushed" the same, and what is subnormal in float16, weights and constants too, is 0: some units do so
    kept        bytes of weights that it keeps made ready
    inputs, outputs  name -> (dtype, shape), as the model's description has them
    state       (dtype, shape) of the tensor that Core ML keeps, or None
    state_name  its name
    types       (dtype, shape) of every value, by name
    operations  how many of each type, constants aside

    Raises  BundleError for a file that does not say what it should.
    """

    def __init__(self, package: Package, function: str, arithmetic: str = "native", kept: int = KEPT) -> None:
        if arithmetic not in ("exact", "native", "flushed"):
            raise BackendError(f"arithmetic {arithmetic!r} is unknown: expected exact, native or flushed")
        self.package, self.exact, self.flushed = package, arithmetic == "exact", arithmetic == "flushed"
        functions = package.model.mlProgram.functions
        if function not in functions:
            raise BundleError(f"{package.path} has no function {function!r}, only {', '.join(sorted(functions))}")
        about = next((f for f in package.model.description.functions if f.name == function), None)
        said = functions[function]
        block = said.block_specializations[said.opset]
        self.inputs = {i.name: type_of(i.type) for i in said.inputs if i.type.WhichOneof("type") == "tensorType"}
        states = {i.name: type_of(i.type) for i in said.inputs if i.type.WhichOneof("type") == "stateType"}
        self.state: tuple[str, tuple[int, ...]] | None = next(iter(states.values()), None)
        self.state_name = next(iter(states), "")
        self.types = {o.name: type_of(o.type) for op in block.operations for o in op.outputs}
        missing = [name for name in block.outputs if name not in self.types]
        if about is None or missing:
            raise BundleError(f"{package.path}: {function} is not described, or gives {missing} that nothing makes")
        self.outputs = {name: self.types[name] for name in block.outputs}
        for features, types in ((about.input, self.inputs), (about.output, self.outputs)):
            described = {f.name: tuple(f.type.multiArrayType.shape) for f in features}
            if described != {name: shape for name, (_, shape) in types.items()}:
                raise BundleError(f"{package.path}: the description of {function} is not of its inputs and outputs")
        self.operations: dict[str, int] = {}
        for op in block.operations:
            if op.type != "const":
                self.operations[op.type] = self.operations.get(op.type, 0) + 1
        unknown = self.operations.keys() - _OPERATIONS.keys() - _CONSTEXPR.keys()
        if unknown:
            raise BundleError(f"{package.path} has operations that nothing here writes: {', '.join(sorted(unknown))}")
        self._constants: dict[str, _Step] = {}  # by name: made when they are taken
        self._steps = self._prepare(block)
        self._cut: tuple[Mapping[str, str], list[_Section]] | None = None
        self._ready: dict[str, Any] = {}  # constants
        self._ready_bytes, self._kept = 0, kept

    def _prepare(self, block: Any) -> list[_Step]:
        """What is run, in order."""
        known = self.inputs | ({self.state_name: self.state} if self.state else {})
        steps = []
        for op in block.operations:
            inputs: dict[str, str | list[str]] = {}
            for param, argument in op.inputs.items() if op.type not in _CONSTEXPR else ():
                names = [a.name for a in argument.arguments if a.WhichOneof("binding") == "name"]
                if len(names) != len(argument.arguments) or (param != "values" and len(names) != 1):
                    raise BundleError(f"{self.package.path}: {op.type} holds a constant, which nothing here writes")
                inputs[param] = names if param == "values" else names[0]
            results = tuple((o.name, *self.types[o.name]) for o in op.outputs)
            constant = op.type == "const" or op.type in _CONSTEXPR
            if constant and len(results) != 1:
                raise BundleError(f"{self.package.path}: a constant gives {len(results)} results")
            step = _Step(op.type, self._constant(op) if constant else _OPERATIONS[op.type], inputs, results)
            for name in step.taken:
                if name not in known:
                    raise BundleError(f"{self.package.path}: {op.type} takes {name!r}, which nothing has made before")
            self._same_dtypes(op, inputs, known)
            known |= {name: self.types[name] for name, _, _ in results}
            if constant:
                self._constants[results[0][0]] = step
            else:
                steps.append(step)
        return steps

    def _sections(self, back: Mapping[str, str]) -> list[_Section]:
        """Cut the operations wherever nothing is under way that a call hands on to the next.

        back  input -> the output that is the next call's
        """
        if self._cut and self._cut[0] == back:
            return self._cut[1]
        made = {name: n for n, step in enumerate(self._steps) for name, _, _ in step.results}
        taken = {name for step in self._steps for name in step.taken}

        def place(n: int) -> tuple[int, int]:
            step = self._steps[n]
            if any(name in taken for name, _, _ in step.results) or not step.results:
                return n, n
            return max((made[name] for name in step.taken if name in made), default=n), n  # for the caller: when it can be

        steps = [self._steps[n] for n in sorted(range(len(self._steps)), key=place)]
        uses: dict[str, list[int]] = {}  # where a value is taken, and where it is made
        last: dict[str, int] = {}
        for n, step in enumerate(steps):
            for name in itertools.chain(step.taken, (name for name, _, _ in step.results)):
                uses.setdefault(name, []).append(n)
                last[name] = n
        last |= dict.fromkeys(self.outputs.keys() - back.values(), len(steps))
        reach, begins = list(range(len(steps))), {}
        for name, given in (*back.items(), (self.state_name, self.state_name)):
            found = uses.get(name, []) + uses.get(given, [])
            begins[name] = min(found, default=0)
            if found:
                reach[min(found)] = max(reach[min(found)], *found)
        sections, start, until = [], 0, 0
        for n in range(len(steps)):
            until = max(until, reach[n])
            if n == until:
                part = steps[start : n + 1]
                handed = [x for x in back if start <= begins[x] <= n]
                given = [x for x in part[0].taken if x not in self._constants]
                alone = len(part) == 1 and part[0].type in _BY_TOKEN and given == [part[0].inputs.get("x")] and not handed
                sections.append(_Section(part, handed, given[0] if alone else None, [[] for _ in part]))
                start = until = n + 1
        ends = [ended for section in sections for ended in section.ended]
        for name, n in last.items():
            if n < len(steps) and name not in self._constants and name != self.state_name:
                ends[n].append(name)
        self._cut = dict(back), sections
        return sections

    def _same_dtypes(
        self, op: Any, taken: Mapping[str, str | list[str]], known: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        """Hold the types of an operation's results against those of the numbers that it takes."""
        if op.type in ("const", "cast") or op.type in _CONSTEXPR:
            return
        taken_names = [[x] if isinstance(x, str) else x for param, x in taken.items() if param in _NUMBERS]
        names = itertools.chain.from_iterable(taken_names)
        found = {known[n][0] for n in names if n in known} | {self.types[o.name][0] for o in op.outputs}
        if len(found) > 1:
            raise BundleError(f"{self.package.path}: {op.type} declares {' and '.join(sorted(found))} for one result")

    def _constant(self, op: Any) -> Callable[[], Any]:
        if op.type == "const":
            return lambda: self.package.value(op.attributes["val"])

        def dense() -> Array:
            arguments = {k: self.package.value(v.arguments[0].value) for k, v in op.inputs.items()}
            wide = np.float64 if self.exact else np.float32
            return _CONSTEXPR[op.type](**{k: x.astype(wide) if k == "scale" else x for k, x in arguments.items()})

        return dense

    def __call__(self, inputs: Mapping[str, Array], state: Array | None = None) -> dict[str, Array]:
        """Compute the outputs; a state is written in place.

        inputs  by name, in the shapes that are declared; in native arithmetic they are rounded to the declared type
        """
        return self.sequence([inputs], state=state)[0][0]

    def sequence(
        self,
        calls: Sequence[Mapping[str, Array]],
        first: Mapping[str, Array] | None = None,
        back: Mapping[str, str] | None = None,
        state: Array | None = None,
    ) -> tuple[list[dict[str, Array]], dict[str, Array]]:
        """Compute calls one after the other; a state is written in place.

        All calls of a section are computed before those of the next, so that its weights are made ready once.

        calls  the inputs of each, as above
        first  what the first one takes besides
        back   for each of these names, the output that the next call takes

        Returns  the other outputs of every call, and what a next one would take
        """
        back = back or {}
        gives = {given: name for name, given in back.items()}
        handed = {name: self._given(name, first or {}) for name in back}
        envs = [{name: self._given(name, inputs) for name in self.inputs if name not in back} for inputs in calls]
        if (self.state is None) != (state is None) or (state is not None and self.state and state.shape != self.state[1]):
            raise BundleError(f"{self.package.path}: the state is not the one that is declared, {self.state}")
        if state is not None:
            for env in envs:
                env[self.state_name] = state
        with np.errstate(all="ignore"):
            for section in self._sections(back):
                several = len(envs) > 1
                if several:
                    self._make_room(section)
                if several and section.together:
                    self._run_together(section.steps[0], envs, section.together)
                for env in envs:
                    env |= {name: handed[name] for name in section.back}
                    for step, ended in zip(section.steps, section.ended, strict=True):
                        if not (several and section.together):
                            self._run(step, env)
                        for name in ended:
                            x = env.pop(name)
                            if name in gives:
                                handed[gives[name]] = x
        outputs = [{name: self._value(name, env) for name in self.outputs if name not in gives} for env in envs]
        return outputs, handed

    def _given(self, name: str, inputs: Mapping[str, Array]) -> Any:
        dtype, shape = self.inputs[name]
        x = np.asarray(inputs[name])
        if x.shape != shape:
            raise BundleError(f"{name} has shape {x.shape}, expected {shape}")
        return self._cast(x, dtype)

    def _cast(self, x: Any, dtype: str) -> Any:
        """A result rounded to the type it is declared of, and as float32 again; all floats as float64 in exact arithmetic."""
        if dtype not in ("fp16", "fp32"):
            return x
        if self.exact:
            return np.asarray(x, np.float64)
        x = np.asarray(x, np.float16 if dtype == "fp16" else np.float32).astype(np.float32, copy=False)
        return np.where(np.abs(x) < HALF_NORMAL, np.float32(0), x) if self.flushed and dtype == "fp16" else x

    def _run(self, step: _Step, env: dict[str, Any]) -> None:
        self._keep(step, self._compute(step, env), env)

    def _run_together(self, step: _Step, envs: Sequence[dict[str, Any]], x: str) -> None:
        """What is computed for every token alone, for those of all calls."""
        axis = _BY_TOKEN[step.type]
        try:
            (found,) = self._compute(step, {x: np.concatenate([env[x] for env in envs], axis)})
            each = np.split(found, len(envs), axis)
        except ValueError as e:
            raise BundleError(f"{self.package.path}: {step.type} cannot be computed: {e}") from e
        for env, y in zip(envs, each, strict=True):
            self._keep(step, [y], env)

    def _compute(self, step: _Step, env: Mapping[str, Any]) -> list[Any]:
        arguments = {
            k: [self._value(n, env) for n in v] if isinstance(v, list) else self._value(v, env) for k, v in step.inputs.items()
        }
        try:
            found = step.compute(**arguments)
        except (ValueError, TypeError, IndexError, ArithmeticError, MemoryError) as e:
            raise BundleError(f"{self.package.path}: {step.type} cannot be computed: {e}") from e
        results = found if isinstance(found, list) else [found] if step.results else []
        if len(results) != len(step.results):
            raise BundleError(f"{step.type} gives {len(results)} results, and {len(step.results)} are declared")
        return results

    def _keep(self, step: _Step, results: Sequence[Any], env: dict[str, Any]) -> None:
        for (name, dtype, shape), x in zip(step.results, results, strict=True):
            if np.shape(x) != shape:
                raise BundleError(f"{self.package.path}: {name} is {np.shape(x)} and declared as {shape}")
            env[name] = self._cast(x, dtype)

    def _value(self, name: str, env: Mapping[str, Any]) -> Any:
        if name in env:
            return env[name]
        if name in self._ready:
            return self._ready[name]
        made: dict[str, Any] = {}
        self._run(self._constants[name], made)
        if self._ready_bytes + (nbytes := getattr(made[name], "nbytes", 0)) <= self._kept:
            self._ready[name] = made[name]
            self._ready_bytes += nbytes
        return made[name]

    def _make_room(self, section: _Section) -> None:
        """Let go of other sections' constants, if those of this one would not fit beside them."""
        names = {name for step in section.steps for name in step.taken if name in self._constants and name not in self._ready}
        width = 8 if self.exact else 4
        if self._ready_bytes + width * sum(math.prod(self.types[name][1]) for name in names) > self._kept:
            self._ready, self._ready_bytes = {}, 0
