"""What only a Mac can tell of a Core ML bundle: whether it compiles, what it computes there, where, and how fast.

    pip install coremltools==9.0 numpy
    python apple/on_a_mac.py story-ane                         a bundle, on CPU_ONLY, ALL and what its profile is made for
    python apple/on_a_mac.py build/apple-bundles/ane-lut4 --golden apple/Tests/RWKVEdgeTests/Goldens/ane-lut4.json
    python apple/on_a_mac.py story-ane --json report.json      the same as data

It needs macOS 15, Xcode's command line tools, coremltools and numpy, and nothing of rwkv-edge. It exits with 1 if a package
does not compile or run, and with 3 if two compute units, or one and the golden file, differ by more than --tolerance of the
logits' deviation. It has not been run on a Mac yet.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

UNITS = ("CPU_ONLY", "ALL", "CPU_AND_NE", "CPU_AND_GPU")
# what a bundle is run on where --units does not say: the last is what its profile is made for
UNITS_OF = {"ane": ("CPU_ONLY", "ALL", "CPU_AND_NE"), "gpu": ("CPU_ONLY", "ALL", "CPU_AND_GPU")}
TOKENS = [*range(1, 41)]  # where no golden file says which: two chunks of prefill and some more
N_STEPS = 8

Arrays = dict[str, np.ndarray]
Predict = Callable[[Arrays], Arrays]


class MacError(Exception):
    """Something that the reader has to know and do; one sentence."""


# --- the bundle: nothing here needs a Mac ---


class Part(NamedTuple):
    """A package: the manifest's entries of its two functions."""

    file: str
    functions: dict[str, dict[str, Any]]

    @property
    def packed(self) -> dict[str, Any] | None:
        """How the part's state lies in its one Core ML state; None where it is explicit."""
        packed: dict[str, Any] | None = self.functions["decode"].get("packed")
        return packed


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Read the manifest of a Core ML bundle of format 1."""
    try:
        manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    except (OSError, ValueError) as e:
        raise MacError(f"{bundle} is no bundle: {e}") from e
    if manifest.get("format") != 1:
        raise MacError(f"{bundle} is of format {manifest.get('format')}, and this script reads format 1")
    if not all(g.get("target") == "coreml" for g in manifest["graphs"]):
        raise MacError(f"{bundle} was not exported for Core ML")
    if any(i["name"] == "deep_embed" for g in manifest["graphs"] for i in g["inputs"]):
        raise MacError(f"{bundle} is an RWKV-7a, whose tables this script does not read")
    return manifest


def read_golden(file: Path) -> dict[str, Any]:
    """Read what make_goldens.py made of a model."""
    try:
        golden: dict[str, Any] = json.loads(file.read_bytes())
        if not (golden["ids"] and golden["steps"] and golden["model_id"] and golden["deviation"] > 0):
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise MacError(f"{file} is no golden file of a model: {e!r}") from e
    return golden


def parts_of(manifest: dict[str, Any]) -> list[Part]:
    """The packages in the order in which they are run."""
    parts: dict[int, Part] = {}
    for graph in manifest["graphs"]:
        parts.setdefault(graph["part"], Part(graph["file"], {})).functions[graph["function"]] = graph
    for part in parts.values():
        if set(part.functions) != {"decode", "prefill"}:
            raise MacError(f"{part.file} has the functions {', '.join(part.functions)}, expected decode and prefill")
    return [parts[i] for i in sorted(parts)]


def first_values(manifest: dict[str, Any]) -> dict[str, float]:
    """Of every state tensor in the graph, by its name in the manifest."""
    return {t["name"]: float(t["first"] / t["factor"]) for t in manifest["state"]}


def first_inputs(part: Part, first: dict[str, float]) -> Arrays:
    """The explicit state before the first token: input -> array. In float32, which coremltools hands on as float16."""
    arrays = {}
    for i in part.functions["decode"]["inputs"]:
        if i["name"].startswith("state_"):
            _, layer, tensor = i["name"].split("_", 2)
            arrays[i["name"]] = np.full(i["shape"], first[f"{layer}.{tensor}"], np.float32)
    return arrays


def first_packed(packed: dict[str, Any], first: dict[str, float]) -> np.ndarray:
    """The packed state before the first token: (layers, rows, width). In float32: coremltools writes no float16 arrays."""
    array = np.zeros(packed["shape"], np.float32)
    for layer in range(packed["shape"][0]):
        for tensor, (start, end) in packed["rows"].items():
            array[layer, start:end] = first[f"{packed['first_layer'] + layer}.{tensor}"]
    return array


class Program(NamedTuple):
    """A loaded part: its functions, and what puts its packed state back to the beginning (and does nothing if explicit)."""

    part: Part
    predict: dict[str, Predict]
    reset: Callable[[], None]


class Loop:
    """Runs the step: every part in turn, an explicit state handed from call to call."""

    def __init__(self, programs: Sequence[Program], manifest: dict[str, Any]) -> None:
        self._programs, self._first = programs, first_values(manifest)
        self.chunk: int = programs[0].part.functions["prefill"]["T"]
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self._state: Arrays = {}
        for program in self._programs:
            self._state |= first_inputs(program.part, self._first)
            program.reset()

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Read one token, or a chunk: the logits (V,) of the last."""
        function = "decode" if len(tokens) == 1 else "prefill"
        passed: Arrays = {"tokens": np.array(tokens, np.int32)}
        state: Arrays = {}
        for program in self._programs:
            graph = program.part.functions[function]
            inputs = {
                i["name"]: self._state[i["name"]] if i["name"] in self._state else passed[i["name"]] for i in graph["inputs"]
            }
            outputs = program.predict[function](inputs)
            for o in graph["outputs"]:
                name = o["name"].removesuffix("_out")
                (state if name in self._state else passed)[name] = np.asarray(outputs[o["name"]])
        self._state = state
        return passed["logits"].astype(np.float64).reshape(-1)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Read a prompt: chunks while they are whole, then one by one."""
        at, logits = 0, None
        while at < len(tokens):
            n = self.chunk if len(tokens) - at >= self.chunk else 1
            logits = self.step(tokens[at : at + n])
            at += n
        if logits is None:
            raise MacError("there are no tokens to read")
        return logits


def trajectory(loop: Loop, prompt: Sequence[int], then: Sequence[int]) -> np.ndarray:
    """Logits (1 + len(then), V): after the prompt, and after every further token."""
    loop.reset()
    return np.stack([loop.read(prompt), *(loop.step([token]) for token in then)])


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence, in nats, of rows of logits."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        shifted: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return shifted

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far logits are from others: the largest difference is in standard deviations of the expected ones."""
    return {
        "max_difference": float(np.abs(found - expected).max() / expected.std()),
        "kl": kl(expected, found),
        "same_top_choice": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def compare_golden(found: np.ndarray, golden: dict[str, Any]) -> dict[str, float]:
    """How far logits are from a golden file, which has the first of each step's. A near tie may go either way."""
    steps = golden["steps"]
    difference = max(np.abs(row[: len(s["logits"])] - np.array(s["logits"])).max() for row, s in zip(found, steps, strict=True))
    same = [int(row.argmax()) == s["argmax"] for row, s in zip(found, steps, strict=True)]
    return {"max_difference": float(difference / golden["deviation"]), "same_top_choice": float(np.mean(same))}


def median_s(call: Callable[[], Any], times: int) -> float:
    """The median of the seconds that a call takes, after one that is not counted."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def speed(loop: Loop) -> dict[str, float]:
    """Tokens a second of prefill and of decode, handing arrays over from Python included."""
    loop.reset()
    return {
        "prefill_tok_s": loop.chunk / median_s(lambda: loop.step(TOKENS[:1] * loop.chunk), 20),
        "decode_tok_s": 1 / median_s(lambda: loop.step(TOKENS[:1]), 50),
    }


def worst(comparisons: Sequence[dict[str, float]]) -> float:
    """The largest difference of all; infinite where one is no number."""
    found = [c["max_difference"] for c in comparisons]
    return max((x if np.isfinite(x) else np.inf for x in found), default=0.0)


# --- Core ML: everything from here on needs a Mac ---


def refuse_elsewhere(system: str, release: str) -> None:
    """Stop where Core ML is not."""
    if system != "Darwin":
        raise MacError(f"this needs a Mac with macOS 15 or newer: here is {system}, where Core ML cannot run")
    if int(release.split(".")[0] or 0) < 15:
        raise MacError(f"this needs macOS 15 or newer, for Core ML's states and functions: here is {release}")


def compile_package(package: Path, folder: Path) -> dict[str, Any]:
    """Compile with Xcode's compiler, for what it says; its output is kept."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            ["xcrun", "coremlcompiler", "compile", str(package), str(folder)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as e:
        raise MacError("xcrun is not there: install Xcode's command line tools, xcode-select --install") from e
    compiled = folder / f"{package.stem}.mlmodelc"
    return {
        "package": package.name,
        "ok": done.returncode == 0 and compiled.is_dir(),
        "seconds": time.perf_counter() - start,
        "output": (done.stdout + done.stderr).strip(),
        "compiled": str(compiled),
    }


def load(bundle: Path, parts: Sequence[Part], manifest: dict[str, Any], units: str) -> list[Program]:
    """Load every part's functions with coremltools."""
    import coremltools as ct

    first, programs = first_values(manifest), []
    for part in parts:
        models = {
            function: ct.models.MLModel(
                str(bundle / part.file), function_name=function, compute_units=getattr(ct.ComputeUnit, units)
            )
            for function in part.functions
        }
        if part.packed is None:
            predict = {function: model.predict for function, model in models.items()}
            programs.append(Program(part, predict, lambda: None))
        else:
            programs.append(_with_state(part, models, first))
    return programs


def _with_state(part: Part, models: dict[str, Any], first: dict[str, float]) -> Program:
    """A part whose two functions share one Core ML state."""
    packed = part.packed
    assert packed is not None
    state = models["decode"].make_state()

    def reset() -> None:
        state.write_state(packed["name"], first_packed(packed, first))

    def with_state(model: Any) -> Predict:
        return lambda inputs: model.predict(inputs, state=state)

    return Program(part, {function: with_state(model) for function, model in models.items()}, reset)


def placement(compiled: str, units: str) -> dict[str, dict[str, dict[str, int]]]:
    """Function -> device -> operation -> how many: where Core ML plans to run what is no constant."""
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(compiled, compute_units=getattr(ct.ComputeUnit, units))
    program = plan.model_structure.program
    if program is None:
        raise MacError(f"{compiled} is not an ML program")
    return {
        name: count_devices(operations(function.block), plan.get_compute_device_usage_for_mlprogram_operation)
        for name, function in program.functions.items()
    }


def operations(block: Any) -> Iterator[Any]:
    """The operations of a block and of the blocks in it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from operations(inner)


def count_devices(ops: Iterator[Any], usage: Callable[[Any], Any]) -> dict[str, dict[str, int]]:
    """Device -> operation -> how many. Constants run nowhere; "unknown" is what Core ML says nothing of."""
    counts: dict[str, Counter[str]] = {}
    for operation in ops:
        name = operation.operator_name.split(".")[-1]  # "ios18.conv"
        if name == "const" or name.startswith("constexpr"):
            continue
        used = usage(operation)
        kind = type(used.preferred_compute_device).__name__ if used else ""
        device = next((d for d in ("CPU", "GPU", "NeuralEngine") if d in kind), "unknown")
        counts.setdefault(device, Counter())[name] += 1
    return {device: dict(found.most_common()) for device, found in counts.items()}


# --- the report ---


def report(
    bundle: Path, golden: dict[str, Any] | None, units: Sequence[str] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Do all of it; say what was found as it is found."""
    manifest = read_manifest(bundle)
    parts = parts_of(manifest)
    units = units or UNITS_OF.get(parts[0].functions["decode"]["profile"], UNITS)
    if golden and golden["model_id"] != manifest["model_id"]:
        raise MacError(f"the golden file is of another model ({golden['model_id'][:12]}) than {bundle}")
    prompt = golden["ids"] if golden else TOKENS
    then = [s["argmax"] for s in golden["steps"][:-1]] if golden else [7] * N_STEPS
    found: dict[str, Any] = {
        "bundle": bundle.name,
        "model_id": manifest["model_id"],
        "machine": machine(),
        "compiled": [],
        "units": {},
    }
    logits: dict[str, np.ndarray] = {}
    say(f"{bundle.name}: RWKV-{manifest['spec']['version']}, {describe(parts)}; {found['machine']}")
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            compiled = compile_package(bundle / part.file, Path(folder))
            found["compiled"].append(compiled)
            say(f"coremlcompiler {part.file}: {'ok' if compiled['ok'] else 'FAILED'} in {compiled['seconds']:.1f} s")
            if compiled["output"]:
                say(compiled["output"])
        for unit in units:
            start = time.perf_counter()
            try:
                loop = Loop(load(bundle, parts, manifest, unit), manifest)
                load_s = time.perf_counter() - start
                logits[unit] = trajectory(loop, prompt, then)
                one: dict[str, Any] = {"load_s": load_s, **speed(loop)}
            except MacError:
                raise
            except Exception as e:  # coremltools raises Exception itself, and Core ML's errors come as RuntimeError
                found["units"][unit] = {"error": str(e)}
                say(f"{unit}: FAILED: {e}")
                continue
            one["against"] = {other: compare(logits[unit], logits[other]) for other in logits if other != unit}
            if golden:
                one["golden"] = compare_golden(logits[unit], golden)
            found["units"][unit] = one
            try:  # told last: what was compared stands without it
                one["placement"] = {c["package"]: placement(c["compiled"], unit) for c in found["compiled"] if c["ok"]}
            except Exception as e:
                one |= {"placement": {}, "placement_error": str(e)}
            say_unit(unit, one, say)
    return found


def machine() -> str:
    """The processor and the system."""
    chip = platform.processor()
    if shutil.which("sysctl"):
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        chip = done.stdout.strip() or chip
    return f"{chip}, macOS {platform.mac_ver()[0] or '?'}"


def describe(parts: Sequence[Part]) -> str:
    """A line on what the bundle is."""
    graph = parts[0].functions["decode"]
    return f"profile {graph['profile']}, {graph['state']} state, {len(parts)} package{'s' * (len(parts) > 1)}"


def say_unit(unit: str, one: dict[str, Any], say: Callable[[str], None]) -> None:
    """One compute unit's part of the report, for people."""
    say(f"{unit}: loaded in {one['load_s']:.2f} s")
    say(f"  prefill {one['prefill_tok_s']:.1f} tok/s, decode {one['decode_tok_s']:.1f} tok/s")
    for other, c in [*one["against"].items(), *([("the golden file", one["golden"])] if "golden" in one else [])]:
        divergence = f", KL {c['kl']:.2g}" if "kl" in c else ""
        say(f"  against {other}: {c['max_difference']:.4f} deviations{divergence}, same top choice {c['same_top_choice']:.0%}")
    if "placement_error" in one:
        say(f"  where operations run, Core ML does not say: {one['placement_error']}")
    for package, functions in one["placement"].items():
        for function, devices in functions.items():
            for device, ops in devices.items():
                listed = ", ".join(f"{name} {n}" for name, n in ops.items())
                say(f"  {package} {function}: {sum(ops.values())} operations on {device}: {listed}")


def verdict(found: dict[str, Any], tolerance: float) -> int:
    """The exit status: 0, 1 if something did not compile or run, 3 if numbers differ too much."""
    units = found["units"].values()
    if not all(c["ok"] for c in found["compiled"]) or any("error" in u for u in units):
        return 1
    comparisons = [c for u in units for c in [*u["against"].values(), *([u["golden"]] if "golden" in u else [])]]
    return 3 if worst(comparisons) > tolerance else 0


def tolerance(text: str) -> float:
    """A number from 0 on, and no NaN, beside which every difference would pass."""
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--golden", type=Path, help="what make_goldens.py made for this bundle")
    parser.add_argument("--units", nargs="+", choices=UNITS, help="default: CPU_ONLY, ALL and the profile's own")
    parser.add_argument("--tolerance", type=tolerance, default=0.05, help="of the logits' deviation (default: 0.05)")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    args = parser.parse_args(arguments)
    try:
        refuse_elsewhere(platform.system(), platform.mac_ver()[0])
        golden = read_golden(args.golden) if args.golden else None
        if args.json:
            with args.json.open("a"):  # before the work, of minutes
                pass
        found = report(args.bundle, golden, args.units, lambda line: print(line, flush=True))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    except (MacError, OSError) as e:
        print(f"on_a_mac.py: {e}", file=sys.stderr)
        return 1
    status = verdict(found, args.tolerance)
    print({0: "fine", 1: "something did not compile or run", 3: "numbers differ by more than the tolerance"}[status])
    return status


if __name__ == "__main__":
    sys.exit(main())
