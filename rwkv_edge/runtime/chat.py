"""A conversation: turns in the roles that a model was trained on, its memory one state of fixed size."""

from collections import deque
from collections.abc import Iterator
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
        ask = t["user"].replace("{}", _paragraphs(text)) + t["assistant"] + self._opening
        if self.state is not None:
            ask = t["turn_end"] + ask
        elif self._system:
            ask = t["system"].replace("{}", _paragraphs(self._system)) + ask
        ids = [i for i in self._model.encode(ask) if i not in self._model.eos_token_ids]  # a message cannot end the text
        g = self._model.generate(ids, self.state, max_tokens=self._max_tokens, stop=t["stop"], sampling=self._sampling)
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


def _paragraphs(text: str) -> str:
    """A message as the models know it: no blank line, which would end the turn."""
    return "\n".join(filter(None, (line.strip() for line in text.replace("\r", "\n").split("\n"))))


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
