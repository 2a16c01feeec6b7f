"""How model files read weights: what a checkpoint must hold, and names under a prefix."""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..spec import Kind, Shape, Weight


class Prefix:
    """The weights under one prefix: `W["key.weight"]` for `blocks.3.att.key.weight`."""

    def __init__(self, W: Mapping[str, Any], prefix: str) -> None:
        self.W, self.prefix = W, prefix

    def __getitem__(self, name: str) -> Any:
        return self.W[self.prefix + name]


class Expected:
    """The weights that a model expects, each checked against a checkpoint's canonical shapes as it is named.

    weights  those named so far

    Raises  CheckpointError if one is missing, misshapen or, in the end, nobody's.
    """

    def __init__(self, shapes: Mapping[str, Shape], model: str) -> None:
        self.shapes, self.model = shapes, model
        self.weights: dict[str, Weight] = {}
        self.C = self.shape("emb.weight", 2)[1]

    def shape(self, name: str, rank: int) -> Shape:
        """Read sizes from a tensor of this rank."""
        if name not in self.shapes:
            raise CheckpointError(f"{name} is missing: expected a tensor of rank {rank}")
        if len(self.shapes[name]) != rank:
            raise CheckpointError(f"{name} has shape {self.shapes[name]}, expected rank {rank}")
        return self.shapes[name]

    @property
    def n_layer(self) -> int:
        return len({n.split(".")[1] for n in self.shapes if n.startswith("blocks.")})  # 0 to n - 1, or one is missing

    def __call__(self, name: str, shape: Shape, kind: Kind = "vector") -> None:
        if name not in self.shapes:
            raise CheckpointError(f"{name} is missing: expected {shape} for {self.model} with n_embd={self.C}")
        if self.shapes[name] != shape:
            raise CheckpointError(f"{name} has shape {self.shapes[name]}, expected {shape} for n_embd={self.C}")
        self.weights[name] = Weight(shape, kind)

    def layer_norm(self, name: str) -> None:
        self(f"{name}.weight", (self.C,))
        self(f"{name}.bias", (self.C,))

    def nothing_else(self) -> None:
        for name in self.shapes:
            if name not in self.weights:
                raise CheckpointError(
                    f"{name} is not part of {self.model}: this file is of another version or has been changed"
                )
