"""The command line: parse, call one library function, print.  Data goes to stdout, everything else to stderr."""

import contextlib
import errno
import functools
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from . import __version__
from .errors import InputError, OutputError, RwkvEdgeError
from .terminal import (
    Failure,
    converse,
    is_terminal,
    print_bench,
    print_inspection,
    print_json,
    print_report,
    print_scores,
    print_token,
    print_words,
    printable,
    progress_bar,
    record,
    say,
    stats_line,
    text_of,
    written_line,
)

DEMO = Path(__file__).parent / "demo" / "rwkv7-stories-7m.pth"
DEMO_MODEL = "dcb32dac250a591fd12cd9251f61dfacfa99ff6afc24fc87d058d9eea4eeb1f6"  # its model_id


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
            raise _failure(e) from e


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
)
@click.version_option(__version__, "--version", message="rwkv-edge %(version)s")
def cli() -> None:
    """Take an RWKV language model from its checkpoint to an app.

    \b
    rwkv-edge demo                                    the whole way once, on a small model that comes along
    rwkv-edge inspect model.pth                       what is in a checkpoint, and what would be made of it
    rwkv-edge export model.pth --quant int4           write model-int4/, a bundle for onnxruntime
    rwkv-edge check model-int4 --against model.pth    prove that it is still the same model
    rwkv-edge run model-int4 "Once upon a time"       let it speak
    rwkv-edge eval model-int4 --against model.pth     how well it predicts text, beside the original
    rwkv-edge bench model-int4                        how fast it is here
    """


# --- options that several commands share ---

force_option = click.option("-f", "--force", is_flag=True, help="Replace the output if it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print nothing on stderr but errors.")
exact_option = click.option(
    "--exact",
    is_flag=True,
    help="Compute in exact arithmetic, where the bundle rounds activations to 8 bits. Slow with int8 weights.",
)
interpret_option = click.option("--interpret", is_flag=True, help="Compute Core ML bundles in numpy: slowly, but anywhere.")
threads_option = click.option(
    "--threads", metavar="N", type=click.IntRange(1, 256), help="Threads for matrix products.  [default: every core]"
)
load_state_option = click.option(
    "--load-state", type=click.Path(path_type=Path), help="Go on from a state file, prompt or not."
)
lora_option = click.option(
    "--lora",
    metavar="FILE[:ALPHA]",
    help="Merge a LoRA, PiSSA or MiSS. ALPHA is a LoRA's alpha, or a PiSSA's init_pissa.pth.  [default: none; ALPHA: what lies "
    "beside]",
)
checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path))
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
bundles_argument = click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))


def quant_options(default: str | None, *extra: str) -> Callable[[Any], Any]:
    """--quant, --block and --override."""

    def decorate(command: Any) -> Any:
        # tables and their smaller groups are of Core ML, and so of `export` alone
        quants = click.Choice(["none", "fp16", "int8", "int4", *extra])
        blocks = click.Choice([*(["1", "2", "4", "8"] if extra else []), "16", "32", "64", "128", "256"])
        text = "Width of the weights." + ("" if default else "  [default: int4, or what the file has]")
        if extra:
            text = "Width of the weights; lut are tables, for coreml.  [default: int4, or what the file has; ane: lut6]"
        for option in (
            click.option(
                "--override",
                "overrides",
                multiple=True,
                metavar="NAME=BITS[:BLOCK]",
                help=_OVERRIDE + (" With coreml 4, 6, 8 or 16, without a block." if extra else ""),
            ),
            click.option(
                "--block",
                type=blocks,
                callback=lambda ctx, param, value: value and int(value),
                help=_BLOCK + ("  [default: 32; lut: 16 rows that share a table]" if extra else "  [default: 32]"),
            ),
            click.option("--quant", type=quants, default=default, help=text),
        ):
            command = option(command)
        return command

    return decorate


