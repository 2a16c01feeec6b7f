"""What Core ML packages hold, and whether they compute the step: by our interpreter of the files, anywhere.

    python benchmarks/coreml.py [CHECKPOINT ...] [--tokens 256] [--quants fp16,lut4]

For each checkpoint, every profile, quant and form of the state, in one package; and in fp16, split into a package a layer.
Operations are those of the graph, of which constants and what unpacks weights are none. exact: in float64 against the step
with the same numbers, the largest difference of logits and state in their standard deviations, over decode and prefill.
native: nats a token that float16 costs, against the step in float64. Core ML itself has no part in this: its speed and the
units that it chooses are measured on a Mac, by apple/on_a_mac.py.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rwkv_edge
from rwkv_edge import mil
from rwkv_edge.bundle import read_bundle
from rwkv_edge.check import check
from rwkv_edge.convert import export
from rwkv_edge.quantize import COREML_QUANTS

CHECKPOINT = Path(rwkv_edge.__file__).parent / "demo" / "rwkv7-stories-7m.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[CHECKPOINT])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--quants", type=lambda s: s.split(","), help="these alone")
    a = parser.parse_args()
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


if __name__ == "__main__":
    main()
