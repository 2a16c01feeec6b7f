"""A conversation, with the demo model in the roles of one that was taught to chat: what it says is its own affair."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from rwkv_edge import Chat
from rwkv_edge.cli import cli
from rwkv_edge.convert import TEMPLATES
from rwkv_edge.errors import InputError, OutputError, StateError
from rwkv_edge.runtime.chat import N_UNDO, _reply


@pytest.fixture
def talker(model):
    return model("demo", quant="none", template="rwkv")


def test_the_prompt_is_the_one_that_models_were_taught(talker):
    """Roles, blank lines, system text: the state is the one that reading the whole transcript gives."""
    chat = Chat(talker, system="Be kind.", max_tokens=5, temperature=0)
    first = "".join(
        token.text for token in talker.generate("System: Be kind.\n\nUser: Hello\n\nAssistant:", max_tokens=5, temperature=0)
    )
    assert "".join(chat.say("Hello")) == first.lstrip()
    second = "".join(chat.say(" How are\n\n\nyou? "))
    transcript = f"System: Be kind.\n\nUser: Hello\n\nAssistant:{first}\n\nUser: How are\nyou?\n\nAssistant:"
    said = "".join(t.text for t in talker.generate(transcript, max_tokens=5, temperature=0))
    assert second == said.lstrip()
    assert chat.generation.finish == "length"


def test_a_stop_ends_the_turn_and_is_not_kept(talker, monkeypatch):
    """The model begins to speak for the user: that is neither shown nor remembered."""
    words = "I am well.\n\nUser: And"
    ids = iter(talker.encode(words))

    def speak(logits, given):
        logits[:] = -np.inf
        logits[next(ids)] = 0
        return logits

    template = TEMPLATES["rwkv"]
    ask = "User: Hello\n\nAssistant:"
    g = talker.generate(ask, stop=template["stop"], logits=speak)
    assert "".join(t.text for t in g) == "I am well."
    assert g.finish == "stop"
    _, expected = talker.feed(talker.encode("I am well."), talker.feed(talker.encode(ask))[1])
    for name, x in expected.tensors.items():
        np.testing.assert_allclose(g.state.tensors[name], x, atol=1e-4 * (x.std() or 1))


def test_undo_reset_save_and_load(talker, tmp_path):
    chat = Chat(talker, max_tokens=3, temperature=0)
    assert not chat.undo()
    with pytest.raises(InputError, match="there is nothing to save yet"):
        chat.save(tmp_path / "s")
    first = "".join(chat.say("One"))
    state = chat.state
    chat.save(tmp_path / "s")
    second = "".join(chat.say("Two"))
    assert chat.state.n_tokens > state.n_tokens
    assert chat.undo()
    assert chat.state is state
    assert "".join(chat.say("Two")) == second
    chat.load(tmp_path / "s")
    assert "".join(chat.say("Two")) == second
    chat.reset()
    assert chat.state is None
    assert not chat.undo()
    assert "".join(chat.say("One")) == first
    (tmp_path / "letter").write_text("precious")
    with pytest.raises(OutputError, match="exists and is no state file"):
        chat.save(tmp_path / "letter")
    with pytest.raises(StateError, match="does not exist"):
        chat.load(tmp_path / "none")


def test_memory_is_a_few_states_however_long_the_conversation(talker):
    chat = Chat(talker, max_tokens=2, temperature=0)
    for i in range(3 * N_UNDO):
        "".join(chat.say(f"Number {i}"))
    assert sum(chat.undo() for _ in range(3 * N_UNDO)) == N_UNDO


def test_an_interrupted_reply_is_kept_as_far_as_it_came(talker):
    chat = Chat(talker, max_tokens=20, temperature=0)
    pieces = chat.say("Hello")
    said = next(pieces) + next(pieces)
    pieces.close()
    n = len(talker.encode("User: Hello\n\nAssistant:"))
    assert chat.state.n_tokens == n + chat.generation.stats.n_generated
    assert said
    assert chat.undo()


def test_a_turn_that_was_not_read_is_forgotten(talker, monkeypatch):
    from rwkv_edge.runtime.session import Loop

    def interrupted(*args):
        raise KeyboardInterrupt

    chat = Chat(talker, max_tokens=3, temperature=0)
    "".join(chat.say("One"))
    before = chat.state
    with monkeypatch.context() as m:
        m.setattr(Loop, "_go", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.say("Two"))
    assert chat.state is before


@pytest.mark.parametrize(
    ("opening", "pieces", "shown"),
    [
        ("", [" ", " Hello", " you"], ["Hello", " you"]),
        (" <think", [">\nHm", "</think>", "\nYes"], ["<think", ">\nHm", "</think>", "\nYes"]),
        (" <think>\n</think", [">", "\n", "Yes", " > no"], ["Yes", " > no"]),
        (" <think>\n</think", [">\n\nYes"], ["Yes"]),
        (" <think>\n</think", ["", "Yes"], ["Yes"]),
    ],
)
def test_what_is_shown_of_a_thought(opening, pieces, shown):
    assert list(_reply(opening, iter(pieces))) == shown


def test_ways_of_thinking_bring_their_sampling(talker):
    assert Chat(talker)._sampling == talker.sampling
    think = Chat(talker, think="think")
    assert (think._sampling.top_k, think._sampling.penalty_decay) == (32, 0.988)
    assert "".join(Chat(talker, think="think", max_tokens=2, seed=1).say("Hi")).startswith("<think")
    with pytest.raises(InputError, match="think 'deep' is unknown: the bundle has none, fast, think"):
        Chat(talker, think="deep")


def test_an_interrupt_does_not_keep_what_was_not_said(talker, monkeypatch):
    """The beginning of a stop text was held back when Ctrl-C came: the state does not have it either."""
    from rwkv_edge.runtime.session import Loop

    words = iter(talker.encode(" Yes.\n\nUser: No"))
    chat = Chat(talker, max_tokens=20)
    generate = talker.generate

    def speak(logits, given):
        logits[:] = -np.inf
        logits[next(words)] = 0
        return logits

    monkeypatch.setattr(talker, "generate", lambda *a, **k: generate(*a, logits=speak, **k))
    step = Loop.step

    def interrupted(self, token):
        if chat.generation._text.held == "\n\nUser":
            raise KeyboardInterrupt
        return step(self, token)

    monkeypatch.setattr(Loop, "step", interrupted)
    said = []
    with pytest.raises(KeyboardInterrupt):
        said.extend(iter(chat.say("Hello")))
    monkeypatch.undo()
    assert chat.generation.finish == "cut"
    _, expected = talker.feed(talker.encode("User: Hello\n\nAssistant: Yes."))
    assert chat.state.n_tokens == expected.n_tokens
    for name, x in expected.tensors.items():
        np.testing.assert_allclose(chat.state.tensors[name], x, atol=1e-4 * (x.std() or 1))


def test_a_message_cannot_end_the_text(talker):
    chat = Chat(talker, max_tokens=1, temperature=0)
    "".join(chat.say("a<|endoftext|>b"))
    ids = talker.tokenizer.encode("User: a<|endoftext|>b\n\nAssistant:", special_tokens=False)
    assert 0 not in ids
    assert talker.decode(ids) == "User: a<|endoftext|>b\n\nAssistant:"
    assert chat.state.n_tokens == len(ids) + chat.generation.stats.n_generated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens -1 is not possible"),
        ({"temperature": -1}, "temperature -1 is not possible"),
        ({"ban": [9999]}, "token 9999 is outside the vocabulary"),
        ({"system": 5}, "system is a int: expected text"),
        ({"think": []}, r"think \[\] is unknown"),
        ({"sampling": "x"}, "sampling is a str: expected a Sampling"),
    ],
)
def test_what_is_wrong_is_said_at_once(options, message, talker):
    with pytest.raises(InputError, match=message):
        Chat(talker, **options)
    with pytest.raises(TypeError, match="there is no setting 'temprature'"):
        Chat(talker, temprature=1)
    with pytest.raises(InputError, match="a message is text, not NoneType"):
        list(Chat(talker).say(None))


def test_models_that_cannot_chat_are_said_so(model):
    with pytest.raises(InputError, match="has no chat template: its model continues text, try `rwkv-edge run`"):
        Chat(model("odd", quant="int4"))


# --- the command ---


def chat(*args, stdin=None):
    return CliRunner().invoke(cli, ["chat", *map(str, args)], input=stdin)


def test_the_demo_model_says_what_it_can(bundle):
    path = bundle("demo", quant="int4")
    found = chat(path)
    assert found.exit_code == 1
    assert (
        found.stderr
        == f'Error: {path} is the demo model, which can only tell stories: rwkv-edge run {path} "Once upon a time"\n'
    )


def test_a_conversation_by_pipe(bundle, tmp_path):
    path = bundle("demo", quant="none", template="rwkv")
    lines = ["Hello", "", "/stats", "two\\", "lines", "/undo", "/undo", "/undo", "/reset", f"/save {tmp_path / 's'}"]
    found = chat(path, "-n", 4, "-t", 0, stdin="\n".join([*lines[:-1], "Hello", lines[-1], "/help", "/quit", "never"]))
    assert found.exit_code == 0, found.output
    replies = found.stdout.splitlines()
    assert replies[0] == replies[-1]
    said = [line for line in found.stderr.splitlines() if line]
    stats = r"read \d+ tokens at \d+ tok/s, wrote 4 at .*"
    assert re.fullmatch(stats, said[0])
    assert re.fullmatch(r"\d+ tokens in a state of 405\.5 kB; last reply: " + stats, said[1])
    assert re.fullmatch(stats, said[2])
    assert said[3:7] == ["the last turn, or /load, is taken back"] * 2 + [
        "there is no turn to take back",
        "the conversation begins anew",
    ]
    assert re.fullmatch(r".*/s: \d+ tokens", said[8])
    assert said[-1].startswith("A line that ends with")
    assert "never" not in found.output
    again = chat(path, "-n", 4, "-t", 0, "--load-state", tmp_path / "s", stdin="/stats\n/load\n")
    assert again.stderr.splitlines() == [said[8].split(": ")[1] + " in a state of 405.5 kB", "Error: /load needs a file's name"]
    assert again.exit_code == 1
    both = chat(path, "--system", "x", "--load-state", tmp_path / "s", stdin="")
    assert both.exit_code == 2
    assert "--system begins a conversation, and --load-state goes on with one" in both.stderr
    assert chat(path, stdin="/dance\n").stderr == "Error: /dance is unknown: /help lists what there is\n"


def test_a_conversation_on_a_terminal(bundle, tmp_path):
    """A real terminal: prompts, the line editor's history, Ctrl-C in a reply, Ctrl-D."""
    import os
    import pty
    import select

    path = bundle("demo", quant="none", template="rwkv")
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(
            sys.executable, [sys.executable, "-m", "rwkv_edge", "chat", str(path), "-n", "100000", "-t", "1", "--ban", "0"]
        )
    seen = ""

    def until(text, seconds=60):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            ready, _, _ = select.select([fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {seen[-500:]!r}"
            seen += os.read(fd, 4096).decode(errors="replace")
        before, _, seen = seen.partition(text)
        return before

    def until_it_speaks(n=20):
        nonlocal seen
        while len(seen.strip()) < n:
            assert select.select([fd], [], [], 60)[0], f"no reply came: {seen!r}"
            seen += os.read(fd, 4096).decode(errors="replace")

    until("> ")
    os.write(fd, b"Hello\n")
    until("Hello")
    until_it_speaks()
    os.write(fd, b"\x03")
    until("(interrupted: the conversation goes on from here)")
    until("> ")
    os.write(fd, b"/stats\n")
    until("tokens in a state of")
    until("> ")
    os.write(fd, b"\x1b[A\x1b[A\n")  # up, up: Hello again
    until("Hello")
    until_it_speaks()
    os.write(fd, b"\x03")
    until("(interrupted")
    until("> ")
    time.sleep(0.5)  # for readline to wait
    os.write(fd, b"\x03")
    until("/quit or Ctrl-D ends.")
    until("> ")
    os.write(fd, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("stdin", "replies", "error"),
    [
        (b"Hello", 1, ""),
        (b"Hello\\", 1, ""),  # the last line promises more
        (b"\xef\xbb\xbfHello\r\n", 1, ""),
        (b"Hello\nhi \xff\n", 1, "Error: stdin is not UTF-8 text: invalid start byte at byte 3"),
    ],
)
def test_lines_of_all_kinds(stdin, replies, error, bundle):
    found = chat(bundle("demo", quant="none", template="rwkv"), "-n", 3, "-t", 0, "-q", stdin=stdin)
    assert found.stdout.count("\n") >= replies
    assert found.stderr.strip() == error
    assert found.exit_code == (1 if error else 0)


def test_stdin_that_is_closed_is_one_line(bundle):
    command = f"{sys.executable} -m rwkv_edge chat {bundle('demo', quant='none', template='rwkv')} <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "Error: stdin is closed: a conversation needs it")
