"""What a person sees: lines, tables, progress, and a conversation.  Data goes to stdout, everything else to stderr."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

try:
    import termios
    import tty
except ImportError:  # on Windows
    termios = None  # type: ignore[assignment]

from .errors import CheckFailed, InputError, RwkvEdgeError

Progress = Callable[[int, int], None]


class Failure(click.ClickException):
    """One line on stderr, and the exit code."""

    def __init__(self, error: RwkvEdgeError) -> None:
        text = " ".join(str(error).split())
        super().__init__("".join(c if c.isprintable() else "?" for c in text))
        self.exit_code = 3 if isinstance(error, CheckFailed) else 1  # type: ignore[misc]


def say(text: str, quiet: bool = False, *, nl: bool = True) -> None:
    """A line for a person, on stderr; dim where that is a terminal, unless NO_COLOR is set."""
    if not quiet:
        click.secho(text, err=True, nl=nl, dim=True, color=False if os.environ.get("NO_COLOR") else None)


def is_terminal(stream: Any) -> bool:
    """Whether a person is at the other end; false of a stream that is closed."""
    return stream is not None and stream.isatty()


def printable(text: str) -> str:
    """A text that cannot command the terminal it is printed on: control characters, but for tabs and line ends, are U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def text_of(data: bytes, name: str) -> str:
    """Bytes from outside as text: UTF-8, with any line ends, and without a byte order mark.

    Raises  InputError
    """
    from .files import utf8  # which brings numpy, and no help page needs that

    return utf8(data, name).replace("\r\n", "\n").replace("\r", "\n")


