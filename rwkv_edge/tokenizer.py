"""Text to token ids and back: a `tokenizer.json`, or RWKV's own World vocabulary."""

import ast
import codecs
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from . import magic
from .errors import InputError

# what checkpoints with a tokenizer.json call the end of a text
_END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>")

WORLD = Path(__file__).parent / "world" / "rwkv_vocab_v20230424.txt"
WORLD_SIZE = 65536  # rows of the embedding
WORLD_TOKENS = 65530  # ids of the vocabulary, with 0, the end of text; the rows from here on are for tokens that a model adds


class Json:
    """A `tokenizer.json` of the tokenizers library.

    n_vocab       ids run from 0 to n_vocab - 1
    eos_token_id  the id that ends a text, or None

    The file's own `truncation`, `padding` and `dropout` are settings of a training, not of the vocabulary: they are off.
    """

    kind = "json"

    def __init__(self, path: Path) -> None:
        try:
            self._t = _plain(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as e:  # the library raises Exception itself
            raise InputError(f"{path} is no tokenizer.json: {e}") from e
        self._without_special: tokenizers.Tokenizer | None = None
        self.n_vocab: int = 1 + max(self._t.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = (self._t.token_to_id(token) for token in _END_OF_TEXT)
        self.eos_token_id: int | None = next((i for i in ids if i is not None), None)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Give the ids of a text.

        special_tokens  False: the text of a special token is text as any other, such as <|im_end|> in a message

        Raises  InputError if it is not Unicode text, or the tokenizer has no token for it.
        """
        if not special_tokens and self._without_special is None:
            self._without_special = _without_special(self._t)
        t = self._t if special_tokens else self._without_special
        assert t is not None
        try:
            text.encode()
            ids: list[int] = t.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError as e:
            raise InputError(f"the tokenizer cannot encode this text: {e.reason} at character {e.start}") from e
        except Exception as e:  # the library raises Exception itself
            raise InputError(f"the tokenizer cannot encode this text: {e}") from e
        return ids

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its whole text, or None."""
        found: int | None = self._t.token_to_id(token)
        return found

    def is_special(self, token: int) -> bool:
        """Whether an id marks something and is no text: an added token, or what is called as the end of a text is."""
        return token in self._t.get_added_tokens_decoder() or self._t.id_to_token(token) in _END_OF_TEXT

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._t.decode(ids, skip_special_tokens=False)
        return text

    def stream(self, after: Sequence[int] = ()) -> "JsonStream":
        """Decode token by token what comes after these ids."""
        return JsonStream(self, after)


def _plain(t: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer that gives all of a text's tokens and no others, and the same ones each time."""
    t.no_truncation()
    t.no_padding()
    if getattr(t.model, "dropout", None) is not None:  # of BPE: merges that are left out at random
        t.model.dropout = None
    return t


def _without_special(t: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, to which added tokens are text: special ones, and others in the form of one, `<tool_call>`.

    Added tokens of another form, such as runs of blanks, are found as before.
    """
    about = json.loads(t.to_str())
    for added in about["added_tokens"]:
        added["special"] |= bool(re.fullmatch("<.+>", added["content"], re.S))
    other = _plain(tokenizers.Tokenizer.from_str(json.dumps(about)))
    other.encode_special_tokens = True
    return other


_WINDOW = 8  # ids that can still change how the next one reads: a character has at most four


class JsonStream:
    """Turn ids into text as they come, never splitting a character.

    Some tokenizers join neighbours, so an id is decoded together with a few before it; only those are kept.

    unfinished  whether the last ids may be a part of a character
    """

    unfinished = False

    def __init__(self, tokenizer: Json, after: Sequence[int] = ()) -> None:
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
        text = self._tokenizer.decode(ids)
        self.unfinished = text.endswith("\ufffd")
        return text.removesuffix("\ufffd")


class World:
    """RWKV's World vocabulary: at every place the longest token that fits, over bytes.

    n_vocab, eos_token_id  as of Json; id 0 ends a text

    Special tokens are those from id 65530 on, where the vocabulary that every World model has ends, and `<|...|>`.

    Source  BlinkDL/ChatRWKV, tokenizer/rwkv_vocab_v20230424.txt: lines of `id repr length`, of text or of bytes
    """

    kind = "world"
    eos_token_id = 0

    def __init__(self, path: Path, text: str | None = None) -> None:
        """Read a file, or in its place a text of the same form."""
        try:
            lines = (path.read_text("utf-8-sig") if text is None else text).splitlines()
            ids = [int(line[: line.index(" ")]) for line in lines]
            # one literal of all of them: twenty times as fast as one by one
            values = ast.literal_eval(f"[{','.join(line[line.index(' ') : line.rindex(' ')] for line in lines)}]")
            tokens = [x.encode() if isinstance(x, str) else bytes(x) for x in values]
            lengths = [int(line[line.rindex(" ") :]) for line in lines]
        except (OSError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as e:
            raise InputError(f"{path} is no World vocabulary: {e}") from e
        self._ids = dict(zip(tokens, ids, strict=True))
        special = {x for x, i in self._ids.items() if i >= WORLD_TOKENS or (x[:2] == b"<|" and x[-2:] == b"|>")}
        self._ordinary = {x: i for x, i in self._ids.items() if x not in special} if special else self._ids
        self._tokens = dict(zip(ids, tokens, strict=True))
        sound = [len(x) for x in tokens] == lengths and all(bytes([b]) in self._ids for b in range(256))
        if not sound or min(ids) < 1 or len(self._tokens) != len(ids):
            raise InputError(f"{path} is no World vocabulary: its lengths or ids are wrong, or a byte is missing")
        self.n_vocab: int = 1 + max(ids)
        # by their first four bytes: the lengths of longer tokens, the longest first
        longer: dict[bytes, set[int]] = {}
        for token in tokens:
            if len(token) > 4:
                longer.setdefault(token[:4], set()).add(len(token))
        self._longer = {head: tuple(sorted(sizes, reverse=True)) for head, sizes in longer.items()}

    def encode(self, text: str | bytes, *, special_tokens: bool = True) -> list[int]:
        """Give the ids of a text, or of bytes.

        special_tokens  as of Json

        Raises  InputError if it is not Unicode text.
        """
        try:
            data = text.encode() if isinstance(text, str) else text
        except UnicodeEncodeError as e:
            raise InputError(f"the tokenizer cannot encode this text: {e.reason} at character {e.start}") from e
        get, longer, none = (self._ids if special_tokens else self._ordinary).get, self._longer.get, ()
        found: list[int] = []
        at, end = 0, len(data)
        while at < end:  # at the end of the data slices are shorter, and then all that is left
            head = data[at : at + 4]
            for n in longer(head, none):
                token = get(data[at : at + n])
                if token is not None:
                    break
            else:
                n = 4
                token = get(head)
                while token is None:
                    n -= 1
                    token = get(head[:n])
            found.append(token)
            at += n
        return found

    @property
    def tokens(self) -> Mapping[int, bytes]:
        """The bytes of every id."""
        return self._tokens

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its whole text, or None."""
        return self._ids.get(token.encode())

    def is_special(self, token: int) -> bool:
        """Whether an id marks something and is no text: 0, and special tokens."""
        return token == 0 or (token in self._tokens and self._tokens[token] not in self._ordinary)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Give the bytes of ids: what was encoded, byte for byte. Ids without a token have none."""
        return b"".join(self._tokens.get(i, b"") for i in ids)

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self, after: Sequence[int] = ()) -> "WorldStream":
        """Decode token by token what comes after these ids."""
        return WorldStream(self, after)


class WorldStream:
    """Turn ids into text as they come, never splitting a character."""

    def __init__(self, tokenizer: World, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(tokenizer.decode_bytes(after[-4:]))

    def push(self, token: int) -> str:
        """As JsonStream."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    @property
    def unfinished(self) -> bool:
        """As JsonStream."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """As JsonStream."""
        return self._decoder.decode(b"", final=True)


Tokenizer = Json | World


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json, or a World vocabulary (.txt).

    Raises  InputError if it is neither.
    """
    with contextlib.suppress(OSError):  # of a file that cannot be read, its reader says more
        if why := magic.explain(magic.read_head(path)):
            raise InputError(f"{path} {why}")
    return World(path) if path.suffix == ".txt" else Json(path)
