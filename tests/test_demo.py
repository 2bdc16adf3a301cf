"""`demo`: the real thing on a throw-away repository, in seconds, and nothing left running."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator
from backlog import parse_yaml
from tests.conftest import sh


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path: Path, program: Path) -> None:
    where = tmp_path / "demo"
    done = subprocess.run([sys.executable, str(program), "demo", str(where)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(f"A demo project in {where}: five items, a scripted agent, no account needed.\n")

    # Why it ended, and what became of the five items.
    assert re.search(r"^Halt: .+ \((\w+)\)$", done.stderr, re.M)
    root = sh(where, "git", "rev-list", "--max-parents=0", "HEAD").strip()
    first: object = parse_yaml(sh(where, "git", "show", f"{root}:BACKLOG.yaml").encode())
    assert isinstance(first, dict)
    assert len(first["items"]) == 5
    for number in (1, 2, 4, 5):
        assert re.search(rf"DEMO-00{number} is done", done.stderr)
    assert re.search(r"DEMO-003 is blocked: .*guardrail", done.stderr, re.I)
    assert "DEMO-006 is blocked: Is this for users or for developers?" in done.stderr  # a new item that the fourth has brought
    assert "attempt 1 of 3 failed" in done.stderr

    # The history that is shown is the real one, and holds the final state.
    history = sh(where, "git", "log", "--oneline")
    assert f"$ git -C {where} log --oneline\n{history}" in done.stdout
    assert sh(where, "git", "show", "HEAD:BACKLOG.yaml") == (where / "BACKLOG.yaml").read_text()
    assert sh(where, "git", "status", "--porcelain") == ""
    assert str(where) not in sh(tmp_path, "ps", "axeww")  # nor in the environment of anybody


@pytest.mark.parametrize(("name", "code", "says"), [("", 2, "is not empty; name a new folder, or none\n"), ("mine.txt", 1, "\n")])
def test_the_demo_refuses_a_place_with_something_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, says: str) -> None:
    (tmp_path / "mine.txt").write_text("mine\n")
    assert orchestrator.main(["demo", str(tmp_path / name)]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(tmp_path / name) in err
    assert err.endswith(says)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine\n"]
