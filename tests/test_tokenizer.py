"""Text to ids and back; streams that never split a character."""

import pytest
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st

from rwkv_edge.errors import InputError
from rwkv_edge.tokenizer import WORLD, Json, World

T = Json(DEMO.with_name("tokenizer.json"))
W = World(WORLD)
both = pytest.mark.parametrize("t", [T, W], ids=["json", "world"])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_what_they_are():
    assert (T.n_vocab, T.eos_token_id, T.kind) == (4096, 0, "json")
    assert T.encode("Once upon a time") == [715, 540, 259, 476]
    assert T.decode([0]) == "<|endoftext|>"
    assert (W.n_vocab, W.eos_token_id, W.kind) == (65530, 0, "world")
    # by the rwkv package 0.8.32
    assert W.encode("User: Hello, 世界! 🦉\r\n") == [24281, 59, 36786, 45, 33, 10267, 14610, 34, 33, 3319, 167, 138, 263]
    assert W.decode([0, 65535]) == ""


@both
@given(s=text)
def test_text_comes_back(t, s):
    assert t.decode(t.encode(s)) == s


@given(st.binary(max_size=200))
def test_world_gives_any_bytes_back(data):
    assert W.decode_bytes(W.encode(data)) == data


@given(st.binary(max_size=30) | text.map(str.encode) | st.sampled_from([b" " * 200, b"=" * 81, b"the" * 9, b"\n \n  \n"]))
def test_world_takes_the_longest_token_at_every_place(data):
    expected, at = [], 0
    while at < len(data):
        n = max(n for n in range(1, 129) if data[at : at + n] in W._ids and at + n <= len(data))
        expected.append(W._ids[data[at : at + n]])
        at += n
    assert W.encode(data) == expected


@both
@given(before=text, s=text)
def test_a_stream_gives_the_same_text_in_whole_characters(t, before, s):
    stream, ids = t.stream(t.encode(before)), t.encode(s)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.finish() == s
    for part in parts:
        part.encode()  # a lone surrogate or half a character would raise


@both
@given(ids=st.lists(st.integers(1, 4095), max_size=80))
def test_a_stream_of_any_ids_is_their_text(t, ids):
    stream = t.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == t.decode(ids)


@both
def test_a_character_of_many_tokens_comes_whole(t):
    ids = t.encode("a🦉b")
    assert len(ids) > 3
    stream = t.stream()
    assert [p for p in (stream.push(i) for i in ids) if p] == ["a", "🦉", "b"]


@both
def test_an_unfinished_character_is_said_at_the_end(t):
    ids = t.encode("🦉")[:-1]
    stream = t.stream()
    assert [stream.push(i) for i in ids] == [""] * len(ids)
    assert stream.finish() == "\ufffd"


@both
def test_what_is_no_unicode_is_refused(t):
    with pytest.raises(InputError, match="the tokenizer cannot encode this text"):
        t.encode("\ud800")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:100],  # bytes are missing
        lambda lines: [*lines, "65530 __import__('os').getcwd() 5"],  # code
        lambda lines: [*lines, "65530 'abc' 4"],  # a wrong length
        lambda lines: [*lines, "7 'abcabcabc' 9"],  # an id again
        lambda lines: [*lines, "0 'abcabcabc' 9"],  # the end of text
        lambda lines: [*lines, "x"],
        lambda lines: [],
    ],
)
def test_world_vocabularies_that_are_none_are_refused(change, tmp_path):
    file = tmp_path / "v.txt"
    file.write_text("\n".join(change(WORLD.read_text("utf-8").splitlines()[:400])) + "\n", "utf-8")
    with pytest.raises(InputError, match=r"v\.txt is no World vocabulary: "):
        World(file)


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"model": 3}'])
def test_files_that_are_none_are_refused(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer\.json"):
        Json(file)
