"""How fast a bundle is, and what it takes: measured in a process of its own."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import read_bundle
from .errors import BackendError, InputError, RwkvEdgeError
from .runtime import open_bundle

MIN_SHARE = 0.9  # of the processors' time: with less, others disturbed the repetition
PATIENCE = 5  # times the repetitions asked for: then disturbed ones are taken


@dataclass(frozen=True)
class Speed:
    """Tokens a second over repetitions; median, of them.

    disturbed  repetitions that other processes disturbed, and that were made again
    share      of the processors' time that the process had, at the least, in the repetitions that count
    """

    tok_s: tuple[float, ...]
    disturbed: int
    share: float

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.tok_s)

    @property
    def trusted(self) -> bool:
        """Whether no repetition that counts was disturbed."""
        return self.share >= MIN_SHARE


@dataclass(frozen=True)
class Bench:
    """How fast a bundle is, and what it takes.

    arithmetic       of the graph that was measured: "exact", or "int8 activations"
    prefill, decode  reading n_prefill tokens at once; reading n_decode one by one, each waited for, none sampled
    gb_s             weights that decode reads in a second
    load_s           opening the bundle, every byte verified; its files were read shortly before
    first_token_s    from before opening it to the first token after a prompt of n_prefill, nothing warmed up
    peak_bytes       of memory, files included, of the whole process; None where the system does not tell
    anonymous_bytes  of it not backed by files: what cannot be given back under pressure
    """

    name: str
    arithmetic: str
    nbytes: int
    bits_per_weight: float
    n_threads: int
    n_prefill: int
    n_decode: int
    prefill: Speed
    decode: Speed
    gb_s: float
    load_s: float
    first_token_s: float
    peak_bytes: int | None
    anonymous_bytes: int | None


def bench(
    bundle: str | Path,
    *,
    threads: int | None = None,
    exact: bool = False,
    n_prefill: int = 512,
    n_decode: int = 128,
    repetitions: int = 5,
) -> Bench:
    """Measure a bundle in a fresh process.

    threads  None: every core
    exact    the graph in exact arithmetic, as of `open_bundle`

    Raises  BundleError, BackendError; InputError for settings out of range.
    """
    for name, n in (("n_prefill", n_prefill), ("n_decode", n_decode), ("repetitions", repetitions)):
        if n < 1:
            raise InputError(f"{name} {n} is not possible: expected 1 or more")
    refuse(bundle, verify=True)  # its errors are told here; and its files are in the system's cache now
    settings = json.dumps([str(bundle), threads, exact, n_prefill, n_decode, repetitions])
    done = subprocess.run([sys.executable, "-P", "-m", "rwkv_edge.bench", settings], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"measuring {bundle} failed with exit code {done.returncode}: {last}")
    found = json.loads(done.stdout)
    for key in ("prefill", "decode"):
        found[key] = Speed(tuple(found[key]["tok_s"]), found[key]["disturbed"], found[key]["share"])
    return Bench(**found)


def refuse(bundle: str | Path, *, verify: bool = False) -> None:
    """Raise BundleError or InputError if this cannot be measured."""
    if read_bundle(bundle, verify=verify).target == "coreml":
        raise InputError(f"{bundle} is a Core ML bundle, and bench measures onnxruntime: on a Mac, use apple/on_a_mac.py")


def memory() -> tuple[int | None, int | None]:
    """Peak of this process' memory, and what of it is anonymous now, in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["VmHWM"].split()[0]) * 1024, int(fields["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024), None


def _measure(path: str, threads: int | None, exact: bool, n_prefill: int, n_decode: int, repetitions: int) -> Bench:
    """Measure in this process."""
    import onnxruntime  # noqa: F401 (which starts threads of its own)

    n_before = _n_native_threads()
    start = time.perf_counter()
    model = open_bundle(path, threads=threads, exact=exact)
    load_s = time.perf_counter() - start
    n_threads = threads or (n_before and _n_native_threads() - n_before + 1) or os.cpu_count() or 1
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.spec.n_vocab, n_prefill)
    tokens = [int(t) for t in rng.integers(0, model.spec.n_vocab, n_decode)]
    next(model.generate([int(t) for t in prompt], max_tokens=1))
    first_token_s = time.perf_counter() - start
    anonymous = [memory()[1]]
    loop = model.loop()

    def read() -> None:
        loop.load(None)
        loop.read(prompt)

    def step() -> None:
        for token in tokens:
            loop.step(token)

    read()  # warms up
    prefill = _repeat(read, n_prefill, repetitions, n_threads)
    anonymous.append(memory()[1])
    step()
    decode = _repeat(step, n_decode, repetitions, n_threads)
    peak, last = memory()
    anonymous.append(last)
    weights = sum(t.nbytes for t in model.bundle.tensors.values())
    return Bench(
        name=Path(path).resolve().name,
        arithmetic=model.arithmetic,
        nbytes=sum(file.stat().st_size for file in Path(path).iterdir()),
        bits_per_weight=8 * weights / model.spec.n_parameters,
        n_threads=n_threads,
        n_prefill=n_prefill,
        n_decode=n_decode,
        prefill=prefill,
        decode=decode,
        gb_s=decode.median * model.bytes_per_token / 1e9,
        load_s=load_s,
        first_token_s=first_token_s,
        peak_bytes=peak,
        anonymous_bytes=max((n for n in anonymous if n is not None), default=None),
    )


def _repeat(work: Callable[[], Any], n: int, repetitions: int, n_threads: int) -> Speed:
    tok_s: list[float] = []
    shares: list[float] = []
    disturbed = 0
    while len(tok_s) < repetitions:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        share = cpu / (wall * n_threads)
        if share < MIN_SHARE and disturbed < PATIENCE * repetitions:
            disturbed += 1
            continue
        tok_s.append(n / wall)
        shares.append(share)
    return Speed(tuple(tok_s), disturbed, min(shares))


def _n_native_threads() -> int:
    """Threads of this process, the libraries' included; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0


def main() -> None:
    """Measure by the settings of the command line, and write JSON: for `bench`."""
    try:
        found = _measure(*json.loads(sys.argv[1]))
    except RwkvEdgeError as e:
        sys.exit(str(e))
    sys.stdout.write(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
