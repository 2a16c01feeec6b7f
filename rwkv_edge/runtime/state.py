"""State as a document: what a model remembers of the tokens it has read.  Immutable, bound to its model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import OutputError, StateError
from ..files import new_file, refuse_file
from ..spec import Spec

_KEY = "rwkv-edge state"


@dataclass(frozen=True)
class State:
    """What a model remembers.

    model_id  of the model it belongs to; a state fits every bundle of that model, at any width
    n_tokens  read so far
    tensors   `{layer}.{tensor}` -> read-only float32 array, wkv as [head, value, key]
    logits    (V,) after the last token, read-only: what going on begins with; None where they are not known
    """

    model_id: str
    n_tokens: int
    tensors: Mapping[str, npt.NDArray[np.float32]]
    logits: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        for x in (*self.tensors.values(), *([] if self.logits is None else [self.logits])):
            x.setflags(write=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.model_id, self.n_tokens, dict(self.tensors), self.logits)  # for pickle and copy

    def __repr__(self) -> str:
        return f"State(model {self.model_id[:12]}, n_tokens={self.n_tokens})"

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write a safetensors file, replacing a state file of that name and nothing else; in float16 with `half`.

        Raises  OutputError if it cannot be written; StateError if it does not fit float16.
        """
        refuse_output(path)
        named = dict(self.tensors) if self.logits is None else {**self.tensors, "logits": self.logits}
        tensors = {}
        for name, x in named.items():
            if half and np.abs(x).max() > np.finfo(np.float16).max:
                raise StateError(f"{name} holds {np.abs(x).max():g}, beyond float16: save without half")
            tensors[name] = x.astype(np.float16) if half else np.ascontiguousarray(x)
        about = {"model_id": self.model_id, "n_tokens": self.n_tokens, "sha256": _digest(tensors)}
        with new_file(Path(path), force=True) as temporary:
            temporary.write_bytes(save(tensors, metadata={_KEY: json.dumps(about)}))


def refuse_output(path: str | Path) -> None:
    """Raise OutputError if a state cannot be saved here: only a state file is replaced."""
    path = Path(path)
    refuse_file(path, force=True)
    if path.exists() and _about(path)[0] is None:
        raise OutputError(f"{path} exists and is no state file: choose another output")


def _about(path: str | Path) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
    """What a file says of its state, None if it is no state file; and its tensors."""
    if not Path(path).is_file():
        return None, {}
    try:
        with safe_open(str(path), framework="numpy") as f:
            about = json.loads((f.metadata() or {})[_KEY])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        return None, {}
    return about, tensors


def load_state(path: str | Path, *, model_id: str, spec: Spec) -> State:
    """Read a state that `State.save` has written.

    Raises  StateError if it is missing, damaged, no state, or of another model.
    """
    if not Path(path).exists():
        raise StateError(f"{path} does not exist")
    about, tensors = _about(path)
    try:
        n_tokens, digest, of = about["n_tokens"], about["sha256"], about["model_id"]
    except (KeyError, TypeError) as e:
        raise StateError(f"{path} is damaged or not a state file") from e
    if of != model_id:
        raise StateError(f"{path} belongs to another model ({str(of)[:12]}), not to this one ({model_id[:12]})")
    shapes = {name: t.shape for name, t in spec.state_tensors.items()}
    if "logits" in tensors:
        shapes["logits"] = (spec.n_vocab,)
    sound = {name: x.shape for name, x in tensors.items()} == shapes and digest == _digest(tensors)
    sound = sound and all(x.dtype in (np.float16, np.float32) and np.isfinite(x).all() for x in tensors.values())
    if not sound or type(n_tokens) is not int or not 0 <= n_tokens < 1 << 63:
        raise StateError(f"{path} is damaged: its tensors are not the ones that were saved")
    read = {name: tensors[name].astype(np.float32) for name in shapes}
    logits = read.pop("logits", None)
    return State(model_id, n_tokens, read, logits)


def _digest(tensors: Mapping[str, npt.NDArray[np.floating]]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return h.hexdigest()
