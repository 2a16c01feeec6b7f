"""Tokenizers, end-of-text ids and chat templates that lie beside weights: which are used, which are not, and what is said."""

import ast
import json
import shutil
from pathlib import Path

import factory
import pytest
import tokenizers
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import export, open_bundle
from rwkv_edge.cli import cli
from rwkv_edge.errors import InputError

VOCABULARY = Path(__file__).parent.parent / "rwkv_edge" / "world" / "rwkv_vocab_v20230424.txt"
BLANK_LINE = 261


def world_pth(folder, n_vocab=65536):
    folder.mkdir(exist_ok=True)
    return factory.write_pth(folder / "model.pth", factory.weights(**factory.WORLD | {"n_vocab": n_vocab}))


def world_folder(folder, config=None, **files):
    w = factory.weights(**factory.WORLD)
    factory.write_folder(folder, factory.fla(w), config={"model_type": "rwkv7", "group_norm_epsilon": 64e-5} | (config or {}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def exported(source, tmp_path, **options):
    written = export(source, tmp_path / "out", quant="none", **options)
    return json.loads((written.path / "manifest.json").read_text()), open_bundle(written.path), " | ".join(written.notes)


def official_ids(text, n_vocab=65536):
    """Greedy longest match by the vocabulary's own definition, over all tokens at every place."""
    ids = {}
    for line in VOCABULARY.read_text("utf-8").splitlines():
        i, literal = line.split(" ", 1)
        token = ast.literal_eval(literal.rsplit(" ", 1)[0])
        if int(i) < n_vocab:
            ids[token.encode() if isinstance(token, str) else token] = int(i)
    data, at, found = text.encode(), 0, []
    while at < len(data):
        n = next(n for n in range(min(128, len(data) - at), 0, -1) if data[at : at + n] in ids)
        found.append(ids[data[at : at + n]])
        at += n
    return found


# --- a tokenizer.json's own settings ---


@pytest.mark.parametrize("setting", ["truncation", "padding", "dropout"])
def test_settings_of_a_training_change_no_text(setting, tmp_path):
    """Expected: what the tokenizers library gives for the file without the setting."""
    text = "Once upon a time there was a boy who lived in a house by the sea. " * 3
    plain = tokenizers.Tokenizer.from_file(str(DEMO.with_name("tokenizer.json"))).encode(text).ids
    about = json.loads(DEMO.with_name("tokenizer.json").read_text())
    pad = {"strategy": {"Fixed": 512}, "direction": "Left", "pad_to_multiple_of": None}
    if setting == "truncation":
        about["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    elif setting == "padding":
        about["padding"] = pad | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    else:
        about["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    shutil.copy(DEMO, tmp_path / "model.pth")
    export(tmp_path / "model.pth", tmp_path / "out", quant="int8")
    assert open_bundle(tmp_path / "out").encode(text) == plain


# --- which tokenizer ---


def test_an_extended_world_vocabulary_beside_the_weights_is_used(tmp_path):
    pth = world_pth(tmp_path)
    lines = VOCABULARY.read_text("utf-8") + "65530 '<|im_start|>' 12\n65531 '<|im_end|>' 10\n"
    (tmp_path / "rwkv_vocab_chat.txt").write_text(lines, "utf-8")
    manifest, model, notes = exported(pth, tmp_path)
    assert model.encode("<|im_start|>a") == [65530, *official_ids("a")]
    assert model.decode([65531]) == "<|im_end|>"
    assert "rwkv_vocab_chat.txt" in notes
    assert manifest["tokenizer"]["file"] == "rwkv_vocab.txt"


@pytest.mark.parametrize("n_vocab", [65529, 65530, 65535, 65537])
def test_world_vocabularies_of_other_numbers_of_rows(n_vocab, tmp_path):
    pth = world_pth(tmp_path, n_vocab)
    _, model, notes = exported(pth, tmp_path)
    assert model.encode("It's né. 中文\n\n") == official_ids("It's né. 中文\n\n")
    assert "World" in notes
    assert model.encode(" " * 128) == official_ids(" " * 128, n_vocab)  # one token of 128 blanks, whose id is 65529


def test_added_tokens_of_a_folder_are_tokens_but_for_those_that_world_has(tmp_path):
    added = {"<|im_start|>": 65530, "\n\n": 65531, "<|im_end|>": 65532}
    folder = world_folder(tmp_path / "m", added_tokens=added)
    _, model, notes = exported(folder, tmp_path)
    assert model.encode("<|im_start|>\n\n<|im_end|>") == [65530, BLANK_LINE, 65532]
    assert r"'\n\n', which is 261 already" in notes


def test_added_tokens_are_read_from_tokenizer_config_too(tmp_path):
    decoder = {"65530": {"content": "<tool>", "special": True}, "0": {"content": "<|endoftext|>", "special": True}}
    _, model, _ = exported(world_folder(tmp_path / "m", tokenizer_config={"added_tokens_decoder": decoder}), tmp_path)
    assert model.encode("<tool>") == [65530]
    assert model.eos_token_ids == (0,)


def gguf_tokens(extra=()):
    """As llama.cpp's converter writes them: repr of the bytes, without its quotes; [PADn] for rows without a token."""
    tokens = [b"<s>"]
    for line in VOCABULARY.read_text("utf-8").splitlines():
        token = ast.literal_eval(line.split(" ", 1)[1].rsplit(" ", 1)[0])
        token = token.encode() if isinstance(token, str) else token
        tokens.append(repr(token)[2:-1].encode())
    tokens += extra
    return tokens + [b"[PAD%d]" % i for i in range(len(tokens), 65536)]


@pytest.mark.parametrize("extra", [(), (b"<|im_start|>", b"<|im_end|>")], ids=["official", "extended"])
def test_the_tokenizer_in_a_gguf_is_used(extra, tmp_path):
    tensors, about = factory.llama_cpp(factory.weights(**factory.WORLD), "7")
    about = about | {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": gguf_tokens(extra),
        "tokenizer.ggml.eos_token_id": 0,
    }
    if extra:
        about["tokenizer.ggml.eos_token_id"] = 65531
        about["tokenizer.chat_template"] = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        )
    manifest, model, notes = exported(factory.write_gguf(tmp_path / "m.gguf", tensors, about), tmp_path)
    plain = '\t\\ it\'s "é" 中文\r\n' + " " * 128
    assert model.encode(plain) == official_ids(plain)
    assert "vocabulary in the file" in notes
    if extra:
        assert model.encode("<|im_end|>") == [65531]
        assert model.eos_token_ids == (0, 65531)
        assert manifest["prompt"]["assistant"] == "<|im_start|>assistant\n"
    else:
        assert (tmp_path / "out" / "rwkv_vocab.txt").read_bytes() == VOCABULARY.read_bytes()


@pytest.mark.parametrize("content", ["another model's", "damaged", "short"])
def test_a_tokenizer_that_merely_lies_there_and_does_not_fit_is_passed_over(content, tmp_path):
    pth = world_pth(tmp_path)
    other = tmp_path / ("rwkv_vocab_x.txt" if content == "short" else "tokenizer.json")
    text = {
        "another model's": DEMO.with_name("tokenizer.json").read_text(),
        "damaged": "{",
        "short": "\n".join(VOCABULARY.read_text("utf-8").splitlines()[:300]),
    }[content]
    other.write_text(text, "utf-8")
    _, model, notes = exported(pth, tmp_path)
    assert model.encode("Hello world\n\n") == official_ids("Hello world\n\n")
    assert "not used" in notes
    assert other.name in notes
    with pytest.raises(InputError, match=other.name):
        export(pth, tmp_path / "named", tokenizer=other)


def test_the_order_is_named_then_own_then_beside_then_built_in(tmp_path):
    pth = world_pth(tmp_path)
    lines = VOCABULARY.read_text("utf-8") + "65530 '<beside>' 8\n"
    (tmp_path / "rwkv_vocab_a.txt").write_text(lines, "utf-8")
    (tmp_path / "rwkv_vocab_b.txt").write_text(lines.replace("<beside>", "<second>"), "utf-8")
    (tmp_path / "named.txt").write_text(lines.replace("<beside>", "<named!>"), "utf-8")

    def token(out, **options):
        written = export(pth, tmp_path / out, quant="none", **options)
        return open_bundle(written.path).decode([65530]), " | ".join(written.notes)

    assert token("1", tokenizer=tmp_path / "named.txt")[0] == "<named!>"
    text, notes = token("2")
    assert text == "<beside>"
    assert "rwkv_vocab_b.txt" in notes
    assert token("3", tokenizer="world")[0] == ""
    with pytest.raises(InputError, match="65530 tokens, but the model has 4096"):
        export(DEMO, tmp_path / "4", tokenizer="world")


def test_inspect_tells_of_the_tokenizer_that_export_takes(tmp_path):
    pth = world_pth(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(DEMO.with_name("tokenizer.json").read_bytes())
    shown = CliRunner().invoke(cli, ["inspect", str(pth)]).stdout
    written = export(pth, tmp_path / "out", quant="none")
    notes = [note for note in written.notes if "tokenizer" in note]
    assert len(notes) == 2
    assert all(note in shown for note in notes)


# --- how a text ends ---


def test_several_tokens_may_end_a_text(tmp_path):
    folder = world_folder(
        tmp_path / "m",
        config={"eos_token_id": 0},
        added_tokens={"<|im_end|>": 65530, "<|end|>": 65531},
        generation_config={"eos_token_id": [0, 65531]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
    )
    manifest, model, _ = exported(folder, tmp_path)
    assert manifest["tokenizer"]["eos_token_ids"] == [0, 65531, 65530]
    assert manifest["tokenizer"]["bos_token_id"] == 0
    generation = model.generate("Hello", bias={65530: 1e4}, max_tokens=5)
    assert [token.id for token in generation] == [65530]
    assert generation.finish == "end"


def test_ids_that_end_a_text_of_another_tokenizer(tmp_path):
    """Expected: transformers stops at every id of the list."""
    w = factory.weights(**factory.WORLD | {"n_vocab": 4096})
    folder = factory.write_folder(tmp_path / "m", factory.fla(w), config={"model_type": "rwkv7", "group_norm_epsilon": 64e-5})
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 0, 7, 2]}')
    shutil.copy(DEMO.with_name("tokenizer.json"), folder)
    _, model, notes = exported(folder, tmp_path)
    assert model.eos_token_ids == (0, 3, 7)
    assert "eos_token_id 2 of generation_config.json is not used" in notes


@pytest.mark.parametrize(("end", "mark"), [("\r\n", ""), ("\n", "\ufeff")], ids=["CRLF", "byte order mark"])
def test_a_vocabulary_that_an_editor_of_windows_saved(end, mark, tmp_path):
    pth = world_pth(tmp_path)
    lines = mark + VOCABULARY.read_text("utf-8") + "65530 '<|im_start|>' 12\n"
    (tmp_path / "rwkv_vocab.txt").write_bytes(lines.replace("\n", end).encode())
    _, model, _ = exported(pth, tmp_path)
    assert model.encode("<|im_start|>\n\n") == [65530, BLANK_LINE]
    assert (tmp_path / "out" / "rwkv_vocab.txt").read_bytes() == lines.lstrip("\ufeff").encode()


def test_a_default_of_a_class_ends_no_text(tmp_path):
    """fla's configuration class has eos_token_id 2 where nobody sets it; in World's vocabulary that is a byte."""
    _, model, notes = exported(world_folder(tmp_path / "m", config={"eos_token_id": 2}), tmp_path)
    assert model.eos_token_ids == (0,)
    assert "eos_token_id 2 of config.json is not used" in notes


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
WORLDS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\nAssistant:' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "assistant"),
    [
        (CHATML, "<|im_start|>assistant\n"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}], "<|im_start|>assistant\n"),
        (WORLDS, "Assistant:"),
        ("{{ '<|im_start|>User: ' + messages[0]['content'] + '<|im_end|>Assistant:' }}", None),
        ("{{ 'User: ' + messages[0]['content'] + '\n' + 'Assistant:' }}", None),
        ("{{ '[INST] + messages[0]['content'] + ' [/INST]' }}", None),
    ],
    ids=["chatml", "chatml among several", "world", "markers around World's roles", "one line break", "another"],
)
def test_a_folder_s_chat_template_is_recognised_or_said_to_be_unused(template, assistant, tmp_path):
    folder = world_folder(
        tmp_path / "m",
        added_tokens={"<|im_start|>": 65530, "<|im_end|>": 65531},
        tokenizer_config={"chat_template": template},
    )
    manifest, model, notes = exported(folder, tmp_path)
    if assistant is None:
        assert "chat template is not used" in notes
        return
    assert "template" not in notes
    assert manifest["prompt"]["assistant"] == assistant
    if assistant.startswith("<"):
        assert 65531 in model.eos_token_ids
        assert manifest["prompt"]["blank_lines"] == "keep"