def print_json(data: Any) -> None:
    def plain(x: Any) -> Any:
        return dataclasses.asdict(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else str(x)

    click.echo(json.dumps(data, default=plain, indent=1))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Columns on stdout: so many of words to the left, the others, of numbers, to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        click.echo("  ".join(cells).rstrip())


def print_inspection(path: object, found: Any, tensors: bool) -> None:
    """What a file holds, in groups or tensor by tensor."""
    spec, coreml = found.spec, bool(found.about or found.coreml)
    click.echo(f"{path}: RWKV-{spec['version']} {found.what}")
    sizes = "  ".join(f"{name} {value:,}" for name, value in spec.items() if name != "version")
    click.echo(f"{found.n_parameters:,} parameters  {sizes}")
    if found.settings:
        click.echo("unusual settings  " + "  ".join(f"{name} {value:g}" for name, value in found.settings.items()))
    click.echo(f"state {size(found.state_bytes)}{', in float16' if coreml else ''}")
    for note in found.notes:
        click.echo(printable(note))
    click.echo()
    if found.about:
        about = found.about
        packages = "1 package" if about["packages"] == 1 else f"{about['packages']} packages"
        click.echo(
            f"profile {about['profile']}, {about['state']} state, {packages}: decode takes 1 token, prefill {about['T']}; "
            f"iOS {about['needs']['ios']}, macOS {about['needs']['macos']}\n"
        )
    elif found.coreml:
        _print_coreml_forecasts(found)
    elif found.forecasts:
        _print_forecasts(found)
    rows = found.rows if tensors else found.grouped
    cells = [(r.name, str(r.n), "x".join(map(str, r.shape)), r.recipe, size(r.nbytes)) for r in rows]
    table(("tensor", "n", "shape", found.column, "size"), cells)
    click.echo(f"\n{size(found.nbytes)} of weights, {8 * found.nbytes / found.n_parameters:.2f} bits each")


def _print_coreml_forecasts(found: Any) -> None:
    """What each recipe takes of a disk; the rest is for a Mac to tell."""
    head = ("recipe", "profile", "bundle", "bits", "packages", "largest")
    rows = [
        (f.recipe, f.profile, size(f.nbytes), f"{f.bits_per_weight:.2f}", str(f.packages), size(f.largest_bytes))
        for f in found.coreml
    ]
    table(head, rows, words=2)
    click.echo(
        "\nA forecast for Core ML. bundle: on disk. bits: per weight. largest: of the packages, its weights.\n"
        "What it takes of memory and how fast it is, only a Mac or a phone can tell.\n"
    )


def _print_forecasts(found: Any) -> None:
    """What each recipe takes, and how the speeds were come by."""
    asked = found.forecasts[0].fits is not None
    threads = list(found.bandwidth)
    head = ["recipe", "bundle", "bits", "memory", "anon", "read", *(f"tok/s on {n}" for n in threads), *["fits"] * asked]
    rows = [
        (
            f.recipe,
            size(f.nbytes),
            f"{f.bits_per_weight:.2f}",
            size(f.peak_bytes),
            size(f.anonymous_bytes),
            size(f.read_bytes),
            *(f"{float(f'{f.tok_s[n]:.2g}'):g}" for n in threads),  # two digits are all it knows
            *["yes" if f.fits else "no"] * asked,
        )
        for f in found.forecasts
    ]
    table(head, rows)
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s on {n}" for n, rate in found.bandwidth.items())
    click.echo(
        "\nA forecast, with onnxruntime. bundle: on disk. bits: per weight. memory: at most, reading a long\n"
        "prompt; anon: of it, backed by no file. read: weights for one token, as they are held. tok/s: to\n"
        f"decode on so many threads here, where numpy just read memory at {rates}.\n"
    )


def print_report(report: Any) -> None:
    click.echo(f"{report.bundle}: {report.n_tokens} tokens, against its own weights in float64")
    head = ("graph", "arithmetic", "tokens", "n", "max", "rms", "KL", "top-1", "state", "")
    rows = [
        (row.file, row.arithmetic, row.fed, *_difference(row.own), f"{row.state:.1e}", "ok" if row.ok else "WRONG")
        for row in report.rows
    ]
    rows.append(("numpy", "float32", "", *_difference(report.rounding), "", ""))
    table(head, rows, words=3)
    allowed = report.limits
    click.echo(
        "n: tokens whose logits are compared. max, rms: of these, in their deviations; KL: nats a token;\n"
        "state: at most, in its own deviations.\n"
        + (
            f"Allowed: exact graphs {allowed['exact_max']:.1e} max, {allowed['exact_state']:.1e} state; with int8 activations "
            f"{allowed['int8_rms']} rms,\nand the graph must be the exact one but for the rounding of activations."
            if "int8_rms" in allowed
            else f"Allowed: exact, in float64, {allowed['exact_max']:.0e}; native, in float16 as the file says, "
            f"KL {allowed['native_kl']}, state {allowed['native_state']:g}.\n"
            "Computed from the packages' own files by our interpreter: what Core ML does with them, only a\n"
            "Mac shows. Prefill gives the logits of its last token alone."
        )
    )
    if report.packages is not None:
        said = f"NOT: {', '.join(report.packages)}" if report.packages else "all of them"
        click.echo(f"Packages that are what this release writes for these weights: {said}.")
    if report.weights:
        click.echo("\nagainst the checkpoint: what quantization cost")
        costs = [("the weights alone", report.weights)]
        # Core ML's rows in float64 are the weights alone
        runs = [row for row in report.rows if not ("native_kl" in allowed and row.arithmetic == "exact")]
        costs += [(f"{row.file}, {row.fed}", row.cost) for row in runs]
        table(
            ("", "n", "max", "rms", "KL", "top-1"),
            [(what, *_difference(d)) for what, d in costs],
        )
        click.echo()
    rounded = "float16" if "native_kl" in allowed else "8-bit activations"
    for what, cost in (("weights cost", report.weights), (f"arithmetic ({rounded}) costs", report.arithmetic)):
        if cost:
            click.echo(
                f"The {what} a KL of {cost.kl:.2g} nats per token; the likeliest token is the same at {100 * cost.top1:.1f} %."
            )
    for warning in report.warnings:
        click.echo(f"Warning: {warning}.")
    _print_proof(report)


def _print_proof(report: Any) -> None:
    """What is proven of the weights, and what is not."""
    proof = report.proof
    for name, reason in proof.faults.items():
        click.echo(f"WRONG  {name}: {reason}")
    if proof.compared:
        right = proof.n_tensors - len(proof.faults)
        click.echo(f"Tensors that are the checkpoint's, as their methods declare: {right} of {proof.n_tensors}.")
    if proof.n_blocks:
        click.echo(f"Blocks and tables that quantizing again gives: {proof.n_same:,} of {proof.n_blocks:,}.")
        if proof.n_same < proof.n_blocks and not proof.faults:
            click.echo("The others are no worse: another processor rounds sums in another order.")
    verdict = "computes its own weights" if report.computes else "does NOT compute its own weights"
    if proof.compared:
        origin = "They are NOT the checkpoint's" if proof.faults else "They are the checkpoint's"
    elif proof.faults:
        origin = "They are NOT what this release reads"
    else:
        origin = "Not compared with the checkpoint's: give --against"
    click.echo(f"The bundle {verdict}. {origin}.")


def _difference(d: Any) -> tuple[str, ...]:
    return str(d.n), f"{d.max_abs:.1e}", f"{d.rms:.1e}", f"{d.kl:.1e}", f"{100 * d.top1:.1f} %"


def size(n: int) -> str:
    if n < 1_000_000:
        return f"{n / 1e3:.1f} kB"
    return f"{n / 1e6:.1f} MB" if n < 1_000_000_000 else f"{n / 1e9:.2f} GB"


def written_line(written: Any, start: float) -> str:
    return (
        f"{written.path}: {size(written.nbytes)}, {written.bits_per_weight:.2f} bits a weight, "
        f"{time.perf_counter() - start:.1f} s, model {written.model_id[:12]}"
    )


def stats_line(model: Any, generation: Any, load_s: float | None = None) -> str:
    """What a generation took: tokens, speeds, loading if that was for its sake, memory."""
    from .bench import memory

    s = generation.stats
    parts = [f"read {_tokens(s.n_prompt)} at {_tok_s(s.n_prompt / s.prefill_s)} tok/s"] if s.n_prompt else []
    if s.n_generated > 1:
        tok_s = s.n_generated / s.decode_s
        rate = "" if model.interpreted else f" ({tok_s * model.bytes_per_token / 1e9:.1f} GB/s)"
        parts.append(f"wrote {s.n_generated} at {_tok_s(tok_s)} tok/s{rate}")
    if load_s is not None:
        parts.append(f"loaded in {load_s:.2f} s")
    peak, _ = memory()
    return ", ".join(parts + ([f"peak {size(peak)}"] if peak else []))


def _tokens(n: int) -> str:
    return f"{n} token" if n == 1 else f"{n} tokens"


def figure(x: Any, digits: int, factor: float = 1, unit: str = "", *, signed: bool = False) -> str:
    """An estimate with its error."""
    if x is None:
        return ""
    value = round(factor * x.value, digits) + 0.0  # no negative zero
    error = "" if x.error is None else f" ± {factor * x.error:.{digits}f}"
    return f"{value:{'+' if signed else ''}.{digits}f}{error}{unit}"


def print_scores(found: Any) -> None:
    first, passages = found.scores[0].name, "passage" if found.n_documents == 1 else "passages"
    click.echo(f"{found.n_predictions:,} predictions, {found.n_bytes:,} bytes of text, {found.n_documents} {passages}\n")
    head: tuple[str, ...] = ("", "perplexity", "bits/byte")
    rows: list[tuple[str, ...]] = []
    apart = [s for s in found.scores if s.arithmetic]
    if len(found.scores) == 1 and not apart:
        table(head, [_score(found.scores[0])[:3]])
        return
    for s in found.scores:
        rows.append(_score(s))
        parts = (("  weights", s.weights), ("  arithmetic", s.arithmetic)) if s.arithmetic else ()
        rows += [(name, "", "", *_cost(part)) for name, part in parts if part]
    table((*head, "cost", "KL", "same top"), rows)
    beside = f"Beside {first}: " if len(found.scores) > 1 else ""
    click.echo(f"\n{beside}cost, in perplexity; KL, nats a token; same top, how often the likeliest token agrees.")
    if apart and beside:
        click.echo("weights: with both in exact arithmetic.")
    if apart:
        click.echo("arithmetic: 8-bit activations, beside exact arithmetic on the same weights.")
    if any(s.percent and abs(s.percent.value) < 2 * (s.percent.error or 0) for s in found.scores):
        click.echo("A cost below twice its error may be chance: use a longer text.")
    for warning in found.warnings:
        click.echo(f"Warning: {warning}.")


def _score(s: Any) -> tuple[str, ...]:
    return s.name, figure(s.perplexity, 3), figure(s.bits_per_byte, 4), *_cost(s)


def _cost(c: Any) -> tuple[str, ...]:
    return figure(c.percent, 2, 1, " %", signed=True), figure(c.kl, 5), figure(c.top1, 1, 100, " %")


def print_words(words: Sequence[Any], n: int) -> None:
    click.echo(f"the last words of {n} documents\n")
    table(("", "accuracy", "perplexity"), [(w.name, figure(w.accuracy, 1, 100, " %"), figure(w.perplexity, 2)) for w in words])


def print_bench(found: Sequence[Any]) -> None:
    f = found[0]
    head: tuple[str, ...] = ("", "MB", "bits", "threads", f"prefill {f.n_prefill}", f"decode {f.n_decode}", "GB/s")
    head += ("load", "first", "peak", "anon", "redone")
    rows = []
    for b in found:
        redone = f"{b.prefill.disturbed}+{b.decode.disturbed}" + "!" * (not (b.prefill.trusted and b.decode.trusted))
        rows.append(
            (
                b.name,
                _mb(b.nbytes),
                f"{b.bits_per_weight:.2f}",
                str(b.n_threads),
                *(f"{_tok_s(s.median)} {_tok_s(min(s.tok_s))}-{_tok_s(max(s.tok_s))}" for s in (b.prefill, b.decode)),
                f"{b.gb_s:.1f}",
                f"{b.load_s:.2f}",
                f"{b.first_token_s:.2f}",
                _mb(b.peak_bytes),
                _mb(b.anonymous_bytes),
                redone,
            )
        )
    table(head, rows)
    click.echo(
        "\nMB: the bundle. bits: per weight. prefill, decode: tok/s, median and range. GB/s: weights that\n"
        "decode reads. load: seconds to open it. first: seconds from nothing to the first token after the\n"
        "prompt. peak: MB of memory; anon: of it, backed by no file. redone: repetitions that other\n"
        "programs disturbed, of prefill + decode."
    )
    if any("!" in row[-1] for row in rows):
        click.echo("! Disturbed even so, by more than a tenth of the processors' time: do not trust this row.")


def _tok_s(x: float) -> str:
    """A speed in three digits or all that it has before the point: a large model writes less than a token a second."""
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}"


