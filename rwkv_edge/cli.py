"""The command line: parse, call one library function, print.  Data goes to stdout, everything else to stderr."""

import dataclasses
import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from . import __version__
from .errors import CheckFailed, InputError, OutputError, RwkvEdgeError

Progress = Callable[[int, int], None]
DEMO = Path(__file__).parent / "demo" / "rwkv7-stories-7m.pth"


class Failure(click.ClickException):
    """One line on stderr, and the exit code."""

    def __init__(self, error: RwkvEdgeError) -> None:
        text = " ".join(str(error).split())
        super().__init__("".join(c if c.isprintable() else "?" for c in text))
        self.exit_code = 3 if isinstance(error, CheckFailed) else 1  # type: ignore[misc]


class Commands(click.Group):
    """Commands in the order in which a newcomer meets them; errors of ours as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RwkvEdgeError as e:
            raise Failure(e) from e
        except OSError as e:  # names too long, folders that cannot be entered, a full stdout
            if e.errno == errno.EPIPE:
                raise
            raise Failure(OutputError(f"{e.filename or 'output'}: {e.strerror or e}")) from e


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, "--version", message="rwkv-edge %(version)s")
def cli() -> None:
    """Take an RWKV language model from its checkpoint to an app.

    \b
    rwkv-edge demo                                    the whole way once, on a small model that comes along
    rwkv-edge inspect model.pth                       what is in a checkpoint, and what would be made of it
    rwkv-edge export model.pth --quant int4           write model-int4/, a bundle for onnxruntime
    rwkv-edge check model-int4 --against model.pth    prove that it is still the same model
    rwkv-edge run model-int4 "Once upon a time"       let it speak
    """


# --- options that several commands share ---

force_option = click.option("-f", "--force", is_flag=True, help="Replace the output if it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing on stderr but errors.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 256), help="Threads for matrix products.  [default: every core]"
)
checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path))
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))


def quant_options(default: str | None) -> Callable[[Any], Any]:
    """--quant, --block and --override."""

    def decorate(command: Any) -> Any:
        quants = click.Choice(["none", "fp16", "int8", "int4"])
        blocks = click.Choice(["16", "32", "64", "128", "256"])
        text = "Width of the weights." + ("" if default else "  [default: int4, or what the file has]")
        for option in (
            click.option("--override", "overrides", multiple=True, metavar="NAME=BITS[:BLOCK]", help=_OVERRIDE),
            click.option("--block", type=blocks, callback=lambda ctx, param, value: value and int(value), help=_BLOCK),
            click.option("--quant", type=quants, default=default, help=text),
        ):
            command = option(command)
        return command

    return decorate


_BLOCK = "Weights that share one scale: fewer lose less, more are smaller and faster.  [default: 32]"
_OVERRIDE = (
    "4, 8, 16 or 32 bits for the tensors whose names match, such as blocks.*.ffn.*=8. May be given again: the last counts."
)


# --- commands ---


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@quant_options(None)
@click.option("--tensors", is_flag=True, help="List every tensor; otherwise layers are summed up.")
@json_option
def inspect(path: Path, quant: str | None, block: int | None, overrides: tuple[str, ...], tensors: bool, as_json: bool) -> None:
    """Tell what a checkpoint or a bundle holds, and what each tensor would become.

    \b
    rwkv-edge inspect model.pth
    rwkv-edge inspect model.pth --quant int4 --block 128 --override head.weight=8
    """
    from .inspection import inspect as look

    found = look(path, quant=quant, block=block, overrides=overrides)
    if as_json:
        _print_json(found)
        return
    spec = found.spec
    click.echo(f"{path}: RWKV-{spec['version']} {found.what}")
    sizes = "  ".join(f"{name} {value:,}" for name, value in spec.items() if name != "version")
    click.echo(f"{found.n_parameters:,} parameters  {sizes}")
    click.echo(f"state {_bytes(found.state_bytes)}\n")
    rows = found.rows if tensors else found.grouped
    table = [(r.name, str(r.n), "x".join(map(str, r.shape)), r.recipe, _bytes(r.nbytes)) for r in rows]
    _table(("tensor", "n", "shape", found.column, "size"), table)
    click.echo(f"\n{_bytes(found.nbytes)} of weights, {8 * found.nbytes / found.n_parameters:.2f} bits each")


@cli.command()
@checkpoint_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: CHECKPOINT-QUANT.safetensors]")
@quant_options("int4")
@force_option
@quiet_option
def quantize(
    checkpoint: Path, output: Path | None, quant: str, block: int | None, overrides: tuple[str, ...], force: bool, quiet: bool
) -> None:
    """Write a quantized checkpoint, to export from later.

    \b
    rwkv-edge quantize model.pth --quant int4 -o model-int4.safetensors
    """
    from .convert import quantize as write

    output = output or _beside(checkpoint, f"-{quant}.safetensors")
    start = time.perf_counter()
    with _progress("quantizing", quiet) as progress:
        written = write(
            checkpoint,
            output,
            quant=quant,
            block=block,
            overrides=overrides,
            force=force,
            progress=progress,
        )
    _say(_written(written, start), quiet)


@cli.command()
@checkpoint_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: CHECKPOINT-QUANT]")
@quant_options(None)
@click.option(
    "--wkv",
    type=click.Choice(["attention", "plain", "step"]),
    default="attention",
    help="How the recurrence is computed: by onnxruntime's own operator, the fastest; by plain operations; "
    "or by plain operations that take one token a call.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json.  [default: the one beside CHECKPOINT]")
@force_option
@quiet_option
def export(
    checkpoint: Path,
    output: Path | None,
    quant: str | None,
    block: int | None,
    overrides: tuple[str, ...],
    wkv: str,
    tokenizer: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write a bundle: the folder that an app needs to run the model.

    \b
    rwkv-edge export model.pth --quant int4
    rwkv-edge export model.pth --quant int4 --block 128 --override head.weight=8 -o phone
    rwkv-edge export model-int4.safetensors
    """
    from .convert import export as write

    output = output or _beside(checkpoint, f"-{quant}" if quant else None)
    start = time.perf_counter()
    with _progress("exporting", quiet) as progress:
        written = write(
            checkpoint,
            output,
            quant=quant,
            block=block,
            overrides=overrides,
            wkv=wkv,
            tokenizer=tokenizer,
            force=force,
            progress=progress,
        )
    _say(_written(written, start), quiet)
    for note in written.notes:
        _say(note, quiet)


