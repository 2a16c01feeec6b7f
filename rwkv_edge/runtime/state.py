"""State as a document: what a model remembers of the tokens it has read.  Immutable, bound to its model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import StateError
from ..files import new_file
from ..spec import Spec

_KEY = "rwkv-edge state"


@dataclass(frozen=True)
class State:
    """What a model remembers.

    model_id  of the model it belongs to; a state fits every bundle of that model, at any width
    n_tokens  read so far
    tensors   `{layer}.{tensor}` -> read-only float32 array, wkv as [head, value, key]
    """

    model_id: str
    n_tokens: int
    tensors: Mapping[str, npt.NDArray[np.float32]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        for x in self.tensors.values():
            x.setflags(write=False)

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write a safetensors file, replacing one of that name; in float16 with `half`.

        Raises  OutputError if it cannot be written; StateError if it does not fit float16.
        """
        tensors = {}
        for name, x in self.tensors.items():
            if half and np.abs(x).max() > np.finfo(np.float16).max:
                raise StateError(f"{name} holds {np.abs(x).max():g}, beyond float16: save without half")
            tensors[name] = x.astype(np.float16) if half else np.ascontiguousarray(x)
        about = {"model_id": self.model_id, "n_tokens": self.n_tokens, "sha256": _digest(tensors)}
        with new_file(Path(path), force=True) as temporary:
            temporary.write_bytes(save(tensors, metadata={_KEY: json.dumps(about)}))


def load_state(path: str | Path, *, model_id: str, spec: Spec) -> State:
    """Read a state that `State.save` has written.

    Raises  StateError if it is missing, damaged, no state, or of another model.
    """
    try:
        with safe_open(str(path), framework="numpy") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError as e:
        raise StateError(f"{path} does not exist") from e
    except (OSError, SafetensorError, ValueError, TypeError) as e:
        raise StateError(f"{path} is damaged or not a state file: {e}") from e
    try:
        about = json.loads(metadata[_KEY])
        n_tokens, digest, of = int(about["n_tokens"]), about["sha256"], about["model_id"]
    except (KeyError, ValueError, TypeError) as e:
        raise StateError(f"{path} is not a state file of rwkv-edge") from e
    if of != model_id:
        raise StateError(f"{path} belongs to another model ({of[:12]}), not to this one ({model_id[:12]})")
    shapes = {name: t.shape for name, t in spec.state_tensors.items()}
    if {name: x.shape for name, x in tensors.items()} != shapes or digest != _digest(tensors):
        raise StateError(f"{path} is damaged: its tensors are not the ones that were saved")
    return State(model_id, n_tokens, {name: tensors[name].astype(np.float32) for name in shapes})


def _digest(tensors: Mapping[str, npt.NDArray[np.floating]]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return h.hexdigest()
