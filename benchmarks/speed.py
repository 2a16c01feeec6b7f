"""Export, load, prefill and decode: one table, measured in one run, in turns.

    python benchmarks/speed.py [CHECKPOINT] [--threads 1] [--rounds 5] [--recipes int4:32,int4:128,int8:32,none]

Without a checkpoint, a random one of RWKV-7 0.1B's shape (12 layers of 768, vocabulary 65,536). Recipes take turns, so that
a neighbour disturbs all alike: trust the ratios, which are of medians to the first recipe. Memory is of a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rwkv_edge import open_bundle
from rwkv_edge.runtime.session import Loop

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import factory

SHAPE = dict(n_layer=12, n_head=12, head_size=64, n_ffn=3072, n_vocab=65536, ranks=(64, 64, 32, 128), layer0_v=False)
PREFILL, DECODE = 512, 64

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

RUN = """
import json, sys, time
start = time.perf_counter()
from rwkv_edge import open_bundle
model = open_bundle(sys.argv[1], threads=int(sys.argv[2]), verify=False)
logits, state = model.feed([1])
load = time.perf_counter() - start
for i in range(20): logits, state = model.feed([i], state)
fields = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if "kB" in line}
print(json.dumps({"first_s": load, "resident": fields["VmHWM"], "anonymous": fields["RssAnon"]}))
"""


def child(code: str, *args: object) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def timed(work) -> tuple[float, float]:
    """Seconds, and the share of one processor that the process had."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", default="int4:32,int4:128,int8:32,none")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = a.checkpoint or factory.write_pth(Path(folder, "random-0.1b.pth"), factory.weights(**SHAPE))
        rows = []
        for recipe in a.recipes.split(","):
            quant, _, block = recipe.partition(":")
            path = Path(folder, recipe.replace(":", "-"))
            made = child(EXPORT, checkpoint, path, quant, block)
            ran = child(RUN, path, a.threads)
            rows.append((recipe, path, made, ran))
        prefill: dict[str, list[float]] = {r[0]: [] for r in rows}
        decode: dict[str, list[float]] = {r[0]: [] for r in rows}
        dropped = 0
        loops = {}
        for recipe, path, *_ in rows:
            loops[recipe] = Loop(open_bundle(path, threads=a.threads, verify=False))
        ids = np.arange(1, PREFILL + 1) % 1000
        for i in range(a.rounds + 1):
            for recipe, loop in loops.items():
                for times, n, work in (
                    (prefill[recipe], PREFILL, lambda loop=loop: loop.read(ids)),
                    (decode[recipe], DECODE, lambda loop=loop: [loop.step(int(t)) for t in ids[:DECODE]]),
                ):
                    seconds, share = timed(work)
                    while share < 0.9 * a.threads and dropped < 20 * a.rounds:
                        dropped += 1
                        seconds, share = timed(work)
                    if i:  # the first round warms up
                        times.append(n / seconds)
        print(f"{checkpoint.name}, {a.threads} thread(s), {a.rounds} rounds, {dropped} disturbed repetitions made again\n")
        print("| weights | bits | MB | export s | export MB anon. / resident | first logits s | running MB anon. / resident "
              f"| prefill {PREFILL}, tok/s | ratio | decode, tok/s | ratio |\n|" + "---|" * 11)  # fmt: skip
        first = rows[0][0]
        for recipe, _, made, ran in rows:
            p, d = statistics.median(prefill[recipe]), statistics.median(decode[recipe])
            print(
                f"| {recipe} | {made['bits']:.2f} | {made['mb']:.0f} | {made['s']:.1f} | {made['anonymous']:.0f} / "
                f"{made['resident']:.0f} | {ran['first_s']:.2f} | {ran['anonymous']:.0f} / {ran['resident']:.0f} | "
                f"{p:.0f} [{min(prefill[recipe]):.0f}-{max(prefill[recipe]):.0f}] | "
                f"{p / statistics.median(prefill[first]):.2f} | "
                f"{d:.1f} [{min(decode[recipe]):.1f}-{max(decode[recipe]):.1f}] | {d / statistics.median(decode[first]):.2f} |"
            )


if __name__ == "__main__":
    main()
