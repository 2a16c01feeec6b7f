"""Text to token ids and back."""

from pathlib import Path

import tokenizers

from .errors import InputError

# what checkpoints with a tokenizer.json call the end of a text
_END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>")


class Tokenizer:
    """A `tokenizer.json` of the tokenizers library.

    n_vocab      ids run from 0 to n_vocab - 1
    end_of_text  the id that ends a text, or None
    """

    kind = "json"

    def __init__(self, path: Path) -> None:
        try:
            self._t = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises Exception itself
            raise InputError(f"{path} is no tokenizer.json: {e}") from e
        self.n_vocab: int = 1 + max(self._t.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = (self._t.token_to_id(token) for token in _END_OF_TEXT)
        self.end_of_text: int | None = next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text."""
        ids: list[int] = self._t.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._t.decode(ids, skip_special_tokens=False)
        return text

    def stream(self) -> "TextStream":
        """Decode token by token."""
        return TextStream(self)


class TextStream:
    """Turn ids into text as they come, never splitting a character.

    Text is decoded together with the tokens before it, because some tokenizers join neighbours; only the few ids since
    the last whole character are kept.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # already shown
        self._held: list[int] = []  # not yet shown: they end inside a character

    def push(self, token: int) -> str:
        """Take one more id and give the text that is now whole, which may be empty."""
        self._held.append(token)
        text = self._new_text()
        # a UTF-8 character has at most four bytes: what four more tokens have not mended is not the start of one
        if text.endswith("\ufffd") and len(self._held) < 4:
            return ""
        self._before, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Give what is held back, with U+FFFD for an unfinished character."""
        text = self._new_text()
        self._before, self._held = [], []
        return text

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(shown) :]
