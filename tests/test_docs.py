"""What the documents say is true: their blocks run and print what is shown, references are made anew, links lead somewhere."""

import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from conftest import DEMO

import rwkv_edge
from rwkv_edge import check

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{page.name}" for page in DOCS.glob("*.md"))]

# a block, and the output that is shown right below it
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.M | re.S)


def text_of(page):
    return (ROOT / page).read_text("utf-8")


def run_blocks(page, folder):
    """Run a page's blocks as a reader would: in one folder, with a checkpoint and its tokenizer.

    Returns  for each block its kind, the commands of ours in it, how it ended, and the output that the page shows
    """
    (folder / "rwkv7.pth").write_bytes(DEMO.read_bytes())
    (folder / "tokenizer.json").write_bytes(DEMO.with_name("tokenizer.json").read_bytes())
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    ran = []
    for kind, block, shown in BLOCK.findall(text_of(page)):
        assert kind in ("sh", "python"), f"{block} is shown as output, and no block is right above it"
        for extra in re.findall(r"^pip install '\.\[(\w+)\]'$", block, re.M):
            assert extra in extras
        block = re.sub(r"^pip install .*", "", block, flags=re.M)
        args = [sys.executable, "-c", block] if kind == "python" else ["bash", "-eo", "pipefail", "-c", block]
        done = subprocess.run(args, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        ran.append((kind, re.findall(r"rwkv-edge (\w+)", block), done, shown))
    return ran


def verbs(ran):
    return [verb for kind, commands, _, _ in ran for verb in (["python"] if kind == "python" else commands)]


def lines(text):
    """A text's lines, every number being as good as another but for those in names, and any space as one."""
    found = (re.sub(r"(?<![\w.])[-+]?\d[\d,.]*(e[-+]\d+)?", "0", " ".join(line.split())) for line in text.splitlines())
    # a benchmark that other programs disturbed says so, and is no worse a document
    return [line.removesuffix("!") for line in found if line and not line.startswith("! Disturbed")]


def test_readme_s_blocks_run_in_order(tmp_path):
    ran = run_blocks("README.md", tmp_path)
    assert verbs(ran) == ["export", "check", "run", "eval", "bench", "python", "demo"]
    assert [done.stdout.splitlines()[-1] for kind, _, done, _ in ran if kind == "python"] == ["tokens in the state: 4"]


@pytest.mark.parametrize(
    ("page", "first", "n_run", "n_python"),
    [
        ("getting-started.md", ["inspect", "export", "check", "run", "python", "eval", "bench", "chat"], 11, 7),
        ("coreml.md", ["export", "inspect", "check", "run", "python"], 1, 1),
    ],
)
def test_a_page_s_blocks_run_in_order_and_print_what_is_shown(page, first, n_run, n_python, tmp_path):
    """What a model says may differ between machines; what the tools say may not, but for the numbers."""
    ran = run_blocks(f"docs/{page}", tmp_path)
    commands = verbs(ran)
    assert list(dict.fromkeys(commands)) == first
    assert (commands.count("run"), commands.count("python")) == (n_run, n_python)
    for kind, commands, done, shown in ran:
        out, err, shown = lines(done.stdout), lines(done.stderr), lines(shown)
        assert bool(out or err) == bool(shown), f"{commands} print:\n{out + err}"
        if kind == "python":  # a model's words, and a line of the block's own
            assert not err
            assert shown[-1] == out[-1]
        elif {"run", "chat"} & set(commands):  # words on stdout, figures on stderr
            assert [line for line in shown if line in err] == err
        else:
            rest = iter(out + err)  # `in` takes from it
            assert all(line in rest for line in shown), f"shown:\n{shown}\nprinted:\n{out + err}"


def test_how_it_works_quotes_the_source():
    page = text_of("docs/how-it-works.md")
    source = textwrap.dedent(re.search(r"\n    # kk = .*?(?=\n\n)", text_of("rwkv_edge/models/rwkv7.py"), re.S)[0])
    assert [block for _, block, _ in BLOCK.findall(page)] == [source.strip("\n") + "\n"]
    assert f"may stray {check.EXACT_RATIO:g} times as far as numpy's float32" in " ".join(page.split())
    assert f"its final state {check.STATE_RATIO:g} times" in " ".join(page.split())
    assert check.INT8_RMS_LIMIT == 0.5
    assert "not be further off than half their deviation, rms" in " ".join(page.split())


def test_the_quality_benchmark_runs(tmp_path):
    (tmp_path / "text").write_text(text_of("README.md"))
    args = [sys.executable, ROOT / "benchmarks" / "quality.py", tmp_path / "text", "--windows", "2", "--tokens", "24"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| int[48] block \d+ .*\| (?:run|exact) \| [+-][\d.]+ % ± [\d.]+ \|", done.stdout, re.M)) == 18


def test_the_benchmarks_of_core_ml_run(tmp_path):
    (tmp_path / "text").write_text(text_of("README.md"))
    lut = [
        ROOT / "benchmarks" / "lut.py",
        tmp_path / "text",
        "--calibrate",
        tmp_path / "text",
        "--windows",
        "2",
        "--tokens",
        "24",
    ]
    coreml = [ROOT / "benchmarks" / "coreml.py", "--tokens", "18", "--quants", "fp16"]
    beside = [*coreml[:1], "--beside-onnx", tmp_path / "text", "--tokens", "3"]
    for args, rows in ((lut, 15), (coreml, 8), (beside, 4)):
        done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split("|---|\n")[1].splitlines()) == rows


@pytest.mark.parametrize("name", ["cli.md", "api.md"])
def test_references_are_what_the_source_says(name):
    made = runpy.run_path(str(DOCS / "make_reference.py"))["PAGES"][name]()
    assert text_of(f"docs/{name}") == made, "run `make docs`"


def test_the_api_page_has_every_public_name():
    headings = re.findall(r"^### (.+)$", text_of("docs/api.md"), re.M)
    errors = {name for name in rwkv_edge.__all__ if re.search(rf"[├└]── {name} ", text_of("docs/api.md"))}
    assert len(errors) == 9
    assert {*rwkv_edge.__all__} - {*headings} - errors == {"__version__"}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets_exist(page):
    text = text_of(page)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert ":" in name or target.exists(), link
        if page.startswith("docs/"):  # or the site has no such file
            assert ":" in name or target.resolve().is_relative_to(DOCS), link
        if anchor and ":" not in name:
            headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", target.read_text("utf-8"), flags=re.M | re.S), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings], link
    targets = re.findall(r"^(\w+):", text_of("Makefile"), re.M)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M):
        assert target in targets, target


def test_the_site_has_every_page():
    pages = re.findall(r"^  - .+: (\S+\.md)$", text_of("mkdocs.yml"), re.M)
    assert sorted(f"docs/{page}" for page in pages) == [page for page in PAGES if page.startswith("docs/")]
