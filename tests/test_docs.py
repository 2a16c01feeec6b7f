"""What the documents say is true: README's blocks run, the command reference is the help, files that are named exist."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import DEMO

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)


def test_readme_s_blocks_run_in_order(tmp_path):
    """As a reader would: in one folder, with a checkpoint and its tokenizer."""
    (tmp_path / "rwkv7.pth").write_bytes(DEMO.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(DEMO.with_name("tokenizer.json").read_bytes())
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ran = []
    for kind, text in BLOCKS:
        if kind == "python":
            done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.endswith("4\n")
            ran.append("python")
            continue
        for line in text.splitlines():
            if line.startswith("pip install"):
                assert re.search(r"rwkv-edge\[(\w+)\]", line)[1] in extras
                continue
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            ran.append(line.split()[1])
    assert ran == ["export", "check", "run", "python", "demo"]


def test_the_quality_benchmark_runs(tmp_path):
    (tmp_path / "text").write_text(README)
    args = [sys.executable, ROOT / "benchmarks" / "quality.py", tmp_path / "text", "--windows", "2", "--tokens", "24"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| int[48] block \d+ .*\| (?:run|exact) \| [+-][\d.]+ % ± [\d.]+ \|", done.stdout, re.M)) == 18


def test_command_reference_is_the_help():
    namespace = {"__name__": "make_cli", "__file__": str(ROOT / "docs" / "make_cli.py")}
    exec((ROOT / "docs" / "make_cli.py").read_text(), namespace)
    assert (ROOT / "docs" / "cli.md").read_text() == namespace["page"](), "run `make docs`"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/bundle.md", "docs/cli.md"])
def test_links_and_make_targets_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M):
        assert target in targets, target