def _mb(n: int | None) -> str:
    return "?" if n is None else f"{n / 1e6:.1f}" if n < 10_000_000 else f"{n / 1e6:.0f}"


@contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal."""
    if quiet or not is_terminal(sys.stderr):
        yield None
        return
    with click.progressbar(length=1000, label=label, file=sys.stderr, show_pos=False) as bar:
        yield lambda done, total: bar.update(1000 * done // total - bar.pos)


def record(prompt: str | list[int], tokens: list[Any], generation: Any) -> dict[str, Any]:
    """A generation as JSON has it."""
    return {
        "prompt": prompt,
        "text": "".join(token.text for token in tokens),
        "finish": generation.finish,
        "tokens": [dataclasses.asdict(token) for token in tokens],
        "stats": dataclasses.asdict(generation.stats),
    }


def print_token(model: Any, token: Any, ids: bool, logprobs: int | None) -> None:
    if logprobs is None:
        text = printable(token.text) if is_terminal(sys.stdout) else token.text
        click.echo(f"{token.id} " if ids else text, nl=False)
        return

    def name(i: int) -> str:
        return f"{i}" if model.tokenizer is None else f"{i} {json.dumps(model.tokenizer.decode([i]), ensure_ascii=False)}"

    rest = "".join(f"   {p:.3f} {name(i)}" for i, p in token.top)
    click.echo(f"{token.logprob:8.3f} {name(token.id):24}{'|' * bool(rest)}{rest}".rstrip())


# --- a conversation ---

_CHAT_HELP = """\
/save FILE   write the conversation's state
/load FILE   go on from one
/undo        take the last turn, or /load, back
/reset       begin anew
/stats       how long the conversation is, and what it takes
/quit        end, as Ctrl-D does
Lines that are pasted together are one message.
A line that ends with \\ goes on in the next one. Ctrl-C ends a reply."""


def converse(model: Any, talk: Any, load_s: float, quiet: bool) -> None:
    """Take turns until the end of stdin."""
    if sys.stdin is None:
        raise InputError("stdin is closed: a conversation needs it")
    if is_terminal(sys.stdin):
        say("Ctrl-D ends, /help tells more.", quiet)
    spoken = False
    while True:
        try:
            text = _turn()
        except InputError as e:
            if not is_terminal(sys.stdin):
                raise
            Failure(e).show()
            continue
        except EOFError:
            if is_terminal(sys.stdin):
                click.echo(err=True)
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends.", quiet)
            continue
        command, _, rest = text.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command.startswith("/") and "\n" not in text.strip():
                say(_chat_command(model, talk, command, rest.strip()))
            elif text.strip():
                with _typed_meanwhile_is_dropped():
                    _reply(talk.say(text))
                say(stats_line(model, talk.generation, None if spoken else load_s) + "\n", quiet)
                spoken = True
        except KeyboardInterrupt:
            kept = talk.generation is not None and talk.generation.stats.n_generated
            say("\n(interrupted: the conversation goes on from here)" if kept else "\n(interrupted: not read)\n", quiet)
            if kept:
                say(stats_line(model, talk.generation, None if spoken else load_s) + "\n", quiet)
                spoken = True
        except RwkvEdgeError as e:  # a typing error must not end a conversation
            if not is_terminal(sys.stdin):
                raise
            Failure(e).show()


def _turn() -> str:
    """One message: a line, or several that were pasted together, or with \\ at the end of all but the last."""
    text = ""
    while True:
        try:
            line = _line("... " if text else "> ")
        except EOFError:
            if text and not is_terminal(sys.stdin):
                return text
            raise
        with contextlib.suppress(EOFError):
            while _is_pasting():
                line += "\n" + _line("... ")
        text += line.removesuffix("\\")
        if not line.endswith("\\"):
            return text
        text += "\n"


def _line(prompt: str) -> str:
    """A line of stdin; of a terminal's line editor, all that was pasted into it."""
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        try:
            return input(prompt) if _edit_lines() else _PLAIN.line(prompt).decode()
        except UnicodeDecodeError as e:
            raise InputError(f"that was not UTF-8 text: {e.reason}") from e
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    return text_of(data, "stdin").removesuffix("\n")


