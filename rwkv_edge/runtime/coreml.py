"""A Core ML bundle that runs: by Core ML on macOS, by our interpreter anywhere.

What predicts through coremltools has not yet been run on a Mac.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import mil
from ..bundle import Bundle
from ..errors import BackendError, BundleError, StateError
from .state import State
from .tables import Tables

if TYPE_CHECKING:
    from .session import Model, Tokens

Array = npt.NDArray[Any]
_F16_MAX = 65504.0
_MIL = {"float16": "fp16", "int32": "int32"}  # dtypes as packages name them


class Interpreted:
    """A function of a package in numpy, and the state that Core ML would keep for it."""

    def __init__(self, package: mil.Package, graph: Mapping[str, Any], arithmetic: str) -> None:
        self._f = f = mil.Interpreter(package, graph["function"], arithmetic)
        packed = graph.get("packed")
        declared = [f.inputs, f.outputs, {f.state_name: f.state} if f.state else {}]
        said = [{x["name"]: (_MIL[x["dtype"]], tuple(x["shape"])) for x in graph[side]} for side in ("inputs", "outputs")]
        said.append({packed["name"]: ("fp16", tuple(packed["shape"]))} if packed else {})
        if declared != said:
            raise BundleError(f"{package.path}: what {graph['function']} takes and gives is not what the manifest says")
        self._dtype = np.float64 if arithmetic == "exact" else np.float32

    def __call__(self, inputs: Mapping[str, Array], kept: Any) -> dict[str, Array]:
        return self._f(inputs, kept)

    def keep(self) -> Any:
        return np.zeros(self._f.state[1], self._dtype) if self._f.state else None

    def put(self, kept: Any, x: Array) -> None:
        kept[...] = x

    def get(self, kept: Any) -> Array:
        return np.array(kept)


_UNITS = {"ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU"}  # by profile


class Predicted:
    """The same by Core ML, on the unit that the bundle is laid out for."""

    def __init__(self, package: Any, graph: Mapping[str, Any]) -> None:
        self._state = graph.get("packed", {}).get("name")
        try:
            with mil.quiet():
                import coremltools
            units = coremltools.ComputeUnit[_UNITS[graph["profile"]]]
            self._model = coremltools.models.MLModel(str(package), compute_units=units, function_name=graph["function"])
        except ImportError as e:
            raise BackendError(f"Core ML needs coremltools ({e}): pip install 'rwkv-edge[coreml]'") from e
        except Exception as e:  # Core ML's errors are of several unrelated classes
            raise BackendError(f"Core ML cannot load {package}: {e}") from e

    def __call__(self, inputs: Mapping[str, Array], kept: Any) -> dict[str, Array]:
        given = {name: x if x.dtype == np.int32 else x.astype(np.float16) for name, x in inputs.items()}
        try:
            found: dict[str, Array] = self._model.predict(given, state=kept) if kept is not None else self._model.predict(given)
        except Exception as e:
            raise BackendError(f"Core ML failed: {e}") from e
        return found

    def keep(self) -> Any:
        return self._model.make_state()

    def put(self, kept: Any, x: Array) -> None:
        kept.write_state(self._state, x.astype(np.float32))  # coremltools takes no float16 here, and Core ML converts

    def get(self, kept: Any) -> Array:
        return np.asarray(kept.read_state(self._state))


Part = tuple[Mapping[str, Any], Interpreted | Predicted]  # what the manifest says of it first


def open_parts(bundle: Bundle, interpret: str | None) -> dict[str, list[Part]]:
    """The functions of a bundle's packages by role, in the order in which they are run.

    interpret  "native", "flushed" or "exact": the interpreter's arithmetic; None is Core ML

    Raises  BackendError where there is no Core ML.
    """
    if interpret is None and sys.platform != "darwin":
        raise BackendError(
            f"{bundle.path} is a Core ML bundle, which runs on macOS 15: elsewhere run, chat and eval compute it in numpy with "
            "--interpret, and open_bundle with interpret='native', slowly"
        )
    packages: dict[str, mil.Package] = {}
    parts: dict[str, list[Part]] = {"decode": [], "prefill": []}
    for graph in bundle.manifest["graphs"]:
        path = bundle.path / graph["file"]
        part: Interpreted | Predicted
        if interpret is None:
            part = Predicted(path, graph)
        else:
            if graph["file"] not in packages:
                packages[graph["file"]] = mil.Package(path)
            part = Interpreted(packages[graph["file"]], graph, interpret)
        parts[graph["role"]].append((graph, part))
    return parts


class Loop:
    """The state between calls, and the order of parts and functions: a prompt by prefill, its rest by decode.

    n_tokens  that the current state has read
    logits    (V,) after the last of them
    """

    def __init__(self, model: "Model", parts: dict[str, list[Part]]) -> None:
        self._model, self._spec, self._parts = model, model.spec, parts
        self._chunk: int = parts["prefill"][0][0]["T"]
        self._factors = {t["name"]: float(t["factor"]) for t in model.bundle.manifest["state"]}
        self._kept = [part.keep() if "packed" in graph else None for graph, part in parts["decode"]]
        self._state: dict[str, Array] = {}
        self._tables = Tables.of(model.bundle) if model.spec.tables else None
        self.logits: Array = np.zeros(model.spec.n_vocab, np.float32)
        self.n_tokens = 0
        self.load(None)

    def load(self, state: State | None) -> None:
        """Begin from a state, or from the model's first one."""
        state = self._model.check_state(state)
        if state is not None and state.logits is not None:
            self.logits = state.logits.copy()
        self.n_tokens = 0 if state is None else state.n_tokens
        tensors = {
            name: (np.full(t.shape, t.first) if state is None else state.tensors[name]) / self._factors[name]
            for name, t in self._spec.state_tensors.items()
        }
        for name, x in tensors.items():
            if name.endswith(".pp"):  # -1e30 stands for nothing read, and -65504 does as well
                x.clip(-_F16_MAX, _F16_MAX, out=x)
            elif np.abs(x).max() > _F16_MAX:
                largest = np.abs(x).max() * self._factors[name]
                raise StateError(
                    f"{name} of the state holds {largest:.3g}, which float16 does not: use a bundle for onnxruntime"
                )
        self._state = {}
        for (graph, part), kept in zip(self._parts["decode"], self._kept, strict=True):
            for i in graph["inputs"]:
                if i["name"].startswith("state_"):
                    self._state[i["name"]] = tensors[_tensor(i["name"])].reshape(i["shape"])
            if "packed" in graph:
                whole = np.empty(graph["packed"]["shape"])
                for name, place in _places(graph["packed"]):
                    whole[place] = tensors[name].reshape(whole[place].shape)
                part.put(kept, whole)

    def tensors(self) -> dict[str, Array]:
        """The state's tensors."""
        found = {_tensor(name): x.reshape(self._spec.state_tensors[_tensor(name)].shape) for name, x in self._state.items()}
        for (graph, part), kept in zip(self._parts["decode"], self._kept, strict=True):
            if "packed" in graph:
                whole = part.get(kept)
                for name, place in _places(graph["packed"]):
                    found[name] = whole[place].reshape(self._spec.state_tensors[name].shape)
        return {name: found[name] * self._factors[name] for name in self._spec.state_tensors}

    def state(self) -> State:
        """Copy the state out."""
        tensors = {name: np.array(x, np.float32, order="C") for name, x in self.tensors().items()}
        logits = self.logits.astype(np.float32) if self.n_tokens else None
        return State(self._model.bundle.model_id, self.n_tokens, tensors, logits)

    def read(self, ids: "Tokens", *, every: bool = False, progress: Callable[[int, int], None] | None = None) -> Array:
        """Read tokens.

        every     give the logits of every token: token by token, since prefill gives those of its last one
        progress  called with tokens read and tokens in all

        Returns  logits (T, V) of every token, or (1, V) of the last
        """
        parts, at = [], 0
        while at < len(ids):
            n = self._chunk if len(ids) - at >= self._chunk and not every else 1
            self._call("prefill" if n > 1 else "decode", ids[at : at + n])
            at += n
            if every:
                parts.append(self.logits)
            if progress:
                progress(at, len(ids))
        return np.stack(parts) if every else self.logits[None]

    def step(self, token: int) -> Array:
        """Read one token: its logits (V,)."""
        self._call("decode", np.array([token]))
        return self.logits

    def _call(self, role: str, ids: "Tokens") -> None:
        passed: dict[str, Array] = {"tokens": ids.astype(np.int32)}
        if self._tables:
            passed["deep_embed"] = self._tables.rows(ids)
        new: dict[str, Array] = {}
        steps = list(zip(self._parts[role], self._kept, strict=True))
        # a part's packed state has read the tokens before the next part begins
        before = [(part, kept, part.get(kept)) for (_, part), kept in steps if kept is not None and len(steps) > 1]
        try:
            for (graph, part), kept in steps:
                known = self._state | passed
                for name, x in part({i["name"]: known[i["name"]] for i in graph["inputs"]}, kept).items():
                    inner = name.removesuffix("_out")
                    (new if inner in self._state else passed)[inner] = x
            # together: an interrupt comes before or after, and finds a whole state
            self._state, self.n_tokens, self.logits = new, self.n_tokens + len(ids), passed["logits"][0]
        except BaseException:  # an interrupt too
            for part, kept, whole in before:
                part.put(kept, whole)
            raise


def _tensor(name: str) -> str:
    """A state's tensor by the name of its input: state_0_att_x is 0.att_x."""
    return name.removeprefix("state_").replace("_", ".", 1)


def _places(packed: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, slice]]]:
    """Every tensor of a packed state, and where it lies there."""
    for layer in range(packed["shape"][0]):
        for name, (start, stop) in packed["rows"].items():
            yield f"{layer + packed['first_layer']}.{name}", (layer, slice(start, stop))
