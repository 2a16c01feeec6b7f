"""Run the tests that are new since a commit on that commit's code: a test of a mended fault fails there.

    python tests/on_commit.py COMMIT [FILE ...]

Prints a line for every new test: how it ended on that commit, and why. Tests that passed there are listed last: they guard
what was right before, or they test nothing. FILE limits it to some test files.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider"]


def pytest(tree: Path, *arguments: str) -> str:
    """Run pytest in a tree, on the package in that tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*PYTEST, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.stdout


def collect(tree: Path, files: list[str]) -> set[str]:
    """The ids of all tests of these files, of all files if there are none."""
    there = [file for file in files if (tree / file).exists()]
    if files and not there:
        return set()
    return {
        line for line in pytest(tree, "--collect-only", *there).splitlines() if "::" in line and " " not in line.split("::")[0]
    }


def outcomes(tree: Path, tests: list[str]) -> dict[str, str]:
    """How each test ended: "" if it passed, or the first line of its failure."""
    report = tree / "outcomes.xml"
    chosen = tree / "chosen.txt"
    chosen.write_text("\n".join(tests))
    pytest(tree, f"@{chosen}", f"--junitxml={report}", "-o", "junit_family=xunit1", "--continue-on-collection-errors")
    ended: dict[str, str] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        fault = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = next((e for e in case if e.tag == "skipped"), None)
        name = f"{case.get('file')}::{case.get('name')}" if case.get("file") else str(case.get("name"))
        reason = fault if fault is not None else skipped
        ended[name] = "" if reason is None else (reason.get("message") or reason.tag).splitlines()[0]
    return ended


def main() -> int:
    commit, files = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        before.mkdir()
        subprocess.run(["tar", "-x", "-C", before], input=archive, check=True)
        new = sorted(collect(ROOT, files) - collect(before, files))
        shutil.copytree(ROOT / "tests", before / "tests", dirs_exist_ok=True)
        ended = outcomes(before, new)
    passed = []
    for test in new:
        reason = ended.get(test, "did not run: its file needs what the commit does not have")
        if reason:
            print(f"failed  {test}\n        {reason[:160]}")
        else:
            passed.append(test)
    for test in passed:
        print(f"passed  {test}")
    print(f"{len(new)} new tests since {commit}: {len(new) - len(passed)} fail there, {len(passed)} pass there too")
    return 0


if __name__ == "__main__":
    sys.exit(main())
