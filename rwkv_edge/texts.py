"""How a checkpoint's texts become tokens: its tokenizer, the tokens that begin and end a text, and its chat template.

Sources: github.com/huggingface/transformers, tokenization_utils_base.py and configuration_utils.py, for the files of a folder;
         github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py _set_vocab_rwkv_world and src/llama-vocab.cpp
         llama_unescape_rwkv_token, for GGUF
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint
from .checkpoints.gguf import Texts as TextList
from .checkpoints.hf import WEIGHTS, read_json
from .errors import CheckpointError, InputError
from .tokenizer import WORLD, WORLD_SIZE, WORLD_TOKENS, Json, Tokenizer, World, open_tokenizer

# a table of rows padded to a multiple of 128 or so is common; with more rows it is another model's tokenizer
_MAX_UNUSED = 1024
_CLASS_DEFAULT = 2  # eos_token_id of transformers' and fla's configuration classes where nobody has set it


@dataclass(frozen=True)
class Texts:
    """What a bundle knows of texts.

    tokenizer      None: the bundle takes and gives token ids
    content        of the tokenizer's file
    eos_token_ids  ids that end a text
    bos_token_id   the id that stands before a text's first
    template       the name of the chat template
    notes          which tokenizer was chosen, and why; what was not used
    """

    tokenizer: Tokenizer | None
    content: bytes
    eos_token_ids: tuple[int, ...]
    bos_token_id: int
    template: str
    notes: tuple[str, ...]

    @property
    def entry(self) -> dict[str, Any] | None:
        """The tokenizer's entry in a manifest."""
        if self.tokenizer is None:
            return None
        name = "rwkv_vocab.txt" if isinstance(self.tokenizer, World) else "tokenizer.json"
        ends = list(self.eos_token_ids)
        return {"kind": self.tokenizer.kind, "file": name, "eos_token_ids": ends, "bos_token_id": self.bos_token_id}


@dataclass(frozen=True)
class _Found:
    """A tokenizer, its file's content, and where it is from."""

    tokenizer: Tokenizer
    content: bytes
    what: str


def find_texts(checkpoint: Checkpoint, tokenizer: str | Path | None = None, template: str | None = None) -> Texts:
    """Choose a checkpoint's tokenizer, and read what is said of its texts.

    The first of these that fits the model: the one that is named; the checkpoint's own, in its folder or its GGUF; one that
    lies beside its file; the built-in World vocabulary, by the number of rows.

    tokenizer  a file, "world", or "none"
    template   the name of a chat template; None takes the one that the checkpoint has, or World's

    Raises  InputError if the named tokenizer is missing, damaged, or does not fit the model.
    """
    if tokenizer is not None and str(tokenizer) == "none":
        return Texts(None, b"", (), 0, template or "none", ("no tokenizer: the bundle takes and gives token ids",))
    about, notes = _side_files(checkpoint)
    found = _named(checkpoint, tokenizer) if tokenizer is not None else _own(checkpoint, notes)
    if found is None:
        reason = f"no tokenizer for {checkpoint.spec.n_vocab} tokens in or beside {checkpoint.path.name}"
        notes.append(f"{reason}: the bundle takes and gives token ids. Give --tokenizer FILE, or world")
        return Texts(None, b"", (), 0, template or "none", tuple(notes))
    notes.insert(0, f"tokenizer: {found.what}")
    added = _added_tokens(about)
    if isinstance(found.tokenizer, World):
        found, ids = _with_added(found, added, checkpoint.spec.n_vocab, notes)
    else:
        ids = {token: i for token, i in added.items() if found.tokenizer.token_to_id(token) == i}
        lost = sorted(added.keys() - ids.keys())
        if lost:
            notes.append(f"added tokens that the tokenizer.json does not have are not used: {_few(lost)}")
    rows = checkpoint.spec.n_vocab
    usual = isinstance(found.tokenizer, World) and found.tokenizer.n_vocab >= WORLD_TOKENS and rows <= WORLD_SIZE
    if found.tokenizer.n_vocab < rows and not usual:
        notes.append(f"the tokenizer has {found.tokenizer.n_vocab} tokens of the model's {rows}: the others are never chosen")
    chosen = template or _template(about, notes) or ("rwkv" if isinstance(found.tokenizer, World) else "none")
    eos, bos = _ends(found.tokenizer, about, ids, chosen, checkpoint.spec.n_vocab, notes)
    return Texts(found.tokenizer, found.content, eos, bos, chosen, tuple(notes))


