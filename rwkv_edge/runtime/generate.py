"""Text as it comes: a prompt read in chunks, then one token at a time."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from .sampling import Array, Occurrences, Sampling, adjust, log_normalizer, most_likely, sample
from .session import Tokens
from .state import N_RECENT, State

if TYPE_CHECKING:
    from .session import Model

Logits = Callable[[Array, Sequence[int]], Array]


@dataclass(frozen=True)
class Token:
    """One generated token.

    text     whole characters that it completes; empty while one is unfinished, or while a stop text may be coming
    logprob  natural logarithm of its probability by the model, before any setting of Sampling
    top      the most likely tokens in its place, with their logprobs, as many as were asked for
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Stats:
    """What a generation took.

    n_prompt     tokens of the prompt, 0 until they are read
    n_generated  tokens given
    prefill_s    seconds to read the prompt
    decode_s     seconds to generate, choosing tokens included
    """

    n_prompt: int = 0
    n_generated: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Generation:
    """An iterator over tokens, for one thread at a time.

    stats   times so far
    finish  why it ended: "length" (max_tokens), "end" (of text, whose token is the last one given), "stop" (a stop text,
            which is not part of any token's text), "cut"; None before
    """

    def __init__(
        self,
        model: "Model",
        prompt: Tokens,
        state: State | None,
        *,
        max_tokens: int | None,
        stop: Sequence[str],
        sampling: Sampling,
        logits: Logits | None,
        n_top: int,
    ) -> None:
        stop = tuple(check_settings(model, max_tokens, stop, sampling))
        if type(n_top) is not int or n_top < 0:
            raise InputError(f"top_logprobs {n_top!r} is not possible: expected a whole number, 0 or more")
        if logits is not None and not callable(logits):
            raise InputError(f"logits is a {type(logits).__name__}: expected a function of the logits and the ids given so far")
        self.stats = Stats()
        self.finish: str | None = "length" if max_tokens == 0 else None
        self._model, self._prompt, self._max_tokens = model, prompt, max_tokens
        self._sampling, self._callback, self._n_top = sampling, logits, n_top
        self._rng = np.random.default_rng(sampling.seed)
        self._given: deque[int] = deque(maxlen=None if logits else 1)  # tokens, but for the end of text
        self._n_given = 0  # the state has the last of them once it is asked for
        self._loop = model.loop()
        self._loop.load(state)
        self._first, self._n_first = state, self._loop.n_tokens + len(prompt)
        self._said = Occurrences(model.spec.n_vocab, self._loop.occurrences)
        self._counts = sampling.penalizes or self._loop.occurrences is not None  # once begun, it is gone on with
        self._text = _Text(model, [*self._loop.recent, *prompt[-N_RECENT:].tolist()], stop)
        # before what may be a stop, and before an unfinished character: a state, and the text since then
        self._mark: tuple[State, str] | None = None
        self._character: tuple[State, str] | None = None

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> Token:
        if self.finish:
            raise StopIteration
        logits = self._read()
        start = time.perf_counter()
        z = log_normalizer(logits)
        token = sample(self._changed(logits), self._sampling, self._rng)
        likely = most_likely(logits, self._n_top)[: self._n_top] if self._n_top else ()
        top = tuple((int(i), float(logits[i]) - z) for i in likely)
        self.stats.decode_s += time.perf_counter() - start
        return Token(token, self._say(token), float(logits[token]) - z, top)

    @property
    def state(self) -> State:
        """The state after the prompt and every token given so far, but for the end of text or a stop text."""
        mark = self._mark
        if self.finish == "cut":
            mark = mark or self._character
        elif self.finish != "stop":
            mark = None
        if mark is None:
            self._read()
            return self._snapshot()
        state, text = mark
        if text:  # whole characters before the stop, whose tokens may be others than those that were generated
            ids = self._model.encode(text, special_tokens=False)
            said = Occurrences(self._model.spec.n_vocab, state.occurrences)
            _, state = self._model.feed(ids, state)
            if self._counts:
                for token in ids:
                    self._count(token, said)
                state = replace(state, occurrences=said.by_id())
            self._mark = state, ""
        return state

    def _snapshot(self) -> State:
        """The loop's state, with what was generated until now."""
        state = self._loop.state()
        return replace(state, occurrences=self._said.by_id()) if self._counts else state

    def _count(self, token: int, said: Occurrences) -> None:
        tokenizer = self._model.tokenizer
        said.add(token, tokenizer.decode([token]) if tokenizer else None, self._sampling.penalty_decay)

    def prefill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the prompt now; otherwise the first token is what makes it read.

        progress  called with tokens read and tokens in all
        """
        self._read(progress)

    def cut(self) -> None:
        """End here: what may have been the beginning of a stop text was not said, and is not in the state."""
        self.finish = self.finish or "cut"

    def _changed(self, logits: Array) -> Array:
        """Logits after bans, penalties, biases, and the callback."""
        tokenizer = self._model.tokenizer
        changed = adjust(logits, self._sampling, self._said)
        if tokenizer and tokenizer.n_vocab < len(logits):  # rows that only fill the table
            changed = changed.copy() if changed is logits else changed
            changed[tokenizer.n_vocab :] = -np.inf
        if self._callback:
            try:
                changed = np.asarray(self._callback(changed.copy(), tuple(self._given)), np.float32)
            except (ValueError, TypeError) as e:
                raise InputError(f"the logits callback failed, or gave no array of numbers: {e}") from e
            if changed.shape != logits.shape:
                raise InputError(f"the logits callback gave shape {changed.shape}, expected {logits.shape}")
        if changed is not logits and not np.isfinite(changed.max()):
            if changed.max() == -np.inf:
                raise InputError("bans, biases and the logits callback leave no token to choose from")
            raise InputError("the logits callback gave NaN or infinity: -inf forbids a token, a large number prefers it")
        return changed

    def _say(self, token: int) -> str:
        """Take the token that was chosen: the text that is certain now."""
        self.stats.n_generated += 1
        if token in self._model.eos_token_ids:
            self.finish = "end"
            return self._text.finish()
        self._given.append(token)
        self._n_given += 1
        before = self._text.held
        text, new, stopped = self._text.push(token)
        # What is, or may be, a stop begins so many characters from the end of `before + new`.
        n = len(before) + len(new) - len(text) if stopped else len(self._text.held)
        unfinished = bool(self._text.stop) and self._text.unfinished
        if n or unfinished:
            # where `new` begins: in this token, which the state has not read, or in the ones of its first character
            state, since = self._character or (self._snapshot(), "")
            if not n:
                self._mark = None
            elif n <= len(new) or self._mark is None:
                self._mark = state, since + new[: len(new) - n]
            else:
                self._mark = self._mark[0], self._mark[1] + text
            self._character = (state, since + new) if unfinished else None
        else:
            self._mark = self._character = None
        if self._counts:
            self._count(token, self._said)
        if stopped:
            self.finish = "stop"
        elif self.stats.n_generated == self._max_tokens:
            self.finish = "length"
            text += self._text.finish()
        return text

    def _read(self, progress: Callable[[int, int], None] | None = None) -> Array:
        """Read the prompt, or the last token: the logits (V,) that follow.

        How far the loop has come is the loop's to say: an interrupt may have come at any moment.
        """
        loop, start = self._loop, time.perf_counter()
        if loop.n_tokens < self._n_first:
            with self._model._lock:
                loop.load(self._first)
                loop.read(self._prompt, progress=progress)
            self._first = None
            self.stats.n_prompt = len(self._prompt)
            self.stats.prefill_s += time.perf_counter() - start
        elif loop.n_tokens < self._n_first + self._n_given:
            with self._model._lock:
                loop.step(self._given[-1])
            self.stats.decode_s += time.perf_counter() - start
        return loop.logits


def check_settings(model: "Model", max_tokens: int | None, stop: Sequence[str], sampling: Sampling) -> Sequence[str]:
    """Check what generate and Chat are given: the stop texts, once they are known to be some.

    Raises  InputError
    """
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
        raise InputError(f"max_tokens {max_tokens!r} is not possible: expected a whole number, 0 or more")
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise InputError("stop is a list of texts, none of them empty")
    stop = tuple(stop)
    if not all(isinstance(s, str) and s for s in stop):
        raise InputError("stop is a list of texts, none of them empty")
    if sampling.ban or sampling.bias:
        model.check_tokens([*sampling.ban, *sampling.bias])
    return stop


class _Text:
    """Text of tokens, up to the first stop; what may be the beginning of one is held back."""

    def __init__(self, model: "Model", before: list[int], stop: Sequence[str]) -> None:
        if stop and model.tokenizer is None:
            raise InputError("stop texts need a tokenizer, and the bundle has none")
        if model.bos_token_id in before:  # where a text begins, there is nothing before it
            before = before[len(before) - before[::-1].index(model.bos_token_id) :]
        self._stream = model.tokenizer.stream(before) if model.tokenizer else None
        self.stop, self.held = tuple(stop), ""

    @property
    def unfinished(self) -> bool:
        return self._stream is not None and self._stream.unfinished

    def push(self, token: int) -> tuple[str, str, bool]:
        """Take a token; give the text that is certain now, the token's own text, and whether a stop has come."""
        new = self._stream.push(token) if self._stream else ""
        held = self.held + new
        found = [at for at in (held.find(s) for s in self.stop) if at >= 0]
        if found:
            self.held = ""
            return held[: min(found)], new, True
        n = max((k for s in self.stop for k in range(1, len(s)) if held.endswith(s[:k])), default=0)
        self.held = held[len(held) - n :]
        return held[: len(held) - n], new, False

    def finish(self) -> str:
        """Give what is held back."""
        return self.held + (self._stream.finish() if self._stream else "")
