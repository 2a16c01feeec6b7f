"""Text to ids and back; streams that never split a character."""

import pytest
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st

from rwkv_edge.errors import InputError
from rwkv_edge.tokenizer import Tokenizer

T = Tokenizer(DEMO.with_name("tokenizer.json"))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_what_it_is():
    assert T.n_vocab == 4096
    assert T.end_of_text == 0
    assert T.encode("Once upon a time") == [715, 540, 259, 476]
    assert T.decode([0]) == "<|endoftext|>"


@given(text)
def test_text_comes_back(s):
    assert T.decode(T.encode(s)) == s


@given(text, text)
def test_a_stream_gives_the_same_text_in_whole_characters(before, s):
    stream, ids = T.stream(T.encode(before)), T.encode(s)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.finish() == s
    for part in parts:
        part.encode()  # a lone surrogate or half a character would raise


@given(st.lists(st.integers(1, 4095), max_size=80))
def test_a_stream_of_any_ids_is_their_text(ids):
    stream = T.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == T.decode(ids)


def test_a_character_of_many_tokens_comes_whole():
    ids = T.encode("a🦉b")
    assert len(ids) > 3
    stream = T.stream()
    assert [p for p in (stream.push(i) for i in ids) if p] == ["a", "🦉", "b"]


def test_an_unfinished_character_is_said_at_the_end():
    ids = T.encode("🦉")[:-1]
    stream = T.stream()
    assert [stream.push(i) for i in ids] == [""] * len(ids)
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"model": 3}'])
def test_files_that_are_none_are_refused(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer\.json"):
        Tokenizer(file)
