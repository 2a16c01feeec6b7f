"""Text as it comes: a prompt read in chunks, then one token at a time."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .sampling import Sampling, log_softmax, sample
from .session import Loop, Tokens
from .state import State

if TYPE_CHECKING:
    from .session import Model


@dataclass(frozen=True)
class Token:
    """One generated token.

    text     whole characters that it completes; empty while one is unfinished, or while a stop text may be coming
    logprob  natural logarithm of its probability, before temperature and top_p
    """

    id: int
    text: str
    logprob: float


@dataclass
class Stats:
    """How long a generation took: seconds."""

    n_prompt: int = 0
    n_generated: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Generation:
    """An iterator over tokens, for one thread at a time.

    Ends at max_tokens, at the end of text (whose token is the last one given), or at a stop text (which is not part of
    any token's text).

    stats  times so far
    """

    def __init__(
        self,
        model: "Model",
        prompt: Tokens,
        state: State | None,
        max_tokens: int | None,
        sampling: Sampling,
        stop: Sequence[str],
        end_of_text: int | None,
    ) -> None:
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
            raise InputError(f"max_tokens {max_tokens!r} is not possible: expected 0 or more, or None")
        if isinstance(stop, str) or not isinstance(stop, Iterable):
            raise InputError("stop is a list of texts, none of them empty")
        stop = tuple(stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise InputError("stop is a list of texts, none of them empty")
        self.stats = Stats()
        self._model, self._prompt, self._max_tokens = model, prompt, max_tokens
        self._sampling, self._end_of_text = sampling, end_of_text
        self._rng = np.random.default_rng(sampling.seed)
        self._loop = Loop(model)
        self._loop.load(state)
        self._first = state
        self._logits: np.ndarray | None = None
        self._unread: int | None = None  # the last token given: the state has it once it is asked for or continued
        self._text = _Text(model, prompt, stop)
        self._ended = max_tokens == 0

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> Token:
        if self._ended:
            raise StopIteration
        self._read()
        assert self._logits is not None
        start = time.perf_counter()
        token = sample(self._logits, self._sampling, self._rng)
        logprob = float(log_softmax(self._logits)[token])
        self.stats.decode_s += time.perf_counter() - start
        self.stats.n_generated += 1
        if token == self._end_of_text:
            self._ended = True
            return Token(token, self._text.finish(), logprob)
        self._unread = token
        text, stopped = self._text.push(token)
        if self.stats.n_generated == self._max_tokens and not stopped:
            text, stopped = text + self._text.finish(), True
        self._ended = stopped
        return Token(token, text, logprob)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one step reads: all but the embedding, of which it reads a row."""
        tensors = self._model.bundle.tensors
        return sum(t.data.nbytes + (t.scales.nbytes if t.scales else 0) for n, t in tensors.items() if n != "emb.weight")

    @property
    def state(self) -> State:
        """The state after the prompt and every token given so far, but for the end of text."""
        self._read()
        return self._loop.state()

    def _read(self) -> None:
        """Read the prompt, or the last token."""
        start = time.perf_counter()
        if self._logits is None:
            with self._model._lock:
                self._loop.load(self._first)  # again: an interrupt may have left it inside the prompt
                self._logits = self._loop.read(self._prompt)[0]
            self._first = None
            self.stats.n_prompt = len(self._prompt)
            self.stats.prefill_s += time.perf_counter() - start
        elif self._unread is not None:
            with self._model._lock:
                self._logits = self._loop.step(self._unread)
            self._unread = None
            self.stats.decode_s += time.perf_counter() - start


class _Text:
    """Text of tokens, up to the first stop; what may be the beginning of one is held back."""

    def __init__(self, model: "Model", prompt: Tokens, stop: Sequence[str]) -> None:
        if stop and model.tokenizer is None:
            raise InputError("stop texts need a tokenizer, and the bundle has none")
        self._stream = model.tokenizer.stream(prompt.tolist()) if model.tokenizer else None
        self._stop, self._held = tuple(stop), ""

    def push(self, token: int) -> tuple[str, bool]:
        """Take a token; give the text that is certain now, and whether a stop has come."""
        if self._stream is None:
            return "", False
        return self._add(self._stream.push(token))

    def finish(self) -> str:
        """Give what is held back."""
        if self._stream is None:
            return ""
        text, stopped = self._add(self._stream.finish())
        return text if stopped else text + self._held

    def _add(self, text: str) -> tuple[str, bool]:
        held = self._held + text
        found = [at for at in (held.find(s) for s in self._stop) if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        n = max((k for s in self._stop for k in range(1, len(s)) if held.endswith(s[:k])), default=0)
        self._held = held[len(held) - n :]
        return held[: len(held) - n], False
