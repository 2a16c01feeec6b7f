"""Export, first token, prefill and decode, recipe by recipe: one table, measured in one run, in turns.

    python benchmarks/speed.py [CHECKPOINT] [--threads 1] [--rounds 5] [--recipes int4:32,int4:128,int8:32,none]

Without a checkpoint, a random one of RWKV-7 0.1B's shape (12 layers of 768, vocabulary 65,536). Recipes take turns, so that
a neighbour disturbs all alike: trust the ratios, which are of medians to the first recipe. Every measurement has a process of
its own. For bundles that you have, see `rwkv-edge bench`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rwkv_edge.bench import bench

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import factory

SHAPE = dict(n_layer=12, n_head=12, head_size=64, n_ffn=3072, n_vocab=65536, ranks=(64, 64, 32, 128), layer0_v=False)

EXPORT = """
import json, sys, threading, time
from rwkv_edge.convert import export
peak, ended = {"anonymous": 0, "resident": 0}, threading.Event()
def watch():
    while not ended.wait(.01):
        for line in open("/proc/self/status"):
            for key, field in (("anonymous", "RssAnon:"), ("resident", "VmHWM:")):
                if line.startswith(field): peak[key] = max(peak[key], int(line.split()[1]) / 1e3)
thread = threading.Thread(target=watch); thread.start()
start = time.perf_counter()
w = export(sys.argv[1], sys.argv[2], quant=sys.argv[3], block=int(sys.argv[4]) if sys.argv[4] else None)
ended.set(); thread.join()
print(json.dumps({"s": time.perf_counter() - start, "mb": w.nbytes / 1e6, "bits": w.bits_per_weight, **peak}))
"""


def exported(checkpoint: Path, path: Path, quant: str, block: str) -> dict[str, float]:
    """Export in a process of its own: seconds, and peaks of memory in MB."""
    args = [sys.executable, "-c", EXPORT, *map(str, (checkpoint, path, quant, block))]
    result: dict[str, float] = json.loads(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", default="int4:32,int4:128,int8:32,none")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = a.checkpoint or factory.write_pth(Path(folder, "random-0.1b.pth"), factory.weights(**SHAPE))
        recipes = a.recipes.split(",")
        paths = {recipe: Path(folder, recipe.replace(":", "-")) for recipe in recipes}
        made = {recipe: exported(checkpoint, paths[recipe], *(recipe + ":").split(":")[:2]) for recipe in recipes}
        runs = [{r: bench(paths[r], threads=a.threads, repetitions=1) for r in recipes} for _ in range(a.rounds)]
        redone = sum(b.prefill.disturbed + b.decode.disturbed for run in runs for b in run.values())
        print(f"{checkpoint.name}, {a.threads} thread(s), {a.rounds} rounds, {redone} disturbed repetitions made again\n")
        print("| weights | bits | MB | export s | export MB anon. / resident | first token s | running MB anon. / resident "
              "| prefill 512, tok/s | ratio | decode, tok/s | ratio |\n|" + "---|" * 11)  # fmt: skip
        speeds = {r: [[run[r].prefill.median for run in runs], [run[r].decode.median for run in runs]] for r in recipes}
        for r in recipes:
            b, m = runs[0][r], made[r]
            median = statistics.median
            cells = (
                f"{median(x):.1f} [{min(x):.0f}-{max(x):.0f}] | {median(x) / median(first):.2f}"
                for x, first in zip(speeds[r], speeds[recipes[0]], strict=True)
            )
            print(
                f"| {r} | {m['bits']:.2f} | {m['mb']:.0f} | {m['s']:.1f} | {m['anonymous']:.0f} / {m['resident']:.0f} "
                f"| {b.first_token_s:.2f} | {(b.anonymous_bytes or 0) / 1e6:.0f} / {(b.peak_bytes or 0) / 1e6:.0f} "
                f"| {' | '.join(cells)} |"
            )


if __name__ == "__main__":
    main()
