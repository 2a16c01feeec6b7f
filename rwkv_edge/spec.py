"""What a model is, apart from its numbers: version, sizes, weights and state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

Shape = tuple[int, ...]

# embedding   (V, C)   gathered, one row per token
# head        (V, C)   the last matrix product
# matrix      (O, I)   the layers' matrix products
# low_rank    (O, I)   their low-rank factors: small, and more sensitive to rounding
# table       (V, R R) one row per token, too large for a graph: the runtime reads the row
# vector               everything else: never quantized
Kind = Literal["embedding", "head", "matrix", "low_rank", "table", "vector"]


@dataclass(frozen=True)
class Weight:
    """One tensor of the model in canonical layout: every matrix is (outputs, inputs)."""

    shape: Shape
    kind: Kind

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class StateTensor:
    """One tensor that a layer carries from token to token."""

    name: str
    shape: Shape
    first: float = 0.0


@dataclass(frozen=True)
class Spec:
    """Version, sizes, weights, state and settings of one model.

    weights        canonical name -> Weight, in the order in which a step reads them
    state          what one layer carries; a whole state has these once per layer
    norm_eps       of the layer norms; this one and the next two are the settings, with their usual values
    head_norm_eps  of the norm of every head, ln_x
    out_norm_eps   of the last layer norm, ln_out: some tools leave it as it is when they change the others
    """

    version: str
    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    n_ffn: int
    n_vocab: int
    weights: Mapping[str, Weight]
    state: tuple[StateTensor, ...]
    norm_eps: float = 1e-5
    head_norm_eps: float = 64e-5
    out_norm_eps: float = 1e-5

    @property
    def settings(self) -> dict[str, float]:
        """What changes the numbers beside the weights; a manifest holds it after the sizes."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def unusual(self) -> dict[str, float]:
        """The settings that are not the usual ones: they are part of what identifies a model."""
        return {name: value for name, value in self.settings.items() if value != SETTINGS[name]}

    @property
    def unusual_text(self) -> str:
        """The same for a person."""
        return ", ".join(f"{name} {value:g}" for name, value in self.unusual.items())

    @property
    def sizes(self) -> dict[str, str | int]:
        """The sizes that a manifest holds."""
        return {
            "version": self.version,
            "n_layer": self.n_layer,
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "head_size": self.head_size,
            "n_ffn": self.n_ffn,
            "n_vocab": self.n_vocab,
        }

    @property
    def tables(self) -> list[str]:
        """The tables of which a step reads a row per token from outside its graph."""
        return [name for name, w in self.weights.items() if w.kind == "table"]

    @property
    def n_parameters(self) -> int:
        return sum(w.size for w in self.weights.values())

    @cached_property
    def state_tensors(self) -> dict[str, StateTensor]:
        """Every tensor of a whole state by its name, `{layer}.{tensor}`."""
        return {f"{i}.{t.name}": t for i in range(self.n_layer) for t in self.state}

    @property
    def state_bytes(self) -> int:
        """Bytes of a whole state in float32."""
        return 4 * self.n_layer * sum(math.prod(t.shape) for t in self.state)


SETTINGS = {f.name: float(f.default) for f in fields(Spec) if isinstance(f.default, float)}  # and their usual values
EPS = (1e-12, 10.0)  # what an eps may be: smaller is nothing beside float32's rounding, larger leaves nothing of a norm
