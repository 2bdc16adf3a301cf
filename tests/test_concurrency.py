"""Commands, editors and a run on one file at the same time: nobody's change is lost."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = 24  # commands of each process
EDITS = 12

# Runs the command NUMBER times in one process; keeps a log of what it was told outside.
COMMANDS = """
import contextlib, io, sys
import orchestrator

root, log, kind, number = sys.argv[1:5]
ids = sys.argv[5:]
with open(log, "a", buffering=1) as told:
    for n in range(int(number)):
        words = {"add": ["add", f"{log} {n}"], "unblock": ["unblock", ids[n % len(ids)], "--notes", f"note {n}"],
                 "advance": ["advance", ids[n % len(ids)], "--to", "ab"[n // len(ids) % 2]]}[kind]
        while True:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = orchestrator.main(["--root", root, *words])
            if code == 0 or kind == "unblock":
                break
            if "BACKLOG.yaml" not in err.getvalue():  # an editor is writing it just now
                raise SystemExit(err.getvalue())
        told.write(f"{code} {out.getvalue()}" if code == 0 else f"{code} {err.getvalue()}")
"""

# Edits by hand: a comment of its own each time; tries again if somebody was quicker.
EDITOR = """
import os, sys
path, log, way, number = sys.argv[1:]
with open(log, "a", buffering=1) as told:
    for n in range(int(number)):
        line = f"# by hand {n}\\n"
        for attempt in range(1000):
            with open(path) as file:
                text = file.read()
            if line in text:
                break
            if way == "rename":
                new = text.replace("\\nitems:\\n", f"\\n{line}items:\\n", 1)
                with open(path + "~", "w") as file:
                    file.write(new)
                with open(path) as file:
                    if file.read() != text:
                        continue
                os.rename(path + "~", path)
                break  # once is enough: it is merged, whoever saves at this moment
            elif text.endswith("\\n") and "\\nitems:\\n" in text:
                with open(path, "w") as file:
                    file.write(text.replace("\\nitems:\\n", f"\\n{line}items:\\n", 1))
        else:
            raise SystemExit(f"edit {n} never came through")
        told.write(f"{n} {attempt}\\n")
"""

READER = """
import os, sys
from backlog import parse_yaml
path, stop = sys.argv[1:]
looks = 0
while not os.path.exists(stop):
    with open(path, "rb") as file:
        data = file.read()
    ids = [item["id"] for item in parse_yaml(data)["items"]]
    assert len(ids) == len(set(ids)) and b"next_item_id" in data, data
    looks += 1
print(looks)
"""


def python(code: str, *args: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rounds(project: Any, way: str, number: int) -> dict[str, list[str]]:
    """A run, four processes of commands and an editor, all at once; what each was told."""
    ids = [f"WRK-{n:03}" for n in range(1, 13)]
    project.configure("a b")
    held = "in_progress phase=a phase_pool=main"
    project.backlog("WRK-001 ready", *(f"{one} blocked blocked_from_status=ready blocked_reason=x" for one in ids[1:7]), *(f"{one} {held} dependencies=[WRK-002]" for one in ids[7:]))
    text = project.text().replace("items:\n", "# the first comment\nitems:\n", 1)
    (project.root / "BACKLOG.yaml").write_text(text.replace("  title: Item WRK-009\n", "  title: Item WRK-009   # beside it\n"))
    project.commit_all()
    project.script({"WRK-001/a": [{"document": "a.md", "announce": True, "await": "go"}], "*": [{"document": "b.md"}]})
    run = project.start("run", "--target", "WRK-001")
    project.announced()

    path, logs = project.root / "BACKLOG.yaml", {kind: project.outside / f"log-{kind}" for kind in ("add1", "add2", "unblock", "advance", "editor")}
    reader = python(READER, path, project.outside / "done")
    workers = [python(COMMANDS, project.root, logs[name], kind, number, *some) for name, kind, some in (("add1", "add", ids[:1]), ("add2", "add", ids[:1]), ("unblock", "unblock", ids[1:7]), ("advance", "advance", ids[7:]))]
    workers.append(python(EDITOR, path, logs["editor"], way, EDITS * number // NUMBER))
    for worker in workers:
        out, err = worker.communicate(timeout=500)
        assert worker.returncode == 0, out + err
    (project.outside / "done").touch()
    looks, err = reader.communicate(timeout=60)
    if way == "rename":
        assert reader.returncode == 0, looks + err
        assert int(looks) > 10
    (project.outside / "go").write_text("")
    project.finish(run)
    return {name: log.read_text().splitlines() for name, log in logs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rename", "in place"])
def test_commands_an_editor_and_a_run_at_once_lose_nothing(project: Any, way: str) -> None:
    number = NUMBER if way == "rename" else NUMBER // 2
    told = rounds(project, way, number)
    items, text = project.items(), project.text()
    added = {}
    for name in ("add1", "add2"):
        rows = [re.fullmatch(r"0 Added (WRK-\d+): (.*)", row) for row in told[name]]
        assert len(rows) == number
        added |= {row[1]: row[2] for row in rows if row}
    assert len(added) == 2 * number  # no id twice
    assert {one: items[one]["title"] for one in added} == added
    assert set(items) == {*added, *(f"WRK-{n:03}" for n in range(2, 13))}  # WRK-001 is done and gone
    for row in told["advance"]:
        assert row.startswith("0 Advanced WRK-"), row
    last = {row.split()[2]: row.split()[-1] for row in told["advance"]}
    assert {one: items[one]["phase"] for one in last} == last
    assert [row[0] for row in told["unblock"]] == ["0"] * 6 + ["1"] * (number - 6)
    assert {items[f"WRK-{n:03}"]["status"] for n in range(2, 8)} == {"ready"}
    comments = [line for line in text.splitlines() if line.startswith("# by hand")]
    assert sorted(comments) == sorted(f"# by hand {n}" for n in range(EDITS * number // NUMBER))
    assert "# the first comment" in text
    assert "  title: Item WRK-009   # beside it\n" in text
    assert project.committed() == text
    assert project.status() == ""


def test_a_commands_commit_holds_what_others_have_decided_meanwhile(project: Any) -> None:
    """Between its change and its commit a run may have ended, or another command have come."""
    other = [sys.executable, str(project.program), "--root", str(project.root), "add", "Two"]
    mark = str(project.outside / "done")
    project.inject(
        "import subprocess\n"
        "def watch(event, args):\n"
        f"    if event == 'fcntl.flock' and os.readlink(f'/proc/self/fd/{{args[0]}}').endswith('run.lock') and not os.path.exists({mark!r}):\n"
        f"        os.mkdir({mark!r})\n"
        f"        subprocess.run({other!r}, check=True)\n"
    )
    project.run("add", "One", "--commit")
    assert sorted(project.titles().values()) == ["One", "Two"]
    assert project.committed() == project.text()
