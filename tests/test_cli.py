"""The command line as a person, a script and a pipe meet it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import __version__
from rwkv_edge.cli import cli


def run(*args, stdin=None):
    return CliRunner().invoke(cli, [str(a) for a in args], input=stdin)


def process(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "rwkv_edge", *map(str, args)], capture_output=True, timeout=120, **{"text": True} | options
    )


def test_version_and_help():
    assert run("--version").output == f"rwkv-edge {__version__}\n"
    text = run("--help").output
    assert re.findall(r"^  ([a-z]+)  ", text, re.M) == [
        *("inspect", "quantize", "export", "check", "run", "chat", "eval", "bench", "demo", "completion")
    ]
    for name, command in cli.commands.items():
        page = run(name, "--help").output
        assert page.startswith(f"Usage: cli {name} ")
        for parameter in command.params:
            if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False):
                assert parameter.help
                told = (
                    "[default: " in page
                    or parameter.multiple
                    or "state" in parameter.name
                    or parameter.name in ("prompt", "lines", "logprobs")
                )
                assert told, f"{name} {parameter.name} does not show its default"


def test_inspect():
    found = run("inspect", DEMO)
    assert found.exit_code == 0
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    assert lines[0] == f"{DEMO}: RWKV-7 checkpoint"
    assert lines[1].startswith("7,320,832 parameters  n_layer 6  n_embd 256  n_head 4")
    assert re.search(r"^head\.weight +1 +4096x256 +int4 block 32 +655\.4 kB$", found.stdout, re.M)
    assert re.search(r"^vectors +117 +fp32", found.stdout, re.M)
    assert lines[-1] == "5.4 MB of weights, 5.94 bits each"
    other = run("inspect", DEMO, "--block", "128", "--override", "head.weight=8:64", "--tensors").stdout
    assert re.search(r"^head\.weight +1 +4096x256 +int8 block 64 ", other, re.M)
    assert re.search(r"^blocks\.5\.ffn\.key\.weight +1 +1024x256 +int4 block 128 ", other, re.M)


def test_inspect_says_what_export_does(bundle):
    forecast = json.loads(run("inspect", DEMO, "--quant", "int4", "--json").stdout)
    found = json.loads(run("inspect", bundle("demo", quant="int4"), "--json").stdout)
    assert forecast["nbytes"] == found["nbytes"]
    assert [r["recipe"] for r in forecast["rows"]] == [r["recipe"] for r in found["rows"]]
    assert found["what"] == "bundle: model.onnx (attention, int8 activations), exact.onnx (attention, exact)"
    assert forecast["state_bytes"] == 4 * 6 * (2 * 256 + 4 * 64 * 64)


def test_the_whole_way(tmp_path):
    pth = tmp_path / "model.pth"
    pth.write_bytes(DEMO.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(DEMO.with_name("tokenizer.json").read_bytes())
    quantized = run("quantize", pth)
    assert (quantized.exit_code, quantized.stdout) == (0, "")
    assert re.fullmatch(
        r".*model-int4\.safetensors: 5\.5 MB, 5\.94 bits a weight, [\d.]+ s, model [0-9a-f]{12}\n", quantized.stderr
    )
    assert run("export", tmp_path / "model-int4.safetensors").exit_code == 0
    assert (tmp_path / "model-int4" / "manifest.json").exists()
    exported = run("export", pth, "-q", "--force")
    assert (exported.exit_code, exported.output) == (0, "")
    checked = run("check", tmp_path / "model-int4", "--against", pth)
    assert checked.exit_code == 0
    assert checked.stdout.count(" ok\n") == 4
    assert "against the checkpoint: what quantization cost" in checked.stdout
    spoken = run("run", tmp_path / "model-int4", "Once upon a time", "-n", 12, "-t", 0)
    assert spoken.stdout == ", there was a little girl named Lily. She loved to\n"
    assert re.fullmatch(
        r"read 4 tokens at \d+ tok/s, wrote 12 at \d+ tok/s \([\d.]+ GB/s\), loaded in [\d.]+ s, peak [\d.]+ [MG]B\n",
        spoken.stderr,
    )


def test_check_json_and_exit_code_three(bundle, tmp_path):
    import shutil

    report = json.loads(run("check", bundle("odd", quant="int4"), "--json").stdout)
    assert [row["fault"] for row in report["rows"]] == ["", "", "", ""]
    bad = tmp_path / "bad"
    shutil.copytree(bundle("odd", quant="int4"), bad)
    manifest = json.loads((bad / "manifest.json").read_text())
    a, b = (manifest["tensors"][f"blocks.0.att.{n}.weight"] for n in ("key", "value"))
    a["offset"], b["offset"] = b["offset"], a["offset"]
    (bad / "manifest.json").write_text(json.dumps(manifest))
    failed = run("check", bad)
    assert failed.exit_code == 3
    assert failed.stdout.count(" WRONG\n") >= 2
    assert re.fullmatch(r"Error: .*bad.* does not compute the bundle's weights: reading 1 at a time, .*\n", failed.stderr)


def test_run_reads_stdin_and_keeps_state(bundle, tmp_path):
    path = bundle("demo", quant="int4")
    assert run("run", path, "-", "-n", 0, "--save-state", tmp_path / "s", stdin="Once upon a time").stdout == ""
    continued = run("run", path, ", there was a", "--load-state", tmp_path / "s", "-n", 2, "-t", 0)
    assert continued.stdout == " little girl\n"
    alone = run("run", path, "--load-state", tmp_path / "s", "-n", 4, "-t", 0)
    assert alone.stdout == ", there was a\n"
    assert run("run", path, "Once upon a time", "-t", 0, "--stop", "Lily", "-q").output == ", there was a little girl named \n"


def test_prompts_from_everywhere(bundle, tmp_path):
    """Arguments, stdin, files, lines: in this order, each from the same state."""
    path = bundle("demo", quant="int4")
    (tmp_path / "a.txt").write_text("The dog")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfThe cat\n\nThe bird\r\n")
    args = ("-", "--file", tmp_path / "a.txt", "--lines", tmp_path / "b.txt", "-n", 3, "-t", 0, "--json", "-q")
    found = run("run", path, "Once upon", *args, stdin="A little")
    assert found.stderr == ""
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["Once upon", "A little", "The dog", "The cat", "The bird"]
    alone = json.loads(run("run", path, "The bird", "-n", 3, "-t", 0, "--json", "-q").stdout)
    assert {k: v for k, v in alone.items() if k != "stats"} == {k: v for k, v in lines[-1].items() if k != "stats"}
    assert lines[0]["text"] == "".join(t["text"] for t in lines[0]["tokens"])
    assert lines[0]["finish"] == "length"
    assert (lines[0]["stats"]["n_prompt"], lines[0]["stats"]["n_generated"]) == (2, 3)
    assert all(t["logprob"] < 0 and t["top"] == [] for t in lines[0]["tokens"])
    piped = run("run", path, "-n", 3, "-t", 0, "-q", stdin="A little")
    assert piped.stdout == lines[1]["text"] + "\n"
    two = run("run", path, "The dog", "The cat", "-n", 3, "-t", 0)
    assert two.stdout.startswith(f"The dog{lines[2]['text']}\nThe cat")  # which is whose
    assert ["loaded" in line for line in two.stderr.splitlines()] == [True, False]


def test_a_file_may_be_stdin_and_all_prompts_are_read_first(bundle):
    path = bundle("demo", quant="int4")
    piped = run("run", path, "--file", "-", "-n", 3, "-t", 0, "-q", stdin=b"\xef\xbb\xbfA little\r\nboy")
    assert piped.stdout == run("run", path, "A little\nboy", "-n", 3, "-t", 0, "-q").stdout
    found = run("run", path, "1", "x", "2", "-n", 3, "--ids")
    assert (found.exit_code, found.stdout) == (1, "")


def test_json_is_ascii_whatever_the_terminal(bundle):
    import os

    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    found = process("run", bundle("demo", quant="int4"), "日本 café\u2028", "-n", 1, "--json", "-q", env=env)
    assert json.loads(found.stdout)["prompt"] == "日本 café\u2028"
    assert len(found.stdout.splitlines()) == 1


def test_what_commands_a_terminal_is_not_printed_to_one():
    from rwkv_edge.terminal import printable

    assert printable("a\tb\n\x1b[31mc\x9b\x07é🦉") == "a\tb\n\ufffd[31mc\ufffd\ufffdé🦉"


def test_closed_descriptors(bundle):
    for closed in (">&-", "2>&-", "<&-"):
        command = f"{sys.executable} -m rwkv_edge run {bundle('demo', quant='int4')} Once -n 2 {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert "Traceback" not in done.stderr, closed


def test_modules_of_the_current_folder_are_not_run(bundle, tmp_path):
    for name in ("statistics", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    program = Path(sys.executable).with_name("rwkv-edge")
    for args in (["bench", bundle("demo", quant="int4"), "-r", 1, "--prefill", 4, "--decode", 2], ["demo", "-q"]):
        found = subprocess.run([program, *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")


def test_an_interrupt_while_a_prompt_is_read(bundle, tmp_path):
    """It ends at once, and a state that has read a part of the prompt is not written."""
    import signal
    import time

    (tmp_path / "book").write_text("The dog and the cat went to the river. " * 20000)
    args = [sys.executable, "-m", "rwkv_edge", "run", bundle("demo", quant="int4"), "--file", tmp_path / "book"]
    p = subprocess.Popen([*map(str, args), "--save-state", str(tmp_path / "s")], stdout=-1, stderr=-1)
    time.sleep(5)  # it takes a minute to read it all
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130
    assert b"s is not written: the prompt was not read to its end" in err
    assert not (tmp_path / "s").exists()


def test_an_interrupted_record_is_whole(bundle):
    import signal
    import time

    args = ["run", str(bundle("demo", quant="int4")), "Once", "-n", "100000", "--ban", "0", "--json"]
    p = subprocess.Popen([sys.executable, "-m", "rwkv_edge", *args], stdout=-1, stderr=-1)
    time.sleep(5)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=30)
    found = json.loads(out)
    assert found["finish"] == "cut"
    assert 0 <= found["stats"]["n_generated"] - len(found["tokens"]) <= 1  # it may come between two
    assert len(found["tokens"]) > 5


def test_prompts_that_are_none(bundle, tmp_path):
    path = bundle("demo", quant="int4")
    (tmp_path / "empty").write_text(" \n\n")
    (tmp_path / "bad").write_bytes(b"a\xff")
    for args, message in (
        (["--lines", tmp_path / "empty"], f"{tmp_path / 'empty'} has no line that is not blank"),
        (["--file", tmp_path / "bad"], f"{tmp_path / 'bad'} is not UTF-8 text: invalid start byte at byte 1"),
        (["--file", tmp_path / "none"], f"{tmp_path / 'none'}: No such file or directory"),
        (["a", "b", "--save-state", tmp_path / "s"], "--save-state goes with one prompt: each has a state of its own"),
    ):
        found = run("run", path, *args)
        assert (found.exit_code, found.stdout, found.stderr) == (1, "", f"Error: {message}\n")


def test_logprobs_of_every_token(bundle):
    path = bundle("demo", quant="int4")
    found = run("run", path, "Once upon a time", "-n", 3, "-t", 0, "--logprobs", 2, "-q").stdout.splitlines()
    assert [re.fullmatch(r' *-\d+\.\d{3} \d+ (".*?") *\|(   -\d+\.\d{3} \d+ ".*?"){2}', x)[1] for x in found] == [
        *('","', '" there"', '" was"')
    ]
    assert [len(x.split()) for x in run("run", path, "Once", "-n", 2, "--logprobs", 0, "-q").stdout.splitlines()] != []
    odd = run("run", bundle("odd", quant="int4"), "1 2", "--ids", "-n", 2, "-t", 0, "--logprobs", 1, "-q").stdout.splitlines()
    assert all(re.fullmatch(r" *-\d+\.\d{3} \d+ *\|   -\d+\.\d{3} \d+", x) for x in odd)
    top = json.loads(run("run", path, "Once", "-n", 1, "-t", 0, "--logprobs", 3, "--json", "-q").stdout)["tokens"][0]
    assert top["top"][0] == [top["id"], top["logprob"]]
    assert len(top["top"]) == 3


def test_bans_and_biases_by_text_and_by_id(bundle, model):
    path, m = bundle("demo", quant="int4"), model("demo", quant="int4")

    def said(*args):
        return run("run", path, "Once upon a time", "-n", 1, "-t", 0, "-q", *args)

    assert said().stdout == ",\n"
    assert said("--ban", '","').stdout == said("--ban", ",").stdout == said("--ban", m.token(",")).stdout == " there\n"
    assert said("--bias", " dog=99").stdout == said("--bias", '" dog"=99').stdout == " dog\n"
    assert said("--bias", ",=-99", "--ban", " there").stdout not in (",\n", " there\n")
    for args, message in (
        (["--ban", "a dog"], "'a dog' is 2 tokens [65, 1097], and not one: give ids"),
        (["--ban", '"a'], "\"a is no text in JSON's quotes: Unterminated string starting at: line 1 column 1 (char 0)"),
        (["--ban", "9" * 5000], f"token {'9' * 18} is outside the vocabulary of 0 to 4095"),
        (["--ban", "9999"], "token 9999 is outside the vocabulary of 0 to 4095"),
        (["--bias", "3"], "3 is no bias: expected TOKEN=X, such as 11=-2"),
        (["--bias", "3=x"], "3=x is no bias: expected TOKEN=X, such as 11=-2"),
        (["--bias", "3=1e9"], "bias of token 3 1000000000.0 is not possible: expected -10000 to 10000"),
    ):
        found = said(*args)
        assert (found.exit_code, found.stdout, found.stderr) == (1, "", f"Error: {message}\n")


def test_every_setting_reaches_the_sampling(bundle, model):
    """Each option on its own gives what the library gives with the setting of its name."""
    path, m = bundle("demo", quant="int4"), model("demo", quant="int4")
    for option, value in (
        *(("temperature", 1.7), ("top_k", 2), ("top_p", 0.99), ("min_p", 0.2), ("typical_p", 0.2)),
        *(("presence_penalty", 3.0), ("frequency_penalty", 5.0), ("penalty_decay", 0.1)),
    ):
        settings = {"temperature": 1.2, "top_p": 1.0, "seed": 5, option: value}
        if option == "penalty_decay":
            settings["frequency_penalty"] = 5.0
        given = [x for name, v in settings.items() for x in ("--" + name.replace("_", "-"), v)]
        said = run("run", path, "Once upon a time", "-n", 30, "-q", *given).stdout
        expected = "".join(t.text for t in m.generate("Once upon a time", max_tokens=30, **settings))
        assert said == expected + "\n", option


@pytest.mark.parametrize(
    "args",
    [
        *(["-t", "-1"], ["--top-p", "0"], ["--top-p", "1.1"], ["--top-k", "-1"], ["--min-p", "2"], ["--typical-p", "0"]),
        *(["--penalty-decay", "1.5"], ["--presence-penalty", "1e9"], ["--seed", "-1"], ["--logprobs", "-1"]),
    ],
)
def test_settings_out_of_range_are_usage_errors(args):
    found = run("run", "x", "y", *args)
    assert found.exit_code == 2
    assert "is not in the range" in found.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "none.pth"], "none.pth does not exist"),
        (["export", "none.pth"], "none.pth does not exist"),
        (["check", "none"], "none is not there: a bundle is a folder with a manifest.json"),
        (["run", "none", "hi"], "none is not there: a bundle is a folder with a manifest.json"),
        (["run", DEMO, "hi"], f"{DEMO} is a file, and a bundle is a folder: export the checkpoint first"),
        (
            ["inspect", DEMO, "--quant", "fp16", "--block", "64"],
            "block 64 says nothing with quant fp16: blocks go with int8 and int4",
        ),
        (["inspect", DEMO, "--override", "x=4"], "override 'x=4' matches no matrix: inspect lists their names"),
    ],
)
def test_errors_are_one_line(args, message):
    found = run(*args)
    assert (found.exit_code, found.stdout, found.stderr) == (1, "", f"Error: {message}\n")


def test_a_prompt_that_is_no_text_is_refused(bundle):
    found = run("run", bundle("demo", quant="int4"), "-", stdin=b"\xff\xfe")
    assert found.stderr == "Error: stdin is not UTF-8 text: invalid start byte at byte 0\n"
    assert found.exit_code == 1


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_names_that_are_none(command, tmp_path):
    for name in (".", "/", "x" * 300, str(tmp_path)):
        found = run(command, name)
        assert found.exit_code == 1, found.output
        assert re.fullmatch(r"Error: .*\n", found.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "run --help",
        "completion bash",
        "inspect {model}",
        "inspect {bundle}",
        "export {model} -o {new}",
        "quantize {model} -o {new}.safetensors",
        "check {bundle} -n 4",
        "run {bundle} Once -n 4",
        "run {bundle} Once -n 4 --json",
        "eval {bundle} --text {text}",
        "bench {bundle} --prefill 4 --decode 4 -r 1",
        "demo",
    ],
)
@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_full_disk_under_an_output_is_one_line_and_exit_code_1(arguments, full, bundle, tmp_path):
    (tmp_path / "text").write_text("Once upon a time there was a boy. He ran home.")
    places = {"model": DEMO, "bundle": bundle("demo", quant="int4"), "new": tmp_path / "new", "text": tmp_path / "text"}
    command = [sys.executable, "-m", "rwkv_edge", *arguments.format(**places).split()]
    # with PYTHONUNBUFFERED nothing is left to be flushed at exit, which is where Python itself fails
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as nowhere:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: nowhere}
        done = subprocess.run(command, env=environment, text=True, check=False, **streams)
    assert done.returncode in (0, 1)  # 0 where nothing was written to it
    if full == "stdout":
        *_, last = ["", *done.stderr.splitlines()]
        assert "Traceback" not in done.stderr
        assert "ignored" not in done.stderr
        assert done.returncode == 0 or last == "Error: output: No space left on device"
        wrote_nothing = ("export", "quantize")
        assert done.returncode == (0 if arguments.startswith(wrote_nothing) else 1)


def test_where_a_state_goes_is_checked_before_the_work(bundle, tmp_path):
    found = run("run", bundle("demo", quant="int4"), "Once", "--save-state", tmp_path / "none" / "s")
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == f"Error: {tmp_path / 'none'} is not a folder: create it first\n"


def test_bundles_without_a_tokenizer_take_and_give_ids(bundle, tmp_path, random_pth):
    path = bundle("odd", quant="int4")
    found = run("run", path, "1, 2 3", "--ids", "-n", 4, "-t", 0)
    assert re.fullmatch(r"(\d+ ){4}\n", found.stdout)
    assert (
        run("run", path, "hi").stderr
        == f"Error: {path} has no tokenizer: give token ids (run --ids), or export with --tokenizer\n"
    )
    assert (
        run("run", path, "1 hi", "--ids").stderr == "Error: with --ids the prompt is token ids, such as '1 2 3': 'hi' is none\n"
    )
    said = run("export", random_pth("odd"), "-o", tmp_path / "out").stderr.splitlines()[-1]
    assert "no tokenizer for 61 tokens" in said
    assert "the bundle takes and gives token ids" in said


def test_usage_errors_exit_with_two():
    for args in (["export"], ["export", "x", "--quant", "int5"], ["fly"], ["run", "x", "y", "-n", "-3"]):
        assert run(*args).exit_code == 2
    real = process("export", "x", "--quant", "int5")
    assert real.returncode == 2
    assert "Invalid value for '--quant'" in real.stderr


def test_demo_as_a_process(tmp_path):
    found = process("demo", "-o", tmp_path / "stories")
    assert found.returncode == 0
    assert found.stdout.count(" ok\n") == 4
    assert found.stdout.splitlines()[-1]
    assert "Once upon a time" in found.stdout
    steps = [line.split()[2] for line in found.stderr.splitlines() if line.startswith("$ rwkv-edge")]
    assert steps == ["export", "check", "run"]
    assert found.stderr.splitlines()[-1] == f"The bundle is in {tmp_path / 'stories'}."
    quiet = process("demo", "-q")
    assert quiet.stderr == ""
    assert quiet.stdout.startswith("Once upon a time")


def test_stdout_is_data_only_and_may_close(bundle):
    path = bundle("demo", quant="int4")
    only = process("run", path, "Once upon a time", "-n", "5", "-t", "0")
    assert only.stdout == ", there was a little\n"
    command = f"{sys.executable} -m rwkv_edge run {path} 'Once upon a time' -n 100 -t 0 | head -c 5"
    closed = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert closed.stdout.startswith(", the")
    assert "Traceback" not in closed.stderr


def test_interrupt_is_quiet_and_keeps_what_was_said(bundle):
    import signal

    p = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            "rwkv_edge",
            "run",
            str(bundle("demo", quant="int4")),
            "Once",
            "-n",
            "100000",
            "-t",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert p.stdout.read(10)
    p.send_signal(signal.SIGINT)
    _out, err = p.communicate(timeout=30)
    assert p.returncode in (0, 130)
    assert b"Traceback" not in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    assert "_RWKV_EDGE_COMPLETE" in run("completion", shell).stdout


def test_nothing_heavy_is_loaded_before_it_is_used():
    code = (
        "import sys, {}\n"
        "heavy = {{'numpy', 'onnxruntime', 'onnx', 'torch', 'coremltools', 'tokenizers', 'safetensors'}} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    for module in ("rwkv_edge", "rwkv_edge.cli"):
        out = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True).stdout
        assert out == "[]\n"
    code = "import sys, rwkv_edge.runtime\nprint(sorted({'onnx', 'torch', 'coremltools', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    help_page = "import sys, rwkv_edge.cli as c\ntry: c.cli(['--help'])\nexcept SystemExit: pass\n"
    code = help_page + "print('HEAVY', sorted({'onnx', 'torch', 'coremltools', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "HEAVY []\n"
    )
