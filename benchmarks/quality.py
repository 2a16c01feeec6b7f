"""What quantization costs a model, recipe by recipe: perplexity on a text beside its own float32, KL, same top token.

    python benchmarks/quality.py TEXT [CHECKPOINT] [--windows 24] [--tokens 256]

Without a checkpoint, the demo model. Every window begins from a zero state. "exact" computes matrix products in float32;
"run" rounds activations to 8 bits, as the bundle does on a device. For bundles that you have, see `rwkv-edge eval`.
"""

import argparse
import tempfile
from pathlib import Path

import rwkv_edge
from rwkv_edge.convert import export
from rwkv_edge.evaluate import documents, evaluate

CHECKPOINT = Path(rwkv_edge.__file__).parent / "demo" / "rwkv7-stories-7m.pth"
RECIPES = [("int8", 32, ()), ("int8", 128, ())]
RECIPES += [("int4", block, ()) for block in (16, 32, 64, 128, 256)]
RECIPES += [("int4", block, ("head.weight=8",)) for block in (32, 128)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    a = parser.parse_args()
    texts = documents(a.text)
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for quant, block, overrides in [("none", None, ()), ("fp16", None, ()), *RECIPES]:
            name = " ".join([quant, *([f"block {block}"] if block else []), *overrides])
            written[name] = export(a.checkpoint, Path(folder, name), quant=quant, block=block, overrides=overrides)
        paths = {name: w.path for name, w in written.items()}
        float32 = paths.pop("none")
        found = evaluate([float32, *paths.values()], texts, window=a.tokens, limit=a.windows)
        first, *rest = found.scores
        print(f"{found.n_predictions:,} predictions, float32: perplexity {first.perplexity.value:.3f}\n")
        print("| weights | bits/weight | MB | arithmetic | perplexity | KL, nats | top-1 |\n|---|---|---|---|---|---|---|")
        for name, score in zip(paths, rest, strict=True):
            for role, s in ([("exact", score.weights)] if score.arithmetic else []) + [("run", score)]:
                print(
                    f"| {name} | {written[name].bits_per_weight:.2f} | {written[name].nbytes / 1e6:.1f} | {role} | "
                    f"{s.percent.value:+.3f} % ± {s.percent.error:.3f} | {s.kl.value:.6f} | {100 * s.top1.value:.1f} % |"
                )


if __name__ == "__main__":
    main()
