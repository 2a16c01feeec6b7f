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
N_RECENT = 8  # ids that a state keeps: a tokenizer needs so many at most to give the text of the next one
_RECENT, _TOKENIZER = "recent.ids", "recent.tokenizer"
_SEEN, _COUNTS = "occurrences.ids", "occurrences.counts"
# what a file may have besides the state's own tensors: dtype, and how long it is
_EXTRAS = {_RECENT: np.int32, _TOKENIZER: np.uint8, _SEEN: np.int32, _COUNTS: np.float32}


@dataclass(frozen=True)
class State:
    """What a model remembers.

    model_id     of the model it belongs to; a state fits every bundle of that model, at any width
    n_tokens     read so far
    tensors      `{layer}.{tensor}` -> read-only float32 array, wkv as [head, value, key]
    logits       (V,) after the last token, read-only: what going on begins with; None where they are not known
    recent       ids of the last tokens, at most 8, on which the text of the next one depends; of no use to another tokenizer
    tokenizer    sha256 of the file of the tokenizer that they belong to; None without them
    occurrences  id -> how often it was generated, decayed, as penalties count; None where none were on
    """

    model_id: str
    n_tokens: int
    tensors: Mapping[str, npt.NDArray[np.float32]]
    logits: npt.NDArray[np.float32] | None = None
    recent: tuple[int, ...] = ()
    tokenizer: str | None = None
    occurrences: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "recent", tuple(self.recent))
        if self.occurrences is not None:
            object.__setattr__(self, "occurrences", MappingProxyType(dict(self.occurrences)))
        for x in (*self.tensors.values(), *([] if self.logits is None else [self.logits])):
            x.setflags(write=False)

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and copy
        occurrences = None if self.occurrences is None else dict(self.occurrences)
        of_text = self.recent, self.tokenizer, occurrences
        return State, (self.model_id, self.n_tokens, dict(self.tensors), self.logits, *of_text)

    def __repr__(self) -> str:
        return f"State(model {self.model_id[:12]}, n_tokens={self.n_tokens})"

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write a safetensors file, replacing a state file of that name and nothing else; in float16 with `half`.

        Raises  OutputError if it cannot be written; StateError if it does not fit float16.
        """
        refuse_output(path)
        named = dict(self.tensors) if self.logits is None else {**self.tensors, "logits": self.logits}
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, x in named.items():
            if half and np.abs(x).max() > np.finfo(np.float16).max:
                raise StateError(f"{name} holds {np.abs(x).max():g}, beyond float16: save without half")
            tensors[name] = x.astype(np.float16) if half else np.ascontiguousarray(x)
        tensors |= self._extras()
        about = {"model_id": self.model_id, "n_tokens": self.n_tokens, "sha256": _digest(tensors)}
        with new_file(Path(path), force=True) as temporary:
            temporary.write_bytes(save(tensors, metadata={_KEY: json.dumps(about)}))

    def _extras(self) -> dict[str, npt.NDArray[Any]]:
        """What a file has besides the tensors: the last ids and their tokenizer, and occurrences, each if there are some."""
        extras: dict[str, npt.NDArray[Any]] = {}
        if self.recent and self.tokenizer:
            extras[_RECENT] = np.array(self.recent, np.int32)
            extras[_TOKENIZER] = np.frombuffer(bytes.fromhex(self.tokenizer), np.uint8)
        if self.occurrences:
            ids = sorted(self.occurrences)
            extras[_SEEN] = np.array(ids, np.int32)
            extras[_COUNTS] = np.array([self.occurrences[i] for i in ids], np.float32)
        return extras


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
    own = {name: x for name, x in tensors.items() if name not in _EXTRAS}
    sound = {name: x.shape for name, x in own.items()} == shapes and digest == _digest(tensors)
    sound = sound and all(x.dtype in (np.float16, np.float32) and np.isfinite(x).all() for x in own.values())
    extras = {name: x for name, x in tensors.items() if name in _EXTRAS}
    if not sound or not _are_extras(extras, spec.n_vocab) or type(n_tokens) is not int or not 0 <= n_tokens < 1 << 63:
        raise StateError(f"{path} is damaged: its tensors are not the ones that were saved")
    read = {name: tensors[name].astype(np.float32) for name in shapes}
    logits = read.pop("logits", None)
    recent = tuple(extras[_RECENT].tolist()) if _RECENT in extras else ()
    tokenizer = extras[_TOKENIZER].tobytes().hex() if recent else None
    occurrences = dict(zip(extras[_SEEN].tolist(), extras[_COUNTS].tolist(), strict=True)) if _SEEN in extras else None
    return State(model_id, n_tokens, read, logits, recent, tokenizer, occurrences)


def _are_extras(extras: Mapping[str, npt.NDArray[Any]], n_vocab: int) -> bool:
    """Whether they are what `State.save` writes: both of a pair or neither, in their dtypes and lengths, ids of the model."""
    if any(x.dtype != _EXTRAS[name] or x.ndim != 1 for name, x in extras.items()):
        return False
    recent, of, seen, counts = (extras.get(name) for name in _EXTRAS)
    if (recent is None) != (of is None) or (seen is None) != (counts is None):
        return False
    if recent is not None and of is not None and not (0 < len(recent) <= N_RECENT and len(of) == 32):
        return False
    if seen is not None and counts is not None:
        in_order = len(seen) == len(counts) > 0 and (np.diff(seen) > 0).all()
        if not in_order or not np.isfinite(counts).all() or (counts < 0).any():
            return False
    return all((x >= 0).all() and (x < n_vocab).all() for x in (recent, seen) if x is not None)


def _digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return h.hexdigest()
