"""Initial states: what state tuning trained in a model's place, a first memory for every layer."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..files import Stored
from ..spec import Spec
from . import read_adapter


def read_initial_state(path: str | Path, spec: Spec) -> dict[str, npt.NDArray[np.float32]]:
    """Read `blocks.{layer}.att.time_state` (H, N, N) of every layer, as `{layer}.{tensor}` of a whole state.

    Files hold [head, value, key], of every version: what the training's kernels index, and what a state is here. The rwkv
    package, whose state is [key, value] in RWKV-5 and 6, exchanges the axes of theirs.

    Raises  CheckpointError if the file is no initial state, or one of another model.
    Source  github.com/BlinkDL/RWKV-LM, RWKV-v5/cuda/wkv6state_cuda.cu and RWKV-v7/cuda/wkv7s.cu
    """
    path = Path(path)
    if not any(t.name == "wkv" for t in spec.state):
        raise CheckpointError(f"{path}: RWKV-{spec.version} has no memory in matrices, so no initial state fits it")
    if path.suffix == ".st":
        raise CheckpointError(
            f"{path} was converted for web-rwkv, and does not say whether its axes are exchanged: give the .pth"
        )
    records = read_adapter(path)
    names = {f"blocks.{i}.att.time_state": f"{i}.wkv" for i in range(spec.n_layer)}
    other = next((name for name in sorted(records) if not name.endswith(".time_state")), None)
    if other:
        what = "is a LoRA (--lora takes one)" if ".lora_" in other else "is no initial state"
        raise CheckpointError(f"{path} {what}: it has {other!r}, expected 'blocks.0.att.time_state' and so on alone")
    if records.keys() != names.keys():
        odd = min(records.keys() ^ names.keys())
        raise CheckpointError(f"{path} has {len(records)} layers, expected {spec.n_layer}: it is another model's ({odd!r})")
    state = {name: np.full(t.shape, t.first, np.float32) for name, t in spec.state_tensors.items()}
    for name, record in records.items():
        shape = spec.state_tensors[names[name]].shape
        if record.shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {record.shape}, expected {shape}: it is another model's")
        read = Stored(name, shape, record).read()
        assert isinstance(read, np.ndarray)
        state[names[name]] = read
    return state
