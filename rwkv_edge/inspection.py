"""What is in a checkpoint or a bundle, what each tensor would become, and what that takes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, read_bundle
from .checkpoints import open_checkpoint
from .errors import InputError, QuantizeError
from .forecast import Forecast, bandwidth, forecast
from .qtensor import Plan
from .quantize import plan
from .spec import Shape
from .tokenizer import tokenizer_beside

# recipes to choose from, as --quant and --block
RECIPES: tuple[tuple[str, int | None], ...] = (("none", None), ("fp16", None), ("int8", None), ("int4", None), ("int4", 128))


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

    what       kind of file
    column     what the recipes are: how tensors are stored, or how they would be
    nbytes     of all weights by these recipes
    forecasts  what each recipe to choose from takes, or the one that was asked for, or is stored
    bandwidth  threads -> bytes of memory a second that they read here, which the speeds follow from
    """

    what: str
    column: str
    spec: dict[str, str | int]
    n_parameters: int
    state_bytes: int
    rows: tuple[TensorRow, ...]
    nbytes: int
    forecasts: tuple[Forecast, ...]
    bandwidth: Mapping[int, float]

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
    path: str | Path,
    *,
    quant: str | None = None,
    block: int | None = None,
    overrides: Sequence[str] = (),
    memory: int | None = None,
) -> Inspection:
    """Look at a checkpoint or a bundle; reads no weights, and the speed of memory for half a second.

    quant, block, overrides  the plan to show, see rwkv_edge.quantize.plan; None is int4, or what is stored
    memory                   bytes that a device has: forecasts say what fits

    Raises  CheckpointError, BundleError, QuantizeError
    """
    about: dict[str, Any] = {}
    if (Path(path) / MANIFEST).exists():
        bundle = read_bundle(path, verify=False)
        graphs = ", ".join(f"{g['file']} ({g.get('function', g['wkv'])}, {g['arithmetic']})" for g in bundle.manifest["graphs"])
        what, column, spec, stored = f"bundle: {graphs}", "stored as", bundle.spec, bundle.tensors
        sizes = {name: f["bytes"] for name, f in bundle.manifest["files"].items()}
        sizes[MANIFEST] = (bundle.path / MANIFEST).stat().st_size
        tokenizer = bundle.manifest["tokenizer"]
        if bundle.target == "coreml" and memory is not None:
            raise InputError(f"{path} is for Core ML, whose memory cannot be told from here: --fits is for onnxruntime")
        about |= {"wkv": bundle.manifest["graphs"][0]["wkv"], "nbytes": sum(sizes.values())}
        about |= {"tokenizer_bytes": sizes[tokenizer["file"]] if tokenizer else 0}
    else:
        checkpoint = open_checkpoint(path)
        what, column, spec, stored = "checkpoint", f"as {quant or 'int4'}", checkpoint.spec, checkpoint.tensors
        if checkpoint.quantized:
            what, column = "quantized checkpoint", "stored as"
        tokenizer_file = tokenizer_beside(checkpoint.path, spec.n_vocab)
        about |= {"tokenizer_bytes": tokenizer_file.stat().st_size if tokenizer_file else 0}
    if column == "stored as":
        if quant or block or overrides:
            raise QuantizeError(f"{path} is stored as it is: --quant, --block and --override are for checkpoints")
        recipes: Plan = {name: t.recipe for name, t in stored.items()}
        plans = {"as stored": recipes} if "wkv" not in about or bundle.target == "onnx" else {}
    else:
        recipes = plan(spec, quant or "int4", block=block, overrides=overrides)
        asked = [(quant or "int4", block)] if quant or block or overrides else RECIPES
        plans = {_name(q, b, overrides): plan(spec, q, block=b, overrides=overrides) for q, b in asked}
    rows = tuple(
        TensorRow(name, 1, w.shape, w.kind, str(recipes[name]), recipes[name].nbytes(w.shape))
        for name, w in spec.weights.items()
    )
    rate = bandwidth() if plans else {}
    forecasts = tuple(forecast(spec, p, recipe=name, bandwidth=rate, memory=memory, **about) for name, p in plans.items())
    nbytes = sum(r.nbytes for r in rows)
    return Inspection(what, column, spec.sizes, spec.n_parameters, spec.state_bytes, rows, nbytes, forecasts, rate)


def _name(quant: str, block: int | None, overrides: Sequence[str]) -> str:
    return ", ".join((f"{quant} block {block}" if block else quant, *overrides))
