"""How well models predict text: perplexity, bits per byte, and how far they are from the first of them."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .bundle import read_bundle
from .checkpoints import Checkpoint, model_id, open_checkpoint
from .checkpoints.lora import with_lora
from .errors import BundleError, InputError
from .files import utf8
from .qtensor import Lut, QTensor
from .reference import Weights, run_reference
from .runtime import Model
from .runtime.sampling import log_softmax
from .tokenizer import Tokenizer

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

_CHUNK = 256  # tokens that are read at once
PIECE = 64  # tokens that standard errors take as independent of the next ones
_KEPT = 500_000_000  # weights: a smaller checkpoint stays in memory, a larger one is read for every piece


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error: pieces of 64 tokens (documents, of last words) being independent; None with one."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Score:
    """How one model did.  Against the first of the models, and None for that one itself: percent, kl, top1.

    perplexity     exp of the mean negative log-likelihood of a token
    bits_per_byte  of the text: comparable between tokenizers
    percent        of perplexity more than the first; paired, so its error is smaller than those of both
    kl             nats per token, from the first one's distribution to this one's
    top1           share of tokens with the same most likely next token
    """

    name: str
    perplexity: Estimate
    bits_per_byte: Estimate
    percent: Estimate | None
    kl: Estimate | None
    top1: Estimate | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: on so many predictions of tokens, which are so many bytes of text."""

    n_documents: int
    n_predictions: int
    n_bytes: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class WordScore:
    """How often a model gave the last word, as its most likely tokens; and the perplexity of that word."""

    name: str
    accuracy: Estimate
    perplexity: Estimate


class Feeds(Protocol):
    """What reads tokens and gives logits: a Model, or a Reference."""

    def feed(self, tokens: Sequence[int], state: Any = None, *, every: bool = False) -> tuple[Array, Any]: ...


class Reference:
    """A checkpoint as numpy runs it in float32, reading its weights as they are needed.

    first  the state that every text begins from; None is zeros
    """

    def __init__(self, checkpoint: Checkpoint, first: Mapping[str, Array] | None = None) -> None:
        self._spec, self._first = checkpoint.spec, first
        self._weights: Mapping[str, Array | QTensor | Lut] = Weights(checkpoint.tensors)
        if checkpoint.spec.n_parameters <= _KEPT:
            self._weights = dict(self._weights)

    def feed(self, tokens: Sequence[int], state: Any = None, *, every: bool = False) -> tuple[Array, Any]:
        """As Model.feed."""
        logits, state = run_reference(self._spec, self._weights, list(tokens), self._first if state is None else state)
        return logits if every else logits[-1], state


# --- what is read ---


@dataclass(frozen=True)
class Passage:
    """Tokens that are read from a zero state; every one but the first is predicted, and is so many bytes of text."""

    ids: list[int]
    n_bytes: list[int]


