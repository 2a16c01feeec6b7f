"""What Core ML packages hold, and whether they compute the step: by our interpreter of the files, anywhere.

    python benchmarks/coreml.py [CHECKPOINT ...] [--tokens 256] [--quants fp16,lut4]
    python benchmarks/coreml.py CHECKPOINT --beside-onnx TEXT

For each checkpoint, every profile, quant and form of the state, in one package; and in fp16, split into a package a layer.
Operations are those of the graph, of which constants and what unpacks weights are none. exact: in float64 against the step
with the same numbers, the largest difference of logits and state in their standard deviations, over decode and prefill.
native: nats a token that float16 costs, against the step in float64.

--beside-onnx: the logits of fp16 bundles beside those of the same model's fp16 bundle in onnxruntime, over the first tokens of
a text; and from how many of 20 beginnings in it both write as many tokens greedily, the same ones, and how far apart the
logits of the two likeliest tokens are where they do not.

Core ML itself has no part in this: its speed and the units that it chooses are measured on a Mac, by apple/on_a_mac.py.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import rwkv_edge
from rwkv_edge import mil
from rwkv_edge.bundle import read_bundle
from rwkv_edge.check import check
from rwkv_edge.convert import export
from rwkv_edge.quantize import COREML_QUANTS
from rwkv_edge.runtime import Model, open_bundle

CHECKPOINT = Path(rwkv_edge.__file__).parent / "demo" / "rwkv7-stories-7m.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[CHECKPOINT])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--quants", type=lambda s: s.split(","), help="these alone")
    parser.add_argument("--beside-onnx", type=Path, metavar="TEXT")
    a = parser.parse_args()
    if a.beside_onnx:
        beside_onnx(a.checkpoints[0], a.beside_onnx.read_text(), a.tokens)
        return
    print("| RWKV | profile | weights | state | packages | ops, decode | prefill | MB | exact | native KL, decode | prefill |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for checkpoint in a.checkpoints:
        for profile, quant, state, split in forms(a.quants):
            with tempfile.TemporaryDirectory() as folder:
                options = {"part_bytes": 1} if split else {}
                path = Path(folder, "bundle")
                written = export(checkpoint, path, target="coreml", profile=profile, quant=quant, coreml_state=state, **options)
                print(f"| {row(path, profile, quant, state, written.nbytes, a.tokens)} |", flush=True)


def forms(quants: list[str] | None) -> Iterator[tuple[str, str, str, bool]]:
    for profile, possible in COREML_QUANTS.items():
        for quant in possible:
            if not quants or quant in quants:
                for state in ("explicit", "packed"):
                    for split in (False, True) if quant == "fp16" else (False,):
                        yield profile, quant, state, split


def row(path: Path, profile: str, quant: str, state: str, nbytes: int, tokens: int) -> str:
    b, report = read_bundle(path), check(path, n_tokens=tokens)
    assert report.ok, path
    counts = {}
    for role in ("decode", "prefill"):
        graphs = [g for g in b.manifest["graphs"] if g["role"] == role]
        found = [mil.Interpreter(mil.Package(path / g["file"]), g["function"]).operations for g in graphs]
        counts[role] = sum(n for part in found for type_, n in part.items() if not type_.startswith("constexpr"))
    exact = max(max(r.own.max_abs, r.state) for r in report.rows if r.arithmetic == "exact")
    kl = [r.own.kl for r in report.rows if r.arithmetic == "native"]
    cells = (b.spec.version, profile, quant, state, len(graphs), *(f"{counts[r]:,}" for r in counts), f"{nbytes / 1e6:.2f}")
    return " | ".join(map(str, (*cells, f"{exact:.0e}", *(f"{x:.1e}" for x in kl))))


def beside_onnx(checkpoint: Path, text: str, tokens: int) -> None:
    print("| profile | state | logits, native: max | in deviations | exact: max | same beginnings | where not, apart by |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        theirs = open_bundle(export(checkpoint, Path(folder, "onnx"), quant="fp16").path)
        ids = theirs.encode(text)
        beginnings = [ids[i : i + 12] for i in range(0, len(ids) - 12, len(ids) // 20)][:20]
        expected, _ = theirs.feed(ids[:tokens], every=True)
        for profile, state in itertools.product(COREML_QUANTS, ("explicit", "packed")):
            path, options = Path(folder, f"{profile}-{state}"), {"profile": profile, "coreml_state": state}
            export(checkpoint, path, target="coreml", quant="fp16", **options)
            ours = {a: open_bundle(path, interpret=a) for a in ("native", "exact")}
            apart = {a: np.abs(m.feed(ids[:tokens], every=True)[0] - expected).max() for a, m in ours.items()}
            gaps = [g for g in (gap(ours["native"], theirs, b, tokens) for b in beginnings) if g is not None]
            numbers = (f"{x:.4f}" for x in (apart["native"], apart["native"] / expected.std(), apart["exact"]))
            same = f"{len(beginnings) - len(gaps)} of {len(beginnings)}"
            print(f"| {' | '.join((profile, state, *numbers, same, ', '.join(f'{g:.4f}' for g in gaps)))} |", flush=True)


def gap(ours: Model, theirs: Model, beginning: list[int], tokens: int) -> float | None:
    """How far apart the two likeliest tokens are where two greedy texts part; None if they do not."""
    a, b = ([t.id for t in m.generate(beginning, temperature=0, max_tokens=tokens)] for m in (ours, theirs))
    if a == b:
        return None
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    logits, _ = theirs.feed(beginning + b[:same])
    second, first = np.sort(logits)[-2:]
    return float(first - second)


if __name__ == "__main__":
    main()