@functools.cache
def _edit_lines() -> bool:
    """Give input() its line editor and history; False where Python has none."""
    try:
        import readline
    except ImportError:
        return termios is None  # on Windows the console has one
    if "libedit" not in (readline.__doc__ or ""):  # as on macOS: it takes a paste line by line
        readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
    return True


class _PlainLines:
    """Lines of a terminal without a line editor. input() would leave in C's buffer, unseen, what came with the first line.

    data  read, and not yet given
    """

    data = b""

    def line(self, prompt: str) -> bytes:
        click.echo(prompt, nl=False)
        while b"\n" not in self.data and (new := os.read(sys.stdin.fileno(), 1 << 16)):
            self.data += new
        if not self.data:
            raise EOFError
        line, _, self.data = self.data.partition(b"\n")
        return line


_PLAIN = _PlainLines()


def _is_pasting() -> bool:
    """Whether the next line is there before a person can have typed it: a terminal may give a paste line by line."""
    if termios is None or not is_terminal(sys.stdin):
        return False
    if _PLAIN.data:
        return True
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSANOW)  # otherwise a last line without an end would not be seen
        return bool(select.select([sys.stdin], [], [], _PASTE_S)[0])
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


_PASTE_S = 0.05


@contextmanager
def _typed_meanwhile_is_dropped() -> Iterator[None]:
    """What is typed while a reply comes is not a message. What is piped is."""
    try:
        yield
    finally:
        if termios is not None and is_terminal(sys.stdin):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)
            _PLAIN.data = b""