def documents(path: str | Path) -> list[str]:
    """Read a text file: one document, or several between lines of <|endoftext|>; or a .jsonl of objects with a "text".

    Raises  InputError if it is not there, not UTF-8, or holds no text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e
    text = utf8(data, path).replace("\r\n", "\n")
    if path.suffix == ".jsonl":
        found = _lines_of_json(path, text)
    else:
        *found, last = _SEPARATOR.split(text)
        found = [text.removesuffix("\n") for text in found] + [last]
    found = [text for text in found if text.strip()]
    if not found:
        raise InputError(f"{path} holds no text")
    return found


_SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*(?:\n|\Z)", re.M)


def _lines_of_json(path: Path, text: str) -> list[str]:
    found = []
    for i, line in enumerate(text.split("\n"), 1):  # JSON may hold what splitlines takes for the end of one
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(f'{path}, line {i}: expected a JSON object with a "text"') from e
        if not isinstance(found[-1], str):
            raise InputError(f'{path}, line {i}: its "text" is no text')
    return found


def passages(
    texts: Sequence[str], tokenizer: Tokenizer, *, bos_token_id: int, window: int | None, limit: int | None
) -> list[Passage]:
    """Cut texts into what is read at once: whole documents, each after the token that begins a text, or windows."""
    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        sizes = [len(stream.push(i).encode()) for i in ids]
        if sizes:
            sizes[-1] += len(stream.finish().encode())
        if window:
            found += [Passage(ids[i : i + window], sizes[i : i + window]) for i in range(0, len(ids), window)]
        else:
            found.append(Passage([bos_token_id, *ids], [0, *sizes]))
    found = [p for p in found if len(p.ids) > 1][:limit]
    if not found:
        raise InputError("the text is shorter than two tokens")
    return found


# --- how it is measured ---


def evaluate(
    bundles: Sequence[str | Path],
    texts: Sequence[str],
    *,
    against: str | Path | None = None,
    lora: str | Path | None = None,
    window: int | None = None,
    limit: int | None = None,
    exact: bool = False,
    interpret: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well models predict texts, and how far they are from the first of them.

    against  a checkpoint to compare with, in float32: it becomes the first. It begins from the initial state of the first
             bundle if that is the same model
    lora     to merge into it, as FILE or FILE:ALPHA
    window   read windows of so many tokens, each from a zero state, instead of whole documents
    limit    at most so many documents, or windows
    exact    compute matrix products in float32 where bundles round activations to 8 bits
    interpret  compute Core ML bundles in numpy, slowly; in float16 as their files say, or with exact in float64
    progress called with tokens done and tokens in all

    All models are open at once.

    Raises  BundleError, CheckpointError, BackendError; InputError if the models do not share one tokenizer
    """
    if window is not None and (type(window) is not int or window < 2):
        raise InputError(f"a window of {window} tokens predicts nothing: expected a whole number, 2 or more")
    _refuse_no_texts(texts, limit)
    feeds, names, tokenizer, bos_token_id = _open(bundles, against, lora, threads, exact, interpret)
    read = passages(texts, tokenizer, bos_token_id=bos_token_id, window=window, limit=limit)
    total, done = sum(len(p.ids) - 1 for p in read), 0
    pieces, n_tokens, n_bytes = [], [], []
    for passage in read:
        states: list[Any] = [None] * len(feeds)
        inputs, targets, sizes = passage.ids[:-1], np.asarray(passage.ids[1:]), passage.n_bytes[1:]
        for i in range(0, len(inputs), _CHUNK):
            logits = []
            for k, model in enumerate(feeds):
                rows, states[k] = model.feed(inputs[i : i + _CHUNK], states[k], every=True)
                logits.append(rows)
            for j in range(0, len(logits[0]), PIECE):
                y = targets[i + j : i + _CHUNK][:PIECE]
                pieces.append(_sums([rows[j : j + PIECE] for rows in logits], y))
                n_tokens.append(len(y))
                n_bytes.append(sum(sizes[i + j : i + j + len(y)]))
            done += len(logits[0])
            if progress:
                progress(done, total)
    return Evaluation(len(read), sum(n_tokens), sum(n_bytes), _scores(names, np.stack(pieces, 1), n_tokens, n_bytes))