# --- the tokenizer ---


def _named(checkpoint: Checkpoint, named: str | Path) -> _Found:
    n_vocab = checkpoint.spec.n_vocab
    if str(named) == "world" and not Path(named).exists():
        found = _world(n_vocab, "the built-in World vocabulary, by --tokenizer world")
    else:
        file = Path(named)
        if not file.is_file():
            raise InputError(f"the tokenizer {file} does not exist: give a file, world for the built-in vocabulary, or none")
        found = _of_file(file, f"{file.name}, by --tokenizer")
    if reason := _misfit(found.tokenizer, n_vocab):
        raise InputError(
            f"{named} {reason}: it belongs to another model; give the right one with --tokenizer, world for the built-in "
            "vocabulary, or none to do without"
        )
    return found


def _misfit(tokenizer: Tokenizer, n_vocab: int) -> str | None:
    """Why a tokenizer cannot be a model's, or None."""
    if tokenizer.n_vocab <= n_vocab < tokenizer.n_vocab + _MAX_UNUSED:
        return None
    return f"has {tokenizer.n_vocab} tokens, but the model has {n_vocab}"


def _own(checkpoint: Checkpoint, notes: list[str]) -> _Found | None:
    """The first tokenizer that fits; notes on those that do not, and on those that come after it."""
    found: _Found | None = None
    passed: list[str] = []
    for name, candidate in _candidates(checkpoint):
        if found is not None:
            passed.append(f"{name} comes after it")
            continue
        try:
            one = candidate()
        except (InputError, CheckpointError) as e:
            passed.append(str(e))
            continue
        reason = _misfit(one.tokenizer, checkpoint.spec.n_vocab)
        if reason:
            passed.append(f"{name} {reason}")
        else:
            found = one
    if passed:
        notes.append(f"not used: {'; '.join(passed)}")
    if found is None and WORLD_TOKENS - 1 <= checkpoint.spec.n_vocab <= WORLD_SIZE + 1:
        found = _world(
            checkpoint.spec.n_vocab, f"the built-in World vocabulary, for {checkpoint.spec.n_vocab} rows are its size"
        )
    return found


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], _Found]]]:
    """A checkpoint's own tokenizers, then those that lie beside its file: what each is called, and how it is opened."""
    path, metadata = checkpoint.path, checkpoint.metadata
    if path.is_dir():
        files = [path / "tokenizer.json", *_vocabularies(path), path / "vocab.txt"]
        # other models' vocab.txt has no ids
        files = [f for f in files if f.is_file() and (f.name != "vocab.txt" or _starts_as_world(f))]
        where = "of the folder"
    else:
        if "tokenizer.ggml.model" in metadata or "tokenizer.ggml.tokens" in metadata:
            yield "the vocabulary in the file", partial(_of_gguf, metadata, path)
        files = [f for f in (path.with_name("tokenizer.json"), *_vocabularies(path.parent)) if f.is_file()]
        where = "beside the file"
    for file in files:
        yield f"{file.name} {where}", partial(_of_file, file, f"{file.name} {where}")


def _vocabularies(folder: Path) -> list[Path]:
    """World vocabularies, the one with the most lines first: it extends the others. Bytes do not tell: line ends differ."""
    files = [file for file in folder.glob("rwkv_vocab*.txt") if file.is_file()]
    return sorted(files, key=lambda file: (-file.read_bytes().count(b"\n"), file.name))