@cli.command()
@bundle_argument
@click.option("--against", type=click.Path(path_type=Path), help="The checkpoint it was made from, to measure the cost.")
@click.option("-n", "--tokens", "n_tokens", type=click.IntRange(2, 65536), default=320, help="Tokens to compare.")
@threads_option
@json_option
@quiet_option
def check(bundle: Path, against: Path | None, n_tokens: int, threads: int | None, as_json: bool, quiet: bool) -> None:
    """Prove that a bundle computes its own weights.

    Reads the weights from the bundle's files, runs the step in numpy in float64, and holds every graph against it, reading
    tokens one by one and in chunks. Differences are in standard deviations of the logits. Exits with 3 if a graph is
    further off than float32 explains; the cost of quantization is shown, and is no failure.

    \b
    rwkv-edge check model-int4 --against model.pth
    """
    from .check import check as compare

    with _progress("checking", quiet) as progress:
        report = compare(bundle, against, n_tokens=n_tokens, threads=threads, progress=progress)
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    report.raise_if_failed()


@cli.command()
@bundle_argument
@click.argument("prompt")
@click.option("-n", "--max-tokens", type=click.IntRange(0), default=128, help="Tokens to generate.")
@click.option("-t", "--temperature", type=float, help="0 takes the most likely token.  [default: the bundle's]")
@click.option("--top-p", type=float, help="Keep the most likely tokens up to this probability.  [default: the bundle's]")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="End before this text. May be given again.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, and token ids are printed: for bundles without a tokenizer.")
@click.option("--load-state", type=click.Path(path_type=Path), help="Continue from a state file.")
@click.option("--save-state", type=click.Path(path_type=Path), help="Write the state at the end to a file.")
@threads_option
@quiet_option
def run(
    bundle: Path,
    prompt: str,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    ids: bool,
    load_state: Path | None,
    save_state: Path | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Continue a text. PROMPT - reads it from stdin, a whole book if you like.

    \b
    rwkv-edge run model-int4 "Once upon a time"
    rwkv-edge run model-int4 - < book.txt
    rwkv-edge run model-int4 - -n 0 --save-state book.state < book.txt
    rwkv-edge run model-int4 "And then" --load-state book.state
    """
    from .runtime import open_bundle
    from .runtime.state import refuse_output

    if save_state:
        refuse_output(save_state)  # before the work, not after it
    if prompt == "-":
        prompt = _stdin()
    start = time.perf_counter()
    model = open_bundle(bundle, threads=threads)
    load_s = time.perf_counter() - start
    state = model.load_state(load_state) if load_state else None
    generation = model.generate(
        _ids(prompt) if ids else prompt,
        state,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
    )
    if sys.stdout.isatty() and not quiet and not ids and len(prompt) < 1000:
        _say(prompt, nl=False)
    try:
        for token in generation:
            click.echo(f"{token.id} " if ids else token.text, nl=False)
        if max_tokens:
            click.echo()
    finally:  # an interrupt keeps what was read
        if save_state:
            generation.state.save(save_state)
    _say(_stats(generation, load_s), quiet)


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the bundle here.  [default: removed]")
@click.option("--quant", type=click.Choice(["none", "fp16", "int8", "int4"]), default="int4", help="Width of the weights.")
@click.option("--prompt", default="Once upon a time", help="What to continue.")
@click.option("--seed", type=int, default=7, help="The same seed gives the same story.")
@force_option
@quiet_option
def demo(output: Path | None, quant: str, prompt: str, seed: int, force: bool, quiet: bool) -> None:
    """Go the whole way once: export, check and run a small model that comes along.

    The model has 7 million parameters and was trained on old children's books and simple stories: it can tell a story, and
    nothing else.
    """
    with tempfile.TemporaryDirectory() as folder:
        bundle = output or Path(folder, "stories")

        def step(*args: object) -> None:
            """Run one command as a process of its own: its figures are then its own."""
            _say(f"\n$ rwkv-edge {shlex.join(map(str, args))}", quiet)
            done = subprocess.run([sys.executable, "-m", "rwkv_edge.cli", *map(str, args), *["-q"] * quiet])
            if done.returncode:
                sys.exit(done.returncode)

        step("export", DEMO, "--quant", quant, "-o", bundle, *["--force"] * force)
        if not quiet:
            step("check", bundle, "--against", DEMO)
        if quiet or not sys.stdout.isatty():  # where run itself does not show it
            click.echo(prompt, nl=False)
            sys.stdout.flush()
        step("run", bundle, prompt, "--seed", seed)
    kept = f"The bundle is in {output}." if output else "The bundle was removed: keep the next one with -o FOLDER."
    _say(f"\n{kept}", quiet)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script.

    \b
    eval "$(rwkv-edge completion bash)"      in ~/.bashrc; likewise zsh
    rwkv-edge completion fish > ~/.config/fish/completions/rwkv-edge.fish
    """
    completer: Any = get_completion_class(shell)
    click.echo(completer(cli, {}, "rwkv-edge", "_RWKV_EDGE_COMPLETE").source())


# --- printing ---


def _say(text: str, quiet: bool = False, *, nl: bool = True) -> None:
    """A line for a person, on stderr; dim where that is a terminal, unless NO_COLOR is set."""
    if not quiet:
        click.secho(text, err=True, nl=nl, dim=True, color=False if os.environ.get("NO_COLOR") else None)


def _print_json(data: Any) -> None:
    def plain(x: Any) -> Any:
        return dataclasses.asdict(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else str(x)

    click.echo(json.dumps(plain(data), default=str, indent=1))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Columns on stdout: so many of words to the left, the others, of numbers, to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        click.echo("  ".join(cells).rstrip())


def _print_report(report: Any) -> None:
    click.echo(f"{report.bundle}: {report.n_tokens} tokens, against its own weights in float64")
    head = ("graph", "arithmetic", "tokens", "max", "rms", "KL", "top-1", "state", "")
    rows = [
        (
            row.file,
            row.arithmetic,
            row.fed,
            f"{row.own.max_abs:.1e}",
            f"{row.own.rms:.1e}",
            f"{row.own.kl:.1e}",
            f"{100 * row.own.top1:.1f} %",
            f"{row.state:.1e}",
            "ok" if row.ok else "WRONG",
        )
        for row in report.rows
    ]
    r = report.rounding
    rows.append(("numpy", "float32", "", f"{r.max_abs:.1e}", f"{r.rms:.1e}", f"{r.kl:.1e}", f"{100 * r.top1:.1f} %", "", ""))
    _table(head, rows, words=3)
    allowed = report.limits
    click.echo(
        "max, rms: of the logits, in their standard deviations; KL: nats a token; state: at most, in its own deviations.\n"
        f"Allowed: exact graphs {allowed['exact_max']:.1e} max, {allowed['exact_state']:.1e} state; with int8 activations "
        f"{allowed['int8_rms']} rms, and the graph must\nbe the exact one but for the rounding of activations."
    )
    verdict = "computes its own weights" if report.ok else "does NOT compute its own weights"
    click.echo(f"The bundle {verdict}.")
    if report.weights:
        click.echo("\nagainst the checkpoint: what quantization cost")
        costs = [("the weights alone", report.weights)]
        costs += [(f"{row.file}, {row.fed}", row.cost) for row in report.rows]
        _table(
            ("", "max", "rms", "KL", "top-1"),
            [(what, f"{d.max_abs:.1e}", f"{d.rms:.1e}", f"{d.kl:.1e}", f"{100 * d.top1:.1f} %") for what, d in costs],
        )


def _bytes(n: int) -> str:
    if n < 1_000_000:
        return f"{n / 1e3:.1f} kB"
    return f"{n / 1e6:.1f} MB" if n < 1_000_000_000 else f"{n / 1e9:.2f} GB"


def _written(written: Any, start: float) -> str:
    return (
        f"{written.path}: {_bytes(written.nbytes)}, {written.bits_per_weight:.2f} bits a weight, "
        f"{time.perf_counter() - start:.1f} s, model {written.model_id[:12]}"
    )


def _stats(generation: Any, load_s: float) -> str:
    s = generation.stats
    parts = [f"read {s.n_prompt} tokens at {s.n_prompt / s.prefill_s:.0f} tok/s"] if s.n_prompt else []
    if s.n_generated > 1:
        tok_s = s.n_generated / s.decode_s
        parts.append(f"wrote {s.n_generated} at {tok_s:.0f} tok/s ({tok_s * generation.bytes_per_token / 1e9:.1f} GB/s)")
    parts += [f"loaded in {load_s:.2f} s", f"peak memory {_bytes(_peak_bytes())}"]
    return ", ".join(parts)


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _progress(label: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1000, label=label, file=sys.stderr, show_pos=False) as bar:
        yield lambda done, total: bar.update(1000 * done // total - bar.pos)


def _beside(checkpoint: Path, suffix: str | None) -> Path:
    """The output's name, made from the input's: x.pth -> x-int4, and x-int4.safetensors -> x-int4."""
    from .checkpoints import open_checkpoint

    quantized = open_checkpoint(checkpoint).quantized  # what is no checkpoint may have no name either
    return checkpoint.with_name(checkpoint.stem + (suffix or ("" if quantized else "-int4")))


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as e:
        raise InputError(f"with --ids the prompt is token ids, such as '1 2 3': {e}") from e


def _stdin() -> str:
    if sys.stdin is None:
        raise InputError("stdin is closed: give the prompt as an argument")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"stdin is not UTF-8 text: {e.reason} at byte {e.start}") from e


def main() -> None:
    """The program: `cli`, with a Unix tool's manners towards signals."""
    for name, code in (("SIGTERM", 143), ("SIGHUP", 129)):  # so that half-written output is removed
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_, code=code: sys.exit(code))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our characters is no reason to fail
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
