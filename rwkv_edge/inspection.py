"""What is in a checkpoint or a bundle, what each tensor would become, and what that takes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, read_bundle
from .checkpoints import open_checkpoint
from .errors import InputError, QuantizeError
from .forecast import CoremlForecast, Forecast, bandwidth, coreml_forecast, coreml_graph_bytes, forecast
from .qtensor import Plan
from .quantize import COREML_DEFAULTS, COREML_QUANTS, coreml_plan, plan
from .spec import Shape, Spec
from .texts import find_texts

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
    settings   of the model that are not the usual ones
    nbytes     of all weights by these recipes
    notes      on a checkpoint: its tokenizer, and what was read in an unusual way
    about      of a Core ML bundle: profile, state, T, packages, and the systems that it needs; of others nothing
    forecasts  what each recipe to choose from takes with onnxruntime, or the one that was asked for, or is stored
    coreml     the same with Core ML, if that was asked for
    bandwidth  threads -> bytes of memory a second that they read here, which the speeds follow from
    """

    what: str
    column: str
    spec: dict[str, str | int]
    settings: dict[str, float]
    n_parameters: int
    state_bytes: int
    rows: tuple[TensorRow, ...]
    nbytes: int
    about: dict[str, Any]
    forecasts: tuple[Forecast, ...]
    coreml: tuple[CoremlForecast, ...]
    bandwidth: Mapping[int, float]
    notes: tuple[str, ...] = ()

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
    target: str = "onnx",
    profile: str | None = None,
    quant: str | None = None,
    block: int | None = None,
    overrides: Sequence[str] = (),
    memory: int | None = None,
) -> Inspection:
    """Look at a checkpoint or a bundle; reads no weights, and the speed of memory for half a second.

    target, profile          of a checkpoint, what to forecast for, see rwkv_edge.export; with "coreml" profile None is both
    quant, block, overrides  the plan to show, see rwkv_edge.quantize.plan and coreml_plan; None is the default, or what is
                             stored
    memory                   bytes that a device has: forecasts say what fits, with onnxruntime

    Raises  CheckpointError, BundleError, QuantizeError, InputError
    """
    if profile is not None and profile not in COREML_QUANTS:
        raise InputError(f"profile {profile!r} is unknown: expected one of {', '.join(COREML_QUANTS)}")
    if target != "coreml" and profile:
        raise InputError("--profile is for Core ML: add --target coreml")
    if target == "coreml" and memory is not None:
        raise InputError("--fits is for onnxruntime: what Core ML takes of memory cannot be told from here")
    asked, is_bundle = bool(quant or block or overrides), (Path(path) / MANIFEST).exists()
    checkpoint = None if is_bundle else open_checkpoint(path)
    if (checkpoint is None or checkpoint.quantized) and (asked or target != "onnx"):
        raise QuantizeError(f"{path} is stored as it is: --target, --quant, --block and --override are for checkpoints")
    if checkpoint is None:
        return _bundle(path, memory)
    spec, texts = checkpoint.spec, find_texts(checkpoint)
    tokenizer_bytes, notes = len(texts.content), (*checkpoint.notes, *texts.notes)
    if checkpoint.quantized:
        plans = {"as stored": {name: t.recipe for name, t in checkpoint.tensors.items()}}
        found = _found("quantized checkpoint", "stored as", spec, plans["as stored"])
    elif target == "coreml":
        found = _coreml(spec, profile, quant, block, overrides, tokenizer_bytes)
        return replace(found, notes=notes)
    else:
        found = _found(
            "checkpoint", f"as {quant or 'int4'}", spec, plan(spec, quant or "int4", block=block, overrides=overrides)
        )
        recipes = [(quant or "int4", block)] if asked else RECIPES
        plans = {_name(q, b, overrides): plan(spec, q, block=b, overrides=overrides) for q, b in recipes}
    return _with_forecasts(replace(found, notes=notes), spec, plans, memory, tokenizer_bytes=tokenizer_bytes)