def _starts_as_world(file: Path) -> bool:
    with open(file, "rb") as f:
        return f.read(2) == b"1 "


def _of_file(file: Path, what: str) -> _Found:
    tokenizer, content = open_tokenizer(file), file.read_bytes()
    if isinstance(tokenizer, World):  # for readers that know no byte order mark and one line end
        content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    return _Found(tokenizer, content, what)


def _world(n_vocab: int, what: str) -> _Found:
    content = WORLD.read_bytes()
    if n_vocab == WORLD_TOKENS - 1:  # a model without a row for the last token
        content = b"\n".join(line for line in content.splitlines() if int(line.split(b" ", 1)[0]) < n_vocab) + b"\n"
    return _Found(World(WORLD, content.decode()), content, what)


def _of_gguf(metadata: Mapping[str, Any], path: Path) -> _Found:
    """The World vocabulary in a GGUF's metadata; other kinds are refused."""
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind != "rwkv" or not isinstance(tokens, TextList):
        raise InputError(f"the tokenizer in {path.name} is of kind {kind!r}, and only 'rwkv' can be read")
    lines = []
    for i, escaped in enumerate(tokens.read()):
        # the end of text, and rows that only fill the table
        if i and escaped and not re.fullmatch(rb"\[PAD\d+\]|<unused\d*>", escaped):
            lines.append(_line(i, _unescape(escaped)))
    content = ("\n".join(lines) + "\n").encode()
    tokenizer, builtin = World(path, content.decode()), World(WORLD)
    if tokenizer.tokens == builtin.tokens:
        tokenizer, content = builtin, WORLD.read_bytes()  # the same bytes as from another container
    return _Found(tokenizer, content, "the vocabulary in the file")


