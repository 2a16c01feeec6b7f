"""A Core ML bundle that runs: by Core ML on macOS, by our interpreter anywhere.

What predicts through coremltools has not yet been run on a Mac.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Calls = Sequence[Mapping[str, Array]]  # what each call takes besides the state
_F16_MAX = 65504.0
_MIL = {"float16": "fp16", "int32": "int32"}  # dtypes as packages name them


class Interpreted:
    """A function of a package in numpy, and the state that Core ML would keep for it.

    at_once  calls that are computed together: their weights are made ready once
    """

    at_once = 64

    def __init__(self, package: mil.Package, graph: Mapping[str, Any], arithmetic: str) -> None:
        share = 3 if graph["role"] == "decode" else 1  # which is called again and again
        self._f = f = mil.Interpreter(package, graph["function"], arithmetic, mil.KEPT * share // (4 * graph["parts"]))
        packed = graph.get("packed")
        declared = [f.inputs, f.outputs, {f.state_name: f.state} if f.state else {}]
        said = [{x["name"]: (_MIL[x["dtype"]], tuple(x["shape"])) for x in graph[side]} for side in ("inputs", "outputs")]
        said.append({packed["name"]: ("fp16", tuple(packed["shape"]))} if packed else {})
        if declared != said:
            raise BundleError(f"{package.path}: what {graph['function']} takes and gives is not what the manifest says")
        self._dtype = np.float64 if arithmetic == "exact" else np.float32

    def __call__(self, calls: Calls, state: Mapping[str, Array], kept: Any) -> tuple[list[dict[str, Array]], dict[str, Array]]:
        return self._f.sequence(calls, state, {name: f"{name}_out" for name in state}, kept)

    def keep(self) -> Any:
        return np.zeros(self._f.state[1], self._dtype) if self._f.state else None

    def put(self, kept: Any, x: Array) -> None:
        kept[...] = x

    def get(self, kept: Any) -> Array:
        return np.array(kept)


_UNITS = {"ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU"}  # by profile


class Predicted:
    """The same by Core ML, on the unit that the bundle is laid out for."""

    at_once = 1

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

    def __call__(self, calls: Calls, state: Mapping[str, Array], kept: Any) -> tuple[list[dict[str, Array]], dict[str, Array]]:
        outputs = []
        for inputs in calls:
            given = {name: x if x.dtype == np.int32 else x.astype(np.float16) for name, x in (*inputs.items(), *state.items())}
            try:
                found = self._model.predict(given, state=kept) if kept is not None else self._model.predict(given)
            except Exception as e:
                raise BackendError(f"Core ML failed: {e}") from e
            state = {name: found.pop(f"{name}_out") for name in state}
            outputs.append(found)
        return outputs, dict(state)

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

    n_tokens     that the current state has read
    recent       ids of the last of them, as a state keeps them
    occurrences  those of the state that was loaded
    logits       (V,) after the last of them
    """

    def __init__(self, model: "Model", parts: dict[str, list[Part]]) -> None:
        self._model, self._spec, self._parts = model, model.spec, parts
        self._chunk: int = parts["prefill"][0][0]["T"]
        self._at_once = parts["prefill"][0][1].at_once
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
        self.recent = self._model._recent(state)
        self.occurrences = None if state is None else state.occurrences
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
        return self._model._new_state(self, tensors, logits)

    def read(self, ids: "Tokens", *, every: bool = False, progress: Callable[[int, int], None] | None = None) -> Array:
        """Read tokens.

        every     give the logits of every token: token by token, since prefill gives those of its last one
        progress  called with tokens read and tokens in all

        Returns  logits (T, V) of every token, or (1, V) of the last
        """

        def told(done: int) -> None:
            if progress:
                progress(done, len(ids))

        whole = 0 if every else len(ids) // self._chunk * self._chunk
        self.run("prefill", ids[:whole], told)
        logits = self.run("decode", ids[whole:], lambda done: told(whole + done))
        return logits if every else self.logits[None]

    def step(self, token: int) -> Array:
        """Read one token: its logits (V,)."""
        self._call("decode", [np.array([token])])
        return self.logits

    def run(self, role: str, ids: "Tokens", told: Callable[[int], None] = lambda done: None) -> Array:
        """Read tokens by one of the functions, as many at a time as it takes.

        told  called with how many of them are read

        Returns  logits (calls, V) after each call
        """
        size = self._parts[role][0][0]["T"]
        calls = [ids[i : i + size] for i in range(0, len(ids), size)]
        logits = [np.zeros((0, self._spec.n_vocab), np.float32)]
        for i in range(0, len(calls), self._at_once):
            logits.append(self._call(role, calls[i : i + self._at_once]))
            told(min((i + self._at_once) * size, len(ids)))
        return np.concatenate(logits)

    def _call(self, role: str, ids: Sequence["Tokens"]) -> Array:
        passed: list[dict[str, Array]] = [{"tokens": x.astype(np.int32)} for x in ids]
        if self._tables:
            for x, into in zip(ids, passed, strict=True):
                into["deep_embed"] = self._tables.rows(x)
        new: dict[str, Array] = {}
        steps = list(zip(self._parts[role], self._kept, strict=True))
        # packed states have read tokens before the last part, or the last call, has ended
        several = len(steps) > 1 or len(ids) > 1
        before = [(part, kept, part.get(kept)) for (_, part), kept in steps if kept is not None and several]
        try:
            for (graph, part), kept in steps:
                names = [i["name"] for i in graph["inputs"]]
                state = {name: self._state[name] for name in names if name in self._state}
                outputs, state = part([{n: known[n] for n in names if n not in state} for known in passed], state, kept)
                new |= state
                for known, found in zip(passed, outputs, strict=True):
                    known |= {name.removesuffix("_out"): x for name, x in found.items()}
            logits = np.concatenate([known["logits"] for known in passed])
            # together: an interrupt comes before or after, and finds a whole state
            n_tokens, recent = self.n_tokens + sum(map(len, ids)), self._model._later(self.recent, np.concatenate(ids).tolist())
            self._state, self.n_tokens, self.recent, self.logits = new, n_tokens, recent, logits[-1].copy()
            return logits
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