def sampling_options(command: Any) -> Any:
    """How the next token is chosen: what is given arrives as `settings`."""
    share, part, number = click.FloatRange(0, 1, min_open=True), click.FloatRange(0, 1), click.FloatRange(-10000, 10000)
    whole = click.IntRange(0)

    def setting(*names: str, metavar: str, type: Any, help: str) -> Any:  # noqa: A002 (click's words)
        return click.option(*names, metavar=metavar, type=type, help=f"{help}  [default: the bundle's]")

    options = (
        setting("-t", "--temperature", metavar="X", type=click.FloatRange(0), help="0 takes the most likely token."),
        setting("--top-k", metavar="N", type=whole, help="Keep the N most likely tokens; 0 keeps all."),
        setting("--top-p", metavar="P", type=share, help="Keep the most likely tokens, up to a probability of P."),
        setting("--min-p", metavar="P", type=part, help="Keep tokens at least P times as likely as the likeliest."),
        setting("--typical-p", metavar="P", type=share, help="Keep the tokens whose surprise is nearest to the expected one."),
        setting("--presence-penalty", metavar="X", type=number, help="Subtracted from the logits of generated tokens."),
        setting("--frequency-penalty", metavar="X", type=number, help="Subtracted again for every time they were generated."),
        setting("--penalty-decay", metavar="X", type=part, help="Factor on these times with every further token."),
        click.option("--ban", multiple=True, metavar="TOKEN", help="Never choose it: an id, or its text. May be given again."),
        click.option("--bias", multiple=True, metavar="TOKEN=X", help="Add X to its logit. May be given again."),
        click.option(
            "--seed", metavar="N", type=whole, help="The same seed gives the same text.  [default: another each time]"
        ),
    )
    probe: Any = functools.reduce(lambda f, option: option(f), options, lambda: None)
    names = [parameter.name for parameter in probe.__click_params__]

    @functools.wraps(command)
    def collected(**given: Any) -> Any:
        settings = {name: given.pop(name) for name in names}
        return command(settings={name: x for name, x in settings.items() if x not in (None, ())}, **given)

    for option in reversed(options):
        collected = option(collected)
    return collected


_BLOCK = "Weights that share one scale: fewer lose less, more are smaller and faster."
_OVERRIDE = (
    "4, 8, 16 or 32 bits for the tensors whose names match, such as blocks.*.ffn.*=8. May be given again: the last counts."
)


# --- commands ---


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["onnx", "coreml"]), default="onnx", help="What to forecast for.")
@click.option("--profile", type=click.Choice(["ane", "gpu"]), help="With coreml: this one alone.  [default: both]")
@quant_options(None, "lut4", "lut6")
@click.option(
    "--fits",
    metavar="SIZE",
    help="Say what runs with onnxruntime in this much memory, such as 4GB or 512MiB; exit 3 if nothing.",
)
@click.option("--tensors", is_flag=True, help="List every tensor; otherwise layers are summed up.")
@json_option
def inspect(
    path: Path,
    target: str,
    profile: str | None,
    quant: str | None,
    block: int | None,
    overrides: tuple[str, ...],
    fits: str | None,
    tensors: bool,
    as_json: bool,
) -> None:
    """Tell what a checkpoint or a bundle holds, would become, and takes.

    \b
    rwkv-edge inspect model.pth
    rwkv-edge inspect model.pth --quant int4 --block 128 --override head.weight=8
    rwkv-edge inspect model.pth --fits 4GB
    rwkv-edge inspect model.pth --target coreml
    """
    from .forecast import parse_size
    from .inspection import inspect as look

    memory = None if fits is None else parse_size(fits)
    options: dict[str, Any] = dict(target=target, profile=profile, quant=quant, block=block, overrides=overrides)
    found = look(path, memory=memory, **options)
    if as_json:
        print_json(found)
    else:
        print_inspection(path, found, tensors)
    if memory is not None and not any(f.fits for f in found.forecasts):
        sys.exit(3)


