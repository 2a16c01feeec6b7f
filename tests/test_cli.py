"""The command line as a person, a script and a pipe meet it."""

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import __version__
from rwkv_edge.cli import cli


def run(*args, stdin=None):
    return CliRunner().invoke(cli, [str(a) for a in args], input=stdin)


def process(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "rwkv_edge.cli", *map(str, args)], capture_output=True, timeout=120, **{"text": True} | options
    )


def test_version_and_help():
    assert run("--version").output == f"rwkv-edge {__version__}\n"
    text = run("--help").output
    assert re.findall(r"^  ([a-z]+)  ", text, re.M) == ["inspect", "quantize", "export", "check", "run", "demo", "completion"]
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
                    or parameter.name in ("seed", "prompt")
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
        r"read 4 tokens at \d+ tok/s, wrote 12 at \d+ tok/s \([\d.]+ GB/s\), loaded in [\d.]+ s, peak memory [\d.]+ [MG]B\n",
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
    assert run("run", path, "Once upon a time", "-t", 0, "--stop", "Lily", "-q").output == ", there was a little girl named \n"


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


def test_a_prompt_is_needed(bundle):
    for prompt, stdin in (("", None), ("-", "")):
        found = run("run", bundle("demo", quant="int4"), prompt, stdin=stdin)
        assert found.stderr == "Error: there are no tokens to read: give at least one, also when going on from a state\n"
    found = run("run", bundle("demo", quant="int4"), "-", stdin=b"\xff\xfe")
    assert found.stderr == "Error: stdin is not UTF-8 text: invalid start byte at byte 0\n"
    assert found.exit_code == 1


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_names_that_are_none(command, tmp_path):
    for name in (".", "/", "x" * 300, str(tmp_path)):
        found = run(command, name)
        assert found.exit_code == 1, found.output
        assert re.fullmatch(r"Error: .*\n", found.stderr)


def test_a_full_stdout_is_one_line():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m rwkv_edge.cli inspect {DEMO} > /dev/full"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Error: output: No space left on device"
    assert "Traceback" not in done.stderr


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
    assert run("run", path, "hi", "--ids").stderr.startswith("Error: with --ids the prompt is token ids, such as '1 2 3': ")
    said = run("export", random_pth("odd"), "-o", tmp_path / "out").stderr.splitlines()[-1]
    assert said == "no tokenizer.json beside odd-fp32.pth: the bundle takes and gives token ids"


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
    command = f"{sys.executable} -m rwkv_edge.cli run {path} 'Once upon a time' -n 100 -t 0 | head -c 5"
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
            "rwkv_edge.cli",
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
