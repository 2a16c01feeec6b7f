"""What is in a checkpoint or a bundle, and what each tensor would become."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import read_bundle
from .checkpoints import open_checkpoint
from .errors import QuantizeError
from .qtensor import Recipe
from .quantize import plan
from .spec import Shape


@dataclass(frozen=True)
class TensorRow:
    """One tensor, or n alike in as many layers; nbytes of all of them together."""

    name: str
    n: int
    shape: Shape
    kind: str
    recipe: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    what    kind of file
    column  what the recipes are: how tensors are stored, or how they would be
    nbytes  of all weights by these recipes
    """

    what: str
    column: str
    spec: dict[str, str | int]
    n_parameters: int
    state_bytes: int
    rows: tuple[TensorRow, ...]
    nbytes: int

    @property
    def grouped(self) -> tuple[TensorRow, ...]:
        """The rows, with those of layers that are alike as one, and all vectors as one."""
        groups: dict[tuple[str, Shape, str], list[TensorRow]] = {}
        for row in self.rows:
            name = re.sub(r"^blocks\.\d+\.", "blocks.*.", row.name)
            key = (name, row.shape, row.recipe) if row.kind != "vector" else ("vectors", (), row.recipe)
            groups.setdefault(key, []).append(row)
        return tuple(
            TensorRow(
                rows[0].name if len(rows) == 1 else name, len(rows), shape, rows[0].kind, recipe, sum(r.nbytes for r in rows)
            )
            for (name, shape, recipe), rows in groups.items()
        )


def inspect(
    path: str | Path, *, quant: str | None = None, block: int | None = None, overrides: Sequence[str] = ()
) -> Inspection:
    """Look at a checkpoint or a bundle; reads no weights.

    quant, block, overrides  the plan to show, see rwkv_edge.quantize.plan; None is int4, or what is stored

    Raises  CheckpointError, BundleError, QuantizeError
    """
    if Path(path).is_dir():
        bundle = read_bundle(path, verify=False)
        graphs = ", ".join(f"{g['file']} ({g['wkv']}, {g['arithmetic']})" for g in bundle.manifest["graphs"])
        what, column, spec, stored = f"bundle: {graphs}", "stored as", bundle.spec, bundle.tensors
    else:
        checkpoint = open_checkpoint(path)
        what, column, spec, stored = "checkpoint", f"as {quant or 'int4'}", checkpoint.spec, checkpoint.tensors
        if checkpoint.quantized:
            what, column = "quantized checkpoint", "stored as"
    if column == "stored as":
        if quant or block or overrides:
            raise QuantizeError(f"{path} is stored as it is: --quant, --block and --override are for checkpoints")
        recipes = {name: Recipe(t.bits, t.block, t.method) for name, t in stored.items()}
    else:
        recipes = plan(spec, quant or "int4", block=block, overrides=overrides)
    rows = tuple(
        TensorRow(name, 1, w.shape, w.kind, str(recipes[name]), recipes[name].nbytes(w.shape))
        for name, w in spec.weights.items()
    )
    return Inspection(what, column, spec.sizes, spec.n_parameters, spec.state_bytes, rows, sum(r.nbytes for r in rows))