def last_words(
    bundles: Sequence[str | Path],
    texts: Sequence[str],
    *,
    against: str | Path | None = None,
    lora: str | Path | None = None,
    limit: int | None = None,
    exact: bool = False,
    interpret: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[WordScore, ...]:
    """Measure how often models give the last word of each text, as LAMBADA does: arguments as of `evaluate`.

    A word counts if each of its tokens is the most likely one.

    Source  arXiv 1606.06031; the counting is that of the official RWKV scripts
    """
    _refuse_no_texts(texts, limit)
    feeds, names, tokenizer, bos_token_id = _open(bundles, against, lora, threads, exact, interpret)
    nll: list[list[float]] = [[] for _ in feeds]
    right: list[list[bool]] = [[] for _ in feeds]
    texts = list(texts)[:limit]
    for n, text in enumerate(texts, 1):
        last = _LAST_WORD.search(text.rstrip())
        if not last:
            raise InputError(f"text {n} has no last word: {text[:40]!r}")
        before, word = text[: last.start()], last[0]
        ids, target = [bos_token_id, *tokenizer.encode(before)], tokenizer.encode(word)
        for k, model in enumerate(feeds):
            first, state = model.feed(ids)
            rows = first[None]
            if len(target) > 1:
                rows = np.concatenate([rows, model.feed(target[:-1], state, every=True)[0]])
            nll[k].append(-float(log_softmax(rows)[np.arange(len(target)), target].sum()))
            right[k].append(bool((rows.argmax(-1) == target).all()))
        if progress:
            progress(n, len(texts))
    ones = np.ones(len(texts))
    return tuple(
        WordScore(name, _ratio(np.asarray(right[k], float), ones), _exp(_ratio(np.asarray(nll[k]), ones)))
        for k, name in enumerate(names)
    )


_LAST_WORD = re.compile(r"(?<=\S)\s+\S+\Z")  # with the space before it, and something before that


def _refuse_no_texts(texts: Sequence[str], limit: int | None) -> None:
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts is a list of documents, at least one")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"a limit of {limit} leaves nothing: expected a whole number, 1 or more")


def _names(bundles: Sequence[str | Path]) -> list[str]:
    """Short names of folders, or whole ones where these are not different."""
    names = [Path(b).resolve().name for b in bundles]
    return names if len(set(names)) == len(names) else [str(b) for b in bundles]


def _open(
    bundles: Sequence[str | Path],
    against: str | Path | None,
    lora: str | Path | None,
    threads: int | None,
    exact: bool,
    interpret: bool,
) -> tuple[list[Feeds], list[str], Tokenizer, int]:
    """What is compared, the checkpoint first, with their names; the tokenizer they share, and what begins a text."""
    if not bundles:
        raise InputError("there is no bundle to evaluate")
    models = []
    for path in bundles:
        bundle = read_bundle(path)
        if interpret and bundle.target == "coreml":
            models.append(Model(bundle, interpret="exact" if exact else "native"))
            continue
        roles = [g["role"] for g in bundle.manifest["graphs"] if g["arithmetic"] == "exact"]
        models.append(Model(bundle, threads=threads, role=roles[0] if exact and roles else "run"))
    first = models[0]
    for path, model in zip(bundles, models, strict=True):
        if model.tokenizer is None:
            raise BundleError(f"{path} has no tokenizer: export with --tokenizer")
        if _tokenizer_sha(model) != _tokenizer_sha(first):
            raise InputError(
                f"{path} has another tokenizer than {bundles[0]}: evaluate them one by one, and compare bits per byte"
            )
        if model.spec.n_vocab != first.spec.n_vocab:
            raise InputError(
                f"{path} has a vocabulary of {model.spec.n_vocab}, {bundles[0]} one of {first.spec.n_vocab}: "
                "they cannot be compared"
            )
    assert first.tokenizer is not None
    feeds: list[Feeds] = [*models]
    names = _names(bundles)
    if against:
        feeds.insert(0, _reference(against, lora, first))
        names.insert(0, Path(against).name)
    return feeds, names, first.tokenizer, first.bos_token_id


def _tokenizer_sha(model: Model) -> str:
    manifest = model.bundle.manifest
    sha: str = manifest["files"][manifest["tokenizer"]["file"]]["sha256"]
    return sha


def _reference(against: str | Path, lora: str | Path | None, model: Model) -> Reference:
    checkpoint = with_lora(open_checkpoint(against), lora)
    if checkpoint.spec.n_vocab != model.spec.n_vocab:
        raise InputError(
            f"{against} has a vocabulary of {checkpoint.spec.n_vocab}, the bundles one of {model.spec.n_vocab}: "
            "they cannot be compared"
        )
    same = model.first and model_id(checkpoint) == model.first.model_id
    return Reference(checkpoint, model.first.tensors if model.first and same else None)


def _sums(logits: Sequence[Array], y: Array) -> Array:
    """Sums (models, 3) over tokens of nll, KL and agreement, against the first model: logits (T, V) each, y (T,)."""
    sums = np.zeros((len(logits), 3))
    for k, x in enumerate(logits):
        log_q = log_softmax(x)
        if k == 0:
            log_p = log_q
            p = np.exp(log_p)
        sums[k] = (
            -log_q[np.arange(len(y)), y].sum(),
            (p * (log_p - log_q)).sum(),
            (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
        )
    return sums


def _scores(names: Sequence[str], sums: Array, n_tokens: Sequence[int], n_bytes: Sequence[int]) -> tuple[Score, ...]:
    """From sums (models, pieces, 3) to figures."""
    tokens, nbytes = np.asarray(n_tokens, float), np.asarray(n_bytes, float)

    def one(k: int, name: str) -> Score:
        nll, kl, top1 = sums[k].T
        percent = _exp(_ratio(nll - sums[0, :, 0], tokens))
        percent = Estimate(100 * (percent.value - 1), percent.error and 100 * percent.error)
        return Score(
            name,
            _exp(_ratio(nll, tokens)),
            _ratio(nll / math.log(2), nbytes),
            percent if k else None,
            _ratio(kl, tokens) if k else None,
            _ratio(top1, tokens) if k else None,
        )

    return tuple(one(k, name) for k, name in enumerate(names))


def _ratio(sums: Array, n: Array) -> Estimate:
    """A mean over all that the pieces hold, and its standard error over pieces: the usual one of a ratio."""
    value = float(sums.sum() / n.sum())
    m = len(n)
    if m < 2:
        return Estimate(value, None)
    return Estimate(value, math.sqrt(float(((sums - value * n) ** 2).sum()) * m / (m - 1)) / float(n.sum()))


def _exp(x: Estimate) -> Estimate:
    value = math.exp(min(x.value, 700.0))
    return Estimate(value, x.error and value * x.error)
