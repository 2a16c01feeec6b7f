"""A conversation: turns in the roles that a model was trained on, its memory one state of fixed size."""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from ..errors import InputError
from .generate import Generation, check_settings
from .sampling import Sampling, Settings, changed
from .session import Model
from .state import State, refuse_output

N_UNDO = 4  # turns that can be taken back: a state each


class Chat:
    """A conversation with a model whose bundle has a chat template.

    It has:
    state       what the model remembers of it; None before the first word
    generation  of the last reply: its stats, and why it ended; None before the first

    It takes:
    model     open
    system    what the model is told at the start
    state     to go on from, such as load_state gave
    think     how it answers: "none" at once, "think" after thinking aloud, "fast" after an empty thought; what the bundle has
    sampling  None takes the bundle's for this way of thinking
    settings  changes to it, see Sampling

    Raises  InputError if the bundle has no template, or not this way of thinking.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        think: str = "none",
        state: State | None = None,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        template = model.bundle.manifest["prompt"]
        if template is None:
            raise InputError(f"{model.bundle.path} has no chat template: its model continues text, try `rwkv-edge run`")
        if not isinstance(think, str) or think not in template["think"]:
            raise InputError(f"think {think!r} is unknown: the bundle has {', '.join(template['think'])}")
        if system is not None and not isinstance(system, str):
            raise InputError(f"system is a {type(system).__name__}: expected text")
        self._model, self._template, self._system = model, template, system
        self._opening: str = template["think"][think]["opening"]
        own = template["think"][think]["sampling"]
        if sampling is None:
            sampling = Sampling(**own) if own else model.sampling
        self._sampling, self._max_tokens = changed(sampling, settings), max_tokens
        check_settings(model, max_tokens, template["stop"], self._sampling)
        self.state = state
        self._past: deque[State | None] = deque(maxlen=N_UNDO)
        self.generation: Generation | None = None

    def say(self, text: str) -> Iterator[str]:
        """Take a turn: the reply, in pieces as they come. Nothing happens before they are asked for.

        An interrupted reply is kept as far as it came; a turn that was interrupted before its reply is forgotten.
        """
        if not isinstance(text, str):
            raise InputError(f"a message is text, not {type(text).__name__}")
        t = self._template
        ask = _Ask(t["blank_lines"])
        if self.state is not None:
            ask.template(t["turn_end"])
        elif self._system:
            ask.fill(t["system"], self._system)
        ask.fill(t["user"], text)
        ask.template(t["assistant"] + self._opening)
        # Penalties count within a reply (as in BlinkDL/ChatRWKV, API_DEMO_CHAT.py), or they would in time forbid what every
        # reply has, such as </think>.
        state = self.state and replace(self.state, occurrences=None)
        ids = ask.encode(self._model)
        g = self._model.generate(ids, state, max_tokens=self._max_tokens, stop=t["stop"], sampling=self._sampling)
        self.generation = g
        try:
            yield from _reply(self._opening, (token.text for token in g))
        finally:
            if g.stats.n_generated:
                g.cut()  # if it was interrupted
                state = g.state
                self._past.append(self.state)
                self.state = state

    def undo(self) -> bool:
        """Take the last turn, or load, back; False if there is none that can be."""
        if not self._past:
            return False
        self.state = self._past.pop()
        return True

    def reset(self) -> None:
        """Forget everything but the system text."""
        self._past.clear()
        self.state = None

    def save(self, path: str | Path) -> None:
        """Write the conversation's state, replacing a state file of that name and nothing else.

        Raises  OutputError; InputError if nothing was said yet.
        """
        if self.state is None:
            raise InputError("there is nothing to save yet")
        refuse_output(path)
        self.state.save(path)

    def load(self, path: str | Path) -> None:
        """Go on from a state file of this model; undo takes it back.

        Raises  StateError
        """
        state = self._model.load_state(path)
        self._past.append(self.state)
        self.state = state


class _Ask:
    """What is read before a reply: pieces of the template and of messages in turn."""

    def __init__(self, blank_lines: str) -> None:
        self._blank_lines = blank_lines
        self._pieces = [""]  # the template's at even places, a message's at odd ones

    def template(self, text: str) -> None:
        self._pieces[-1] += text

    def fill(self, template: str, message: str) -> None:
        before, after = template.split("{}")
        self._pieces[-1] += before
        self._pieces += [_message(message, self._blank_lines), after]

    def encode(self, model: Model) -> list[int]:
        """Give the ids: those of the whole text, as long as its special tokens are the template's."""
        whole, templates, messages = "".join(self._pieces), self._pieces[::2], self._pieces[1::2]

        def is_ordinary(text: str) -> bool:
            return model.encode(text) == model.encode(text, special_tokens=False)

        ids, ordinary = model.encode(whole), model.encode(whole, special_tokens=False)
        if all(map(is_ordinary, templates)):
            return ordinary
        apart = [i for n, text in enumerate(self._pieces) for i in model.encode(text, special_tokens=n % 2 == 0)]
        special = {i for i in {*ids, *apart} - {*ordinary} if not is_ordinary(model.decode([i]))}
        same = [i for i in ids if i in special] == [i for i in apart if i in special]
        return ids if same and all(map(is_ordinary, messages)) else apart


# Unicode's white space, of which some end a line. Python's own has four separators of ASCII more.
_INSIDE = "\t \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_SPACE = _INSIDE + "\n\v\f\r\x85\u2028\u2029"
_LINE_END = "(?:\r\n|\r(?!\n)|[\n\v\f\x85\u2028\u2029])"
_BLANK_LINES_BEFORE = re.compile(f"[{_SPACE}]*{_LINE_END}")
_BLANK_LINES = re.compile(f"{_LINE_END}[{_SPACE}]*{_LINE_END}")
_INDENTED_LINE = re.compile(f"{_LINE_END}[{_INSIDE}]+[^{_SPACE}]")


def _message(text: str, blank_lines: str) -> str:
    """A message as the model reads it: docs/bundle.md, "Chat templates"."""
    before = _BLANK_LINES_BEFORE.match(text)
    text = text[before.end() if before else 0 :].rstrip(_SPACE)
    if blank_lines == "collapse":
        text = _BLANK_LINES.sub("\n", text)
    return text if _INDENTED_LINE.search(text) else text.lstrip(_SPACE)


def _reply(opening: str, pieces: Iterator[str]) -> Iterator[str]:
    """Pieces as a person reads them: a thought with its opening, an empty thought not at all, no space at the start."""
    empty = "</" in opening
    begun = bool(opening) and not empty
    if begun:
        yield opening.strip()
    for piece in pieces:
        if not begun:
            piece = piece.lstrip()
            if empty and piece:  # the thought's last bracket, which the model writes
                piece, empty = piece.removeprefix(">").lstrip(), False
        begun = begun or bool(piece)
        if piece:
            yield piece
