"""`demo`: the real thing on a throw-away repository, in seconds, and nothing left running."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator
from backlog import parse_yaml


def git(root: Path, *argv: str) -> str:
    return subprocess.run(["git", "-C", str(root), *argv], check=True, capture_output=True, text=True).stdout


def start_demo(program: Path, where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(program), "demo", str(where)], capture_output=True, text=True, timeout=100)


def processes_naming(text: str) -> list[str]:
    """Command lines and environments of live processes that mention a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            seen = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in seen and int(folder.name) != os.getpid():
            found.append(seen.decode(errors="replace"))
    return found


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path: Path, program: Path) -> None:
    where = tmp_path / "demo"
    done = start_demo(program, where)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(f"A demo project in {where}: five items, a scripted agent, no account needed.\n")

    # Why it ended, and what became of the five items.
    assert re.search(r"^Halt: .+ \((\w+)\)$", done.stderr, re.M)
    first: object = parse_yaml(git(where, "show", f"{git(where, 'rev-list', '--max-parents=0', 'HEAD').strip()}:BACKLOG.yaml").encode())
    assert isinstance(first, dict)
    assert [row["title"] for row in first["items"]] == list(orchestrator.DEMO_TITLES)
    assert len(orchestrator.DEMO_TITLES) == 5
    for number in (1, 2, 4, 5):
        assert re.search(rf"DEMO-00{number} is done", done.stderr)
    assert re.search(r"DEMO-003 is blocked: .*guardrail", done.stderr, re.I)
    assert "attempt 1 of 3 failed" in done.stderr

    # The history that is shown is the real one, and holds the final state.
    history = git(where, "log", "--oneline")
    assert f"$ git -C {where} log --oneline\n{history}" in done.stdout
    assert git(where, "show", "HEAD:BACKLOG.yaml") == (where / "BACKLOG.yaml").read_text()
    assert git(where, "status", "--porcelain") == ""
    assert processes_naming(str(where)) == []


@pytest.mark.parametrize(("name", "code", "says"), [("", 2, "is not empty; name a new folder, or none\n"), ("mine.txt", 1, "\n")])
def test_the_demo_refuses_a_place_with_something_in_it(tmp_path: Path, program: Path, name: str, code: int, says: str) -> None:
    (tmp_path / "mine.txt").write_text("mine\n")
    done = start_demo(program, tmp_path / name)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert str(tmp_path / name) in done.stderr
    assert done.stderr.endswith(says)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine\n"]
