"""Initial states: what state tuning trained in a model's place, a first memory for every layer."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..files import Stored
from ..spec import Spec
from . import Checkpoint
from .container import read_file
from .names import plain, unwrap

State = dict[str, npt.NDArray[np.float32]]


def first_state(checkpoint: Checkpoint, given: str | Path | None) -> tuple[State | None, tuple[str, ...]]:
    """The state from which every text begins: the one that is given, or that stands in the model's own file, or none.

    Also gives notes on which it was, where that may surprise.
    """
    inside = checkpoint.initial_state
    if given is not None:
        used = f"{checkpoint.path.name} has a tuned state, which {Path(given).name} replaced"
        return read_initial_state(given, checkpoint.spec), (used,) if inside else ()
    if inside is None:
        return None, ()
    return _whole(checkpoint.spec, inside), (f"every text begins from the tuned state in {checkpoint.path.name}",)


def read_initial_state(path: str | Path, spec: Spec) -> State:
    """Read `blocks.{layer}.att.time_state` (H, N, N) of every layer, as `{layer}.{tensor}` of a whole state.

    Files hold [head, value, key], of every version: what the training's kernels index, and what a state is here. The rwkv
    package, whose state is [key, value] in RWKV-5 and 6, exchanges the axes of theirs. Of web-rwkv's converters, which write
    float16 throughout, some exchange them too.

    Raises  CheckpointError if the file is no initial state, or one of another model.
    Source  github.com/BlinkDL/RWKV-LM, RWKV-v5/cuda/wkv6state_cuda.cu and RWKV-v7/cuda/wkv7s.cu;
            github.com/Ai00-X/ai00_server, assets/scripts/convert_safetensors.py
    """
    path = Path(path)
    if not any(t.name == "wkv" for t in spec.state):
        raise CheckpointError(f"{path}: RWKV-{spec.version} has no memory in matrices, so no initial state fits it")
    held = read_file(path)
    records = {plain(name): r for name, r in unwrap(held.records).items()}
    names = {f"blocks.{i}.att.time_state": f"{i}.wkv" for i in range(spec.n_layer)}
    other = next((name for name in sorted(records) if not name.endswith(".time_state")), None)
    if other:
        what = "is a LoRA (--lora takes one)" if ".lora_" in other else "is no initial state"
        raise CheckpointError(f"{path} {what}: it has {other!r}, expected 'blocks.0.att.time_state' and so on alone")
    if held.half:
        raise CheckpointError(
            f"{path} is a safetensors file that is float16 throughout, as if it was converted for web-rwkv, and does not say "
            "whether its axes are exchanged: give the .pth"
        )
    if records.keys() != names.keys():
        odd = min(records.keys() ^ names.keys())
        raise CheckpointError(f"{path} has {len(records)} layers, expected {spec.n_layer}: it is another model's ({odd!r})")
    for name, record in records.items():
        shape = spec.state_tensors[names[name]].shape
        if record.shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {record.shape}, expected {shape}: it is another model's")
    return _whole(spec, {names[name]: Stored(name, r.shape, r) for name, r in records.items()})


def _whole(spec: Spec, tensors: Mapping[str, Stored]) -> State:
    """A whole state, with what no file holds as a text begins without one."""
    state = {name: np.full(t.shape, t.first, np.float32) for name, t in spec.state_tensors.items()}
    for name, t in tensors.items():
        read = t.read()
        assert isinstance(read, np.ndarray)
        state[name] = read
    return state
