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
from .runtime.session import arithmetic_warning
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
class Cost:
    """How far one model is from another on the same text.

    percent  of perplexity more; paired, so its error is smaller than those of both
    kl       nats per token, from the other one's distribution to this one's
    top1     share of tokens with the same most likely next token
    """

    percent: Estimate
    kl: Estimate
    top1: Estimate


@dataclass(frozen=True)
class Score:
    """How one model did.  Against the first of the models, and None for that one itself: percent, kl, top1, weights.

    perplexity     exp of the mean negative log-likelihood of a token
    bits_per_byte  of the text: comparable between tokenizers
    percent        of perplexity more than the first; paired, so its error is smaller than those of both
    kl             nats per token, from the first one's distribution to this one's
    top1           share of tokens with the same most likely next token
    weights        the cost of the weights alone: both in exact arithmetic. None where Core ML's float16 is in it
    arithmetic     the cost of rounding activations to 8 bits: as the bundle runs, against exact arithmetic on the same
                   weights. None if it runs in exact arithmetic, or in float16
    """

    name: str
    perplexity: Estimate
    bits_per_byte: Estimate
    percent: Estimate | None
    kl: Estimate | None
    top1: Estimate | None
    weights: Cost | None
    arithmetic: Cost | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: on so many predictions of tokens, which are so many bytes of text.

    warnings  of bundles whose 8-bit activations cost more than 0.001 nats per token
    """

    n_documents: int
    n_predictions: int
    n_bytes: int
    scores: tuple[Score, ...]
    warnings: tuple[str, ...]


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

    A bundle that rounds activations to 8 bits is run in exact arithmetic too: what its weights cost and what its arithmetic
    costs are told apart.

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
    exacts = _open_exact(feeds, threads)
    pairs = _pairs(exacts)
    read = passages(texts, tokenizer, bos_token_id=bos_token_id, window=window, limit=limit)
    total, done = sum(len(p.ids) - 1 for p in read), 0
    nll, apart, n_tokens, n_bytes = [], [], [], []
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
                sums = _sums([rows[j : j + PIECE] for rows in logits], pairs, y)
                nll.append(sums[0])
                apart.append(sums[1])
                n_tokens.append(len(y))
                n_bytes.append(sum(sizes[i + j : i + j + len(y)]))
            done += len(logits[0])
            if progress:
                progress(done, total)
    costs = _costs(pairs, np.stack(nll, 1), np.stack(apart, 1), n_tokens)
    scores = _scores(names, exacts, costs, np.stack(nll, 1), n_tokens, n_bytes)
    warnings = [w for s in scores if s.arithmetic for w in arithmetic_warning(s.name, s.arithmetic.kl.value)]
    return Evaluation(len(read), sum(n_tokens), sum(n_bytes), scores, tuple(warnings))


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
        else:
            models.append(Model(bundle, threads=threads, exact=exact))
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


def _open_exact(feeds: list[Feeds], threads: int | None) -> list[int | None]:
    """Open the exact graphs of models that round activations, as further feeds.

    Returns  for every model the place of what computes its weights in exact arithmetic; None where nothing does
    """
    exacts: list[int | None] = []
    for k, model in enumerate(list(feeds)):
        arithmetic = model.arithmetic if isinstance(model, Model) else "exact"
        exacts.append({"exact": k, "int8 activations": len(feeds)}.get(arithmetic))
        if isinstance(model, Model) and arithmetic == "int8 activations":
            feeds.append(Model(model.bundle, threads=threads, exact=True))
    return exacts


def _pairs(exacts: Sequence[int | None]) -> list[tuple[int, int]]:
    """Which feeds are compared, the reference first: all with the first; their exact ones; each with its own exact one."""
    pairs: dict[tuple[int, int], None] = {(0, k): None for k in range(1, len(exacts))}
    for k, exact in enumerate(exacts):
        if k and exact is not None and exacts[0] is not None:
            pairs[exacts[0], exact] = None
        if exact not in (None, k):
            pairs[exact, k] = None
    return list(pairs)


def _sums(logits: Sequence[Array], pairs: Sequence[tuple[int, int]], y: Array) -> tuple[Array, Array]:
    """Sums over tokens: nll of every model (models,), KL and agreement of pairs (pairs, 2); logits (T, V) each, y (T,)."""
    logs = [log_softmax(x) for x in logits]
    nll = [-log[np.arange(len(y)), y].sum() for log in logs]
    apart = [
        ((np.exp(p) * (p - q)).sum(), (p.argmax(-1) == q.argmax(-1)).sum()) for p, q in ((logs[i], logs[k]) for i, k in pairs)
    ]
    return np.asarray(nll), np.asarray(apart, float).reshape(-1, 2)


def _costs(
    pairs: Sequence[tuple[int, int]], nll: Array, apart: Array, n_tokens: Sequence[int]
) -> dict[tuple[int | None, int | None], Cost]:
    """From sums over pieces, nll (models, pieces) and apart (pairs, pieces, 2), to the figures of every pair."""
    tokens = np.asarray(n_tokens, float)
    costs: dict[tuple[int | None, int | None], Cost] = {}
    for i, (reference, k) in enumerate(pairs):
        ratio = _exp(_ratio(nll[k] - nll[reference], tokens))
        percent = Estimate(100 * (ratio.value - 1), ratio.error and 100 * ratio.error)
        costs[reference, k] = Cost(percent, _ratio(apart[i, :, 0], tokens), _ratio(apart[i, :, 1], tokens))
    return costs


def _scores(
    names: Sequence[str],
    exacts: Sequence[int | None],
    costs: Mapping[tuple[int | None, int | None], Cost],
    nll: Array,
    n_tokens: Sequence[int],
    n_bytes: Sequence[int],
) -> tuple[Score, ...]:
    """Figures of every model from sums nll (models, pieces) and from the costs of pairs."""
    scores = []
    for k, name in enumerate(names):
        whole = costs.get((0, k))
        scores.append(
            Score(
                name,
                perplexity=_exp(_ratio(nll[k], np.asarray(n_tokens, float))),
                bits_per_byte=_ratio(nll[k] / math.log(2), np.asarray(n_bytes, float)),
                percent=whole.percent if whole else None,
                kl=whole.kl if whole else None,
                top1=whole.top1 if whole else None,
                weights=costs.get((exacts[0], exacts[k])) if k else None,
                arithmetic=costs.get((exacts[k], k)),
            )
        )
    return tuple(scores)


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