def _reply(pieces: Any) -> None:
    """Print a reply as it comes, its thought dim."""
    said = ""
    with contextlib.closing(pieces):
        for piece in pieces:
            said += piece
            thought = said.startswith("<think") and "</think>" not in said.removesuffix(piece)
            piece = printable(piece) if is_terminal(sys.stdout) else piece
            click.echo(click.style(piece, dim=True) if thought and not os.environ.get("NO_COLOR") else piece, nl=False)
    click.echo()


def _chat_command(model: Any, talk: Any, command: str, rest: str) -> str:
    """Do what a line that begins with / asks for: what to say of it."""
    if command in ("/save", "/load"):
        if not rest:
            raise InputError(f"{command} needs a file's name")
        getattr(talk, command[1:])(Path(rest).expanduser())
        return f"{rest}: {_tokens(talk.state.n_tokens)}"
    if command == "/undo":
        return "the last turn, or /load, is taken back" if talk.undo() else "there is no turn to take back"
    if command == "/reset":
        talk.reset()
        return "the conversation begins anew"
    if command == "/stats":
        n = talk.state.n_tokens if talk.state else 0
        last = f"; last reply: {stats_line(model, talk.generation)}" if talk.generation else ""
        return f"{_tokens(n)} in a state of {size(model.spec.state_bytes)}{last}"
    if command == "/help":
        return _CHAT_HELP
    raise InputError(f"{command} is unknown: /help lists what there is")