def _unescape(text: bytes) -> bytes:
    r"""A token as llama.cpp has it: `\t`, `\n`, `\r`, `\xNN`, and any other character after a backslash is itself."""

    def one(m: re.Match[bytes]) -> bytes:
        if m[1][:1] == b"x" and len(m[1]) == 3:
            return bytes([int(m[1][1:], 16)])
        return {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(m[1], m[1])

    return re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", one, text, flags=re.S)


def _line(i: int, token: bytes) -> str:
    """A token's line in a World vocabulary."""
    try:
        literal = repr(token.decode())
    except UnicodeDecodeError:
        literal = repr(token)
    return f"{i} {literal} {len(token)}"


# --- what a folder says ---


def _side_files(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """What a folder's files, or a GGUF's metadata, say of texts: the files' contents by name."""
    if checkpoint.metadata:
        get = checkpoint.metadata.get
        config = {"eos_token_id": get("tokenizer.ggml.eos_token_id"), "bos_token_id": get("tokenizer.ggml.bos_token_id")}
        template = get("tokenizer.chat_template")
        return {"generation_config.json": config, "tokenizer_config.json": {"chat_template": template}}, []
    path = checkpoint.path
    if not path.is_dir() and path.name not in WEIGHTS:
        return {}, []
    folder = path if path.is_dir() else path.parent
    about: dict[str, Any] = {}
    notes: list[str] = []
    names = ("config", "generation_config", "tokenizer_config", "special_tokens_map", "added_tokens", "chat_template")
    for name in (f"{name}.json" for name in names):
        if (folder / name).exists():
            try:
                about[name] = read_json(folder / name)
            except CheckpointError as e:
                notes.append(f"{name} is not used: {e}")
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_bytes()[: 1 << 20].decode("utf-8", "replace")
        about["chat_template.json"] = {"chat_template": text}
    return about, notes


def _added_tokens(about: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that a folder adds to its vocabulary."""
    added = {t: i for t, i in about.get("added_tokens.json", {}).items() if type(i) is int}
    decoder = about.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for i, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(content, str) and i.isdecimal():
            added.setdefault(content, int(i))
    return {token: i for token, i in added.items() if token}


def _with_added(found: _Found, added: Mapping[str, int], n_vocab: int, notes: list[str]) -> tuple[_Found, dict[str, int]]:
    """A World vocabulary with a folder's added tokens; those that it has already as one token stay what they were.

    Returns  it, and the id of every added token that is one.
    """
    assert isinstance(found.tokenizer, World)
    ids: dict[str, int] = {}
    new: dict[int, str] = {}
    left: list[str] = []
    for token, i in sorted(added.items(), key=lambda item: item[1]):
        own = found.tokenizer.token_to_id(token)
        if own == i or i == 0:
            ids[token] = i
        elif own is not None:
            left.append(f"{token!r}, which is {own} already")
        elif i in found.tokenizer.tokens or i in new or not 0 < i < n_vocab:
            left.append(f"{token!r}, for {i} is taken or no row of the model")
        else:
            ids[token] = i
            new[i] = token
    if left:
        notes.append(f"added tokens that are not used: {'; '.join(left[:5])}")
    if not new:
        return found, ids
    text = found.content.decode()
    text += "" if text.endswith("\n") else "\n"
    text += "".join(f"{_line(i, token.encode())}\n" for i, token in new.items())
    what = f"{found.what}, with {len(new)} added tokens: {_few(list(new.values()))}"
    notes[0] = f"tokenizer: {what}"
    return _Found(World(WORLD, text), text.encode(), what), ids


def _few(tokens: list[str]) -> str:
    return ", ".join(map(repr, tokens[:3])) + (f" and {len(tokens) - 3} more" if len(tokens) > 3 else "")


def _ends(
    tokenizer: Tokenizer, about: Mapping[str, Any], added: Mapping[str, int], template: str, n_vocab: int, notes: list[str]
) -> tuple[tuple[int, ...], int]:
    """The ids that end a text, and the one that begins it.

    Among World's tokens only special ones can be ends. Others may be anything but what configuration classes say unasked.
    """
    own = tokenizer.eos_token_id
    ends = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        given = about.get(name, {}).get("eos_token_id")
        for i in given if isinstance(given, list) else [given]:
            if type(i) is not int or i in ends:
                continue
            special = tokenizer.is_special(i) or i in added.values()
            if 0 <= i < n_vocab and (special or (isinstance(tokenizer, Json) and i != _CLASS_DEFAULT)):
                ends.append(i)
            else:
                notes.append(f"eos_token_id {i} of {name} is not used: it is not a special token")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = about.get(name, {}).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found = added.get(token)
            found = tokenizer.token_to_id(token) if found is None else found
            if found is not None and found not in ends and (tokenizer.is_special(found) or token in added):
                ends.append(found)
    end = tokenizer.token_to_id("<|im_end|>") if template == "chatml" else None
    if end is not None and end not in ends:
        ends.append(end)
    bos = about.get("config.json", {}).get("bos_token_id")
    known = own is None and type(bos) is int and 0 <= bos < n_vocab and tokenizer.is_special(bos)
    return tuple(ends), bos if known else own or 0


def _template(about: Mapping[str, Any], notes: list[str]) -> str | None:
    """The chat template that a folder has, told by the marks in it; None if there is none, or another."""
    text = about.get("chat_template.json", {}).get("chat_template") or about.get("tokenizer_config.json", {}).get(
        "chat_template"
    )
    if isinstance(text, list):  # several by name
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default", next(iter(named.values()), None))
    if not isinstance(text, str) or not text:
        return None
    if "<|im_start|>" in text and "<|im_end|>" in text and not re.search(r"<\|im_sep\|>|User:", text):
        return "chatml"
    if text == "rwkv-world" or (
        "<|" not in text and re.search(r"User:.*Assistant:", text, re.S) and re.search(r"(\\n|\n){2}", text)
    ):
        return "rwkv"
    notes.append("the chat template is not used: it is neither ChatML nor User: and Assistant:. Choose one with --template")
    return None