def _found(what: str, column: str, spec: Spec, plan: Plan) -> Inspection:
    """What is there, without forecasts."""
    rows = tuple(
        TensorRow(name, 1, w.shape, w.kind, str(plan[name]), plan[name].nbytes(w.shape)) for name, w in spec.weights.items()
    )
    nbytes = sum(r.nbytes for r in rows)
    counts = spec.n_parameters, spec.state_bytes
    return Inspection(what, column, spec.sizes, spec.unusual, *counts, rows, nbytes, {}, (), (), {})


def _with_forecasts(found: Inspection, spec: Spec, plans: Mapping[str, Plan], memory: int | None, **about: Any) -> Inspection:
    rate = bandwidth()
    forecasts = tuple(forecast(spec, p, recipe=name, bandwidth=rate, memory=memory, **about) for name, p in plans.items())
    return replace(found, forecasts=forecasts, bandwidth=rate)


def _bundle(path: str | Path, memory: int | None) -> Inspection:
    """A bundle, with a forecast of what onnxruntime takes for it."""
    b = read_bundle(path, verify=False)
    graphs, recipes = b.manifest["graphs"], {name: t.recipe for name, t in b.tensors.items()}
    if b.target == "coreml":
        if memory is not None:
            raise InputError(f"{path} is for Core ML, whose memory cannot be told from here: --fits is for onnxruntime")
        about = {name: graphs[0][name] for name in ("profile", "state", "needs")}
        about |= {"packages": graphs[0]["parts"], "T": max(g["T"] for g in graphs)}
        found = _found("bundle for Core ML", "stored as", b.spec, recipes)
        return replace(found, about=about, state_bytes=b.spec.state_bytes // 2)
    sizes = {name: f["bytes"] for name, f in b.manifest["files"].items()}
    nbytes = sum(sizes.values()) + (b.path / MANIFEST).stat().st_size
    tokenizer = b.manifest["tokenizer"]
    what = "bundle: " + ", ".join(f"{g['file']} ({g['wkv']}, {g['arithmetic']})" for g in graphs)
    found = _found(what, "stored as", b.spec, recipes)
    more = {"wkv": graphs[0]["wkv"], "exact": b.graph("run")["arithmetic"] == "exact", "nbytes": nbytes}
    more["tokenizer_bytes"] = sizes[tokenizer["file"]] if tokenizer else 0
    return _with_forecasts(found, b.spec, {"as stored": recipes}, memory, **more)


def _coreml(
    spec: Spec, profile: str | None, quant: str | None, block: int | None, overrides: Sequence[str], tokenizer_bytes: int
) -> Inspection:
    """A checkpoint, with forecasts for Core ML: of what was asked for, or of every width of the profiles."""
    forecasts: list[CoremlForecast] = []
    shown: Plan | None = None
    for p in [profile] if profile else [name for name in COREML_QUANTS if quant is None or quant in COREML_QUANTS[name]]:
        first = COREML_DEFAULTS[p]
        if quant or block or overrides:
            quants = [quant or first]
        else:
            quants = [first, *(q for q in COREML_QUANTS[p] if q != first)]
        plans = {_name(q, block, overrides): coreml_plan(spec, q, p, block=block, overrides=overrides) for q in quants}
        graph_bytes = coreml_graph_bytes(spec, next(iter(plans.values())), p)
        shown = shown or next(iter(plans.values()))
        more: dict[str, Any] = {"profile": p, "graph_bytes": graph_bytes, "tokenizer_bytes": tokenizer_bytes}
        forecasts += [coreml_forecast(spec, plan, recipe=name, **more) for name, plan in plans.items()]
    if shown is None:
        raise QuantizeError(f"quant {quant!r} is not for Core ML: expected fp16, int8, int4, lut4 or lut6")
    found = _found("checkpoint", f"as {forecasts[0].recipe}", spec, shown)
    return replace(found, coreml=tuple(forecasts), state_bytes=spec.state_bytes // 2)


def _name(quant: str, block: int | None, overrides: Sequence[str]) -> str:
    return ", ".join((f"{quant} block {block}" if block else quant, *overrides))