@cli.command()
@checkpoint_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: CHECKPOINT-QUANT.safetensors]")
@quant_options("int4")
@lora_option
@force_option
@quiet_option
def quantize(
    checkpoint: Path,
    output: Path | None,
    quant: str,
    block: int | None,
    overrides: tuple[str, ...],
    lora: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write a quantized checkpoint, to export from later.

    \b
    rwkv-edge quantize model.pth --quant int4 -o model-int4.safetensors
    rwkv-edge quantize model.pth --lora poems.pth:32 -o poems-int4.safetensors
    """
    from .convert import quantize as write

    output = output or _beside(checkpoint, f"-{quant}.safetensors")
    options: dict[str, Any] = dict(quant=quant, block=block, overrides=overrides, lora=lora, force=force)
    _write("quantizing", quiet, functools.partial(write, checkpoint, output, **options))


@cli.command()
@checkpoint_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: CHECKPOINT-QUANT; with coreml: CHECKPOINT-PROFILE-QUANT]",
)
@click.option("--target", type=click.Choice(["onnx", "coreml"]), default="onnx", help="What will run it.")
@click.option(
    "--profile",
    type=click.Choice(["ane", "gpu"]),
    help="With coreml: for the Neural Engine, or for the GPU.  [default: ane]",
)
@click.option(
    "--coreml-state",
    type=click.Choice(["explicit", "packed"]),
    help="With coreml: the state goes in and out, or Core ML keeps it as one tensor.  [default: explicit]",
)
@click.option(
    "--part-bytes",
    metavar="SIZE",
    help="With coreml: split into packages of about this size, such as 500MB.  [default: 1GiB with ane; gpu: whole]",
)
@quant_options(None, "lut4", "lut6")
@click.option(
    "--calibrate",
    metavar="TEXT",
    type=click.Path(path_type=Path),
    help="With lut4 and lut6: a text file to measure on which inputs matter more (its first 8192 tokens).",
)
@lora_option
@click.option(
    "--initial-state",
    type=click.Path(path_type=Path),
    help="A state-tuned file, from which every text then begins.  [default: zeros]",
)
@click.option(
    "--wkv",
    type=click.Choice(["attention", "plain", "step"]),
    help="With onnx, how the recurrence is computed: by onnxruntime's own operator, the fastest; by plain operations; "
    "or by plain operations that take one token a call.  [default: attention]",
)
@click.option(
    "--arithmetic",
    type=click.Choice(["int8", "exact"]),
    help="With onnx: round activations of quantized matrices to 8 bits, the fastest, or compute in float32.  [default: int8]",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A file, world (built in), or none.  [default: the checkpoint's own, one beside it, or world by size]",
)
@click.option(
    "--template",
    type=click.Choice(["none", "rwkv", "chatml"]),
    help="Chat template: rwkv is User: and Assistant:.  [default: the checkpoint's, or rwkv with World]",
)
@force_option
@quiet_option
def export(
    checkpoint: Path,
    output: Path | None,
    target: str,
    profile: str | None,
    coreml_state: str | None,
    part_bytes: str | None,
    quant: str | None,
    block: int | None,
    overrides: tuple[str, ...],
    calibrate: Path | None,
    lora: str | None,
    initial_state: Path | None,
    wkv: str | None,
    arithmetic: str | None,
    tokenizer: Path | None,
    template: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Write a bundle: the folder that an app needs to run the model.

    \b
    rwkv-edge export model.pth --quant int4
    rwkv-edge export model.pth --quant int4 --block 128 --override head.weight=8 -o phone
    rwkv-edge export model-int4.safetensors
    rwkv-edge export model.pth --lora poems.pth:32 -o poems-int4
    rwkv-edge export model.pth --initial-state poet.pth -o poet-int4
    rwkv-edge export model.pth --target coreml --profile ane --quant lut4
    """
    from .convert import export as write

    if target == "coreml":
        from .quantize import COREML_DEFAULTS

        p = profile or "ane"
        packed = "-packed" if coreml_state == "packed" else ""
        output = output or _beside(checkpoint, f"-{p}-{quant or COREML_DEFAULTS[p]}{packed}")
    output = output or _beside(checkpoint, f"-{quant}" if quant else None)
    options: dict[str, Any] = dict(
        quant=quant, block=block, overrides=overrides, force=force, wkv=wkv, tokenizer=tokenizer, template=template
    )
    options |= dict(
        arithmetic=arithmetic, lora=lora, initial_state=initial_state, target=target, profile=profile, coreml_state=coreml_state
    )
    if part_bytes:
        from .forecast import parse_size

        options["part_bytes"] = parse_size(part_bytes)
    if calibrate:
        from .evaluate import documents

        options["calibrate"] = documents(calibrate)
    _write("exporting", quiet, functools.partial(write, checkpoint, output, **options))


@cli.command()
@bundle_argument
@click.option(
    "--against", type=click.Path(path_type=Path), help="The checkpoint it was made from: compare weights and measure the cost."
)
@lora_option
@click.option(
    "-n",
    "--tokens",
    "n_tokens",
    metavar="N",
    type=click.IntRange(2, 65536),
    help="Tokens to compare.  [default: 320; Core ML: 64]",
)
@threads_option
@json_option
@quiet_option
def check(
    bundle: Path,
    against: Path | None,
    lora: str | None,
    n_tokens: int | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that a bundle computes its own weights, and that they are its checkpoint's.

    Reads the weights from the bundle's files, runs the step in numpy in float64, and holds every graph against it, reading
    tokens one by one and in chunks. Differences are in standard deviations of the logits. Exits with 3 if a graph is
    further off than float32 explains; what weights and arithmetic cost is shown, and is no failure. Core ML's packages are
    interpreted, slowly, and in float64 must agree to 1e-10.

    With --against, every tensor is compared with the checkpoint's too: floats rounded exactly, codes and scales as their
    method declares and as quantizing again gives them. Exits with 3 and the tensor's name if one is not. Without it, a
    bundle of other weights passes.

    \b
    rwkv-edge check model-int4 --against model.pth
    """
    from .check import check as compare

    _refuse_alone(lora, against)
    with progress_bar("checking", quiet) as progress:
        report = compare(bundle, against, lora=lora, n_tokens=n_tokens, threads=threads, progress=progress)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    report.raise_if_failed()


@cli.command()
@bundle_argument
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "--file", "files", multiple=True, type=click.Path(path_type=Path), help="Read a prompt from a file. May be given again."
)
@click.option("--lines", type=click.Path(path_type=Path), help="Take every line of a file as a prompt.")
@click.option("-n", "--max-tokens", type=click.IntRange(0), default=128, metavar="N", help="Tokens to generate at most.")
@sampling_options
@click.option("--stop", multiple=True, help="End before this text. May be given again.")
@click.option(
    "--logprobs",
    type=click.IntRange(0),
    metavar="N",
    help="A line a token: its logprob by the model, and the N likeliest.",
)
@click.option("--ids", is_flag=True, help="Prompts are token ids, and token ids are printed: for bundles without a tokenizer.")
@load_state_option
@click.option("--save-state", type=click.Path(path_type=Path), help="Write, or replace, a state file at the end.")
@threads_option
@exact_option
@interpret_option
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for every prompt.")
@quiet_option
def run(
    bundle: Path,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    lines: Path | None,
    max_tokens: int,
    settings: dict[str, Any],
    stop: tuple[str, ...],
    logprobs: int | None,
    ids: bool,
    load_state: Path | None,
    save_state: Path | None,
    threads: int | None,
    exact: bool,
    interpret: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a text.

    PROMPT - is stdin, a whole book if you like. Of stdin and of files, one line end at the end is left out. An empty prompt
    begins a text, or goes on from a state. Several prompts are continued one by one, each from the same state.

    \b
    rwkv-edge run model-int4 "Once upon a time"
    rwkv-edge run model-int4 - -n 0 --save-state book.state < book.txt
    rwkv-edge run model-int4 --load-state book.state
    rwkv-edge run model-int4 " And then" --load-state book.state
    rwkv-edge run model-int4 --lines prompts.txt --json --seed 1 > out.jsonl
    rwkv-edge run model-int4 "A" --logprobs 5 -n 3 --ban " the" --bias 11=-2

    A TOKEN to ban or to bias is an id, or a text that is one token; in JSON's quotes, '"5"', where it would be taken for an id.
    """
    from .runtime.state import refuse_output

    texts = _prompts(prompts, files, lines, needed=not load_state)
    if save_state and len(texts) > 1:
        raise InputError("--save-state goes with one prompt: each has a state of its own")
    if save_state:
        refuse_output(save_state)  # before the work, not after it
    model, load_s = _open(bundle, threads, exact, interpret)
    state = model.load_state(load_state) if load_state else None
    settings = _by_id(model, settings)
    reads = [model.prompt_ids(_ids(text) if ids else text, state).tolist() for text in texts]
    speaks = not (as_json or ids or logprobs is not None)
    for n, (text, tokens) in enumerate(zip(texts, reads, strict=True)):
        generation = model.generate(tokens, state, max_tokens=max_tokens, stop=stop, top_logprobs=logprobs or 0, **settings)
        if speaks and len(text) < 1000:
            if is_terminal(sys.stdout) and not quiet:
                say(printable(text), nl=False)
            elif len(texts) > 1:
                click.echo(text, nl=False)  # or nobody could tell which is whose
        ended, tokens_given = False, []
        try:
            if len(tokens) > 2048 and max_tokens:
                with progress_bar("reading", quiet) as progress:
                    generation.prefill(progress)
            if as_json:
                tokens_given.extend(generation)
                click.echo(json.dumps(record(tokens if ids else text, tokens_given, generation)))
            else:
                for token in generation:
                    print_token(model, token, ids, logprobs)
                if (max_tokens or len(texts) > 1) and logprobs is None:
                    click.echo()
            ended = True
        except KeyboardInterrupt:
            generation.cut()
            if as_json and tokens_given:
                click.echo(json.dumps(record(tokens if ids else text, tokens_given, generation)))
            elif speaks:
                click.echo()
            raise
        finally:
            if save_state and (ended or generation.stats.n_prompt):  # an interrupt keeps what was said
                generation.state.save(save_state)
            elif save_state:
                say(f"{save_state} is not written: the prompt was not read to its end", quiet)
            say(stats_line(model, generation, None if n else load_s), quiet)


@cli.command()
@bundle_argument
@click.option("--system", help="What the model is told at the start.  [default: nothing]")
@click.option(
    "--think",
    type=click.Choice(["none", "fast", "think"]),
    default="none",
    help="Answer at once, after an empty thought, or after thinking aloud.",
)
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=2048, metavar="N", help="Tokens of a reply at most.")
@sampling_options
@load_state_option
@exact_option
@interpret_option
@threads_option
@quiet_option
def chat(
    bundle: Path,
    system: str | None,
    think: str,
    max_tokens: int,
    settings: dict[str, Any],
    load_state: Path | None,
    exact: bool,
    interpret: bool,
    threads: int | None,
    quiet: bool,
) -> None:
    """Talk with a model that was taught to.

    Ctrl-C ends a reply and keeps the conversation; /help lists what else there is. However long the conversation, its
    memory is one state of fixed size. Lines that are pasted together are one message, and what is typed while a reply comes is
    dropped. Without a terminal, every line of stdin is a turn.

    \b
    rwkv-edge chat model-int4 --system "You are a patient teacher."
    rwkv-edge chat model-int4 --think think
    """
    from .runtime import Chat

    if system and load_state:
        raise click.UsageError("--system begins a conversation, and --load-state goes on with one: leave one of them out.")
    model, load_s = _open(bundle, threads, exact, interpret)
    if model.bundle.model_id == DEMO_MODEL and not model.bundle.manifest["prompt"]:
        raise InputError(f'{bundle} is the demo model, which can only tell stories: rwkv-edge run {bundle} "Once upon a time"')
    state = model.load_state(load_state) if load_state else None
    talk = Chat(model, system=system, think=think, state=state, max_tokens=max_tokens, **_by_id(model, settings))
    converse(model, talk, load_s, quiet)


@cli.command("eval")
@bundles_argument
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help='A text, or a .jsonl with a "text" in every line.  [default: two short stories that come along]',
)
@click.option("--against", type=click.Path(path_type=Path), help="A checkpoint to compare with.  [default: the first bundle]")
@lora_option
@click.option("--window", type=click.IntRange(2), metavar="N", help="Read windows of N tokens.  [default: whole documents]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most so many documents, or windows.  [default: all]")
@click.option("--last-words", is_flag=True, help="How often the last word of each document is right, as LAMBADA counts.")
@exact_option
@interpret_option
@threads_option
@json_option
@quiet_option
def eval_(
    bundles: tuple[Path, ...],
    text: Path | None,
    against: Path | None,
    lora: str | None,
    window: int | None,
    limit: int | None,
    last_words: bool,
    exact: bool,
    interpret: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well models predict a text.

    Perplexity per token and bits per byte; and beside the first of them, or a checkpoint, the perplexity lost (paired, so
    its error is small), KL and how often the most likely token is the same. Errors are standard errors. Where a bundle
    rounds activations to 8 bits, the costs of its weights and of its arithmetic are told apart, and a warning says if the
    arithmetic costs more than 0.001 nats per token.

    The token that begins a text (0) is read before each document, unless --window cuts the text. run reads it for an empty
    prompt only.

    \b
    rwkv-edge eval model-int4 model-int8 --text book.txt --against model.pth
    rwkv-edge eval model-int4 --text book.txt --window 256 --limit 100
    rwkv-edge eval model-int4 --text lambada.jsonl --last-words
    """
    from . import evaluate as e

    if last_words and (window or not text):
        raise click.UsageError("--last-words needs a --text of many short documents, which it reads whole: leave --window out.")
    _refuse_alone(lora, against)
    texts = e.documents(text or DEMO.with_name("stories.txt"))
    options: dict[str, Any] = {"against": against, "lora": lora, "limit": limit, "exact": exact, "threads": threads}
    options["interpret"] = interpret
    with progress_bar("reading", quiet) as progress:
        if last_words:
            words = e.last_words(bundles, texts, **options, progress=progress)
        else:
            found = e.evaluate(bundles, texts, window=window, **options, progress=progress)
    if as_json:
        print_json(list(words) if last_words else found)
    elif last_words:
        print_words(words, min(limit or len(texts), len(texts)))
    else:
        print_scores(found)


@cli.command()
@bundles_argument
@click.option("--prefill", type=click.IntRange(1, 1 << 20), default=512, metavar="N", help="Tokens read at once.")
@click.option("--decode", type=click.IntRange(1, 1 << 20), default=128, metavar="N", help="Tokens read one by one.")
@click.option(
    "-r", "--repetitions", type=click.IntRange(1, 1000), default=5, metavar="N", help="Of each, after one that warms up."
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(1, 256),
    multiple=True,
    help="May be given again, to compare.  [default: every core]",
)
@exact_option
@json_option
@quiet_option
def bench(
    bundles: tuple[Path, ...],
    prefill: int,
    decode: int,
    repetitions: int,
    threads: tuple[int, ...],
    exact: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how fast bundles are here, and the memory they take.

    Each in a process of its own: its median, and the range. A repetition in which other programs took more than a tenth of
    the processors' time is made again, and counted as disturbed.

    \b
    rwkv-edge bench model-int4 model-int8
    rwkv-edge bench model-int4 --threads 1 --threads 4 --json
    """
    from .bench import bench as measure
    from .bench import refuse

    for path in bundles:
        refuse(path)  # what is wrong is told before the first minute
    found = []
    for path in bundles:
        for n in threads or (None,):
            if is_terminal(sys.stderr):
                say(f"\r\033[Kmeasuring {path.name} ...", quiet, nl=False)
            found.append(measure(path, threads=n, exact=exact, n_prefill=prefill, n_decode=decode, repetitions=repetitions))
    if is_terminal(sys.stderr):
        say("\r\033[K", quiet, nl=False)
    if as_json:
        print_json(found)
    else:
        print_bench(found)


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the bundle here.  [default: removed]")
@click.option("--quant", type=click.Choice(["none", "fp16", "int8", "int4"]), default="int4", help="Width of the weights.")
@click.option("--prompt", default="Once upon a time", help="What to continue.")
@click.option("--seed", metavar="N", type=click.IntRange(0), default=7, help="The same seed gives the same story.")
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
            say(f"\n$ rwkv-edge {shlex.join(map(str, args))}", quiet)
            if args[0] == "run" and (quiet or not is_terminal(sys.stdout)):  # where it does not show its prompt itself
                click.echo(prompt, nl=False)
            sys.stdout.flush()
            done = subprocess.run([sys.executable, "-P", "-m", "rwkv_edge", *map(str, args), *["-q"] * quiet])
            if done.returncode:
                sys.exit(done.returncode)

        step("export", DEMO, "--quant", quant, "-o", bundle, *["--force"] * force)
        if not quiet:
            step("check", bundle, "--against", DEMO)
        step("run", bundle, prompt, "--seed", seed)
    kept = f"The bundle is in {output}." if output else "The bundle was removed. To keep it: rwkv-edge demo -o stories"
    say(f"\n{kept}", quiet)


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


def _write(label: str, quiet: bool, write: Callable[..., Any]) -> None:
    """Write something with a bar, and say what was written."""
    start = time.perf_counter()
    with progress_bar(label, quiet) as progress:
        written = write(progress=progress)
    say(written_line(written, start), quiet)
    for note in written.notes:
        say(note, quiet)


# --- inputs ---


def _refuse_alone(lora: str | None, against: Path | None) -> None:
    if lora and not against:
        raise click.UsageError("--lora is merged into the checkpoint of --against: give that too.")


def _beside(checkpoint: Path, suffix: str | None) -> Path:
    """The output's name, made from the input's: x.pth -> x-int4, and x-int4.safetensors -> x-int4."""
    from .checkpoints import open_checkpoint

    quantized = open_checkpoint(checkpoint).quantized  # what is no checkpoint may have no name either
    checkpoint = checkpoint.resolve() if checkpoint.is_dir() else checkpoint
    name = checkpoint.name if checkpoint.is_dir() else checkpoint.stem  # a folder's name may have points: RWKV7-0.1B
    return checkpoint.with_name(name + (suffix or ("" if quantized else "-int4")))


def _open(bundle: Path, threads: int | None, exact: bool, interpret: bool) -> tuple[Any, float]:
    """An open model, and the seconds it took."""
    from .runtime import open_bundle

    start = time.perf_counter()
    interpreted = ("exact" if exact else "native") if interpret else None
    model = open_bundle(bundle, threads=threads, exact=exact and not interpret, interpret=interpreted)
    return model, time.perf_counter() - start


def _prompts(prompts: tuple[str, ...], files: tuple[Path, ...], lines: Path | None, *, needed: bool) -> list[str]:
    """All prompts: arguments, - being stdin, then files, then lines; with none of them, stdin if it is no terminal."""
    if not (prompts or files or lines):
        if sys.stdin is None or is_terminal(sys.stdin):
            if not needed:
                return [""]
            raise click.UsageError("Give a prompt: as PROMPT, with --file or --lines, or on stdin.")
        prompts = ("-",)
    # one line end at the end of a file is the file's, not the prompt's: so llama.cpp reads its --file
    texts = [_stdin().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]
    texts += [_read_text(file).removesuffix("\n") for file in files]
    if lines:
        texts += [line for line in _read_text(lines).split("\n") if line.strip()]
        if not texts:
            raise InputError(f"{lines} has no line that is not blank")
    return texts


def _read_text(file: Path) -> str:
    return _stdin() if str(file) == "-" else text_of(file.read_bytes(), str(file))


def _by_id(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with tokens to ban and to bias by their ids."""

    def token(text: str) -> int:
        if text.isdecimal():
            return int(text[:18])  # as many as an int64 takes
        if text.startswith('"'):
            try:
                return model.token(json.loads(text))  # type: ignore[no-any-return]
            except ValueError as e:
                if isinstance(e, InputError):
                    raise
                raise InputError(f"{text} is no text in JSON's quotes: {e}") from e
        return model.token(text)  # type: ignore[no-any-return]

    settings = dict(settings)
    if "ban" in settings:
        settings["ban"] = [token(text) for text in settings["ban"]]
    if "bias" in settings:
        bias = {}
        for text in settings["bias"]:
            name, _, x = text.rpartition("=")
            try:
                number = float(x)
            except ValueError:
                name = ""
            if not name:
                raise InputError(f"{text} is no bias: expected TOKEN=X, such as 11=-2")
            bias[token(name)] = number
        settings["bias"] = bias
    return settings


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not word.isdecimal() or len(word) > 18:
            raise InputError(f"with --ids the prompt is token ids, such as '1 2 3': {word[:40]!r} is none")
    return [int(word) for word in words]


def _stdin() -> str:
    if sys.stdin is None:
        raise InputError("stdin is closed: give the prompt as an argument")
    return text_of(sys.stdin.buffer.read(), "stdin")


def main() -> None:
    """The program: `cli`, with a Unix tool's manners towards signals."""
    for name, code in (("SIGTERM", 143), ("SIGHUP", 129)):  # so that half-written output is removed
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_, code=code: sys.exit(code))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our characters is no reason to fail
    try:
        try:
            cli(standalone_mode=False)
        except OSError as e:  # click writes --help and --version before a command is invoked
            raise _failure(e) from e
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as e:
        with contextlib.suppress(OSError):  # a full stderr does not change the exit code
            e.show()
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    finally:
        _drop_unwritable()


def _failure(e: OSError) -> Failure:
    return Failure(OutputError(f"{e.filename or 'output'}: {e.strerror or e}"))


def _drop_unwritable() -> None:
    """Python flushes its streams at exit, and fails with code 120 where a disk is full: send what is left to nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
