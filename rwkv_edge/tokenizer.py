"""Text to token ids and back."""

from collections.abc import Sequence
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
        """Give the ids of a text.

        Raises  InputError if it is not Unicode text, or the tokenizer has no token for it.
        """
        try:
            ids: list[int] = self._t.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the library raises Exception itself
            raise InputError(f"the tokenizer cannot encode this text: {e}") from e
        return ids

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._t.decode(ids, skip_special_tokens=False)
        return text

    def stream(self, after: Sequence[int] = ()) -> "TextStream":
        """Decode token by token what comes after these ids."""
        return TextStream(self, after)


_WINDOW = 8  # ids that can still change how the next one reads: a character has at most four


class TextStream:
    """Turn ids into text as they come, never splitting a character.

    Some tokenizers join neighbours, so an id is decoded together with a few before it; only those are kept.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(after[-_WINDOW:])
        self._shown = len(self._whole(self._ids))

    def push(self, token: int) -> str:
        """Take one more id and give the text that is now whole, which may be empty."""
        self._ids.append(token)
        text = self._whole(self._ids)
        new = text[self._shown :]
        self._shown = len(text)
        if len(self._ids) > 2 * _WINDOW:
            self._ids = self._ids[-_WINDOW:]
            self._shown = len(self._whole(self._ids))
        return new

    def finish(self) -> str:
        """Give what is held back: U+FFFD for an unfinished character."""
        text = self._tokenizer.decode(self._ids)
        new, self._shown = text[self._shown :], len(text)
        return new

    def _whole(self, ids: list[int]) -> str:
        """The text of ids, less a last character that more bytes could finish."""
        return self._tokenizer.decode(ids).removesuffix("\ufffd")
