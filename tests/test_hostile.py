"""Agents that do to our state, the repository and our output what they should not."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

BLOCKED: dict[str, object] = {"result": "blocked", "summary": "needs a decision"}
BUILDING = "in_progress phase=build phase_pool=main"
RESULTS = "mkdir -p .orchestrator/results"

# What an agent does right after another command has saved an item, in one shell.
ACTS = {
    "nothing": ":",
    "stash": "git stash -uq",
    "stash and pop": "git stash -q; git stash pop -q",
    "checkout": "git checkout -q -- .",
    "checkout of the backlog": "git checkout -q HEAD -- BACKLOG.yaml",
    "reset": "git reset -q --hard",
    "reset to the commit before": "git reset -q --hard HEAD~1",
    "soft reset": "git reset -q --soft HEAD~1",
    "clean": f"git clean -qfdx; {RESULTS}",
    "remove the work folder": f"rm -rf .orchestrator; {RESULTS}",
    "commit everything": "git commit -qam 'by the agent'",
    "add": "git add BACKLOG.yaml",
    "delete": "rm BACKLOG.yaml",
    "delete from the index": "git rm -q --cached BACKLOG.yaml",
    "edit the backlog": "echo '# by an agent' >> BACKLOG.yaml",
}


def command(project: Any, *words: str) -> str:
    """Shell text that runs the command itself, as an agent may."""
    argv = ["env", f"PYTHONPATH={project.program.parent}", sys.executable, "-m", project.program.stem, "--root", str(project.root)]
    return " ".join(f"'{word}'" for word in (*argv, *words))


def set_up(project: Any, *items: str, script: dict[str, Any], phases: str = "build!", execution: str = "", more: str = "") -> None:
    project.configure(phases, execution=execution, more=more)
    project.backlog(*items)
    project.commit_all()
    project.script(script)


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["blocked", "phase_complete"])
@pytest.mark.parametrize("half", [0, 1])
def test_what_an_agent_does_to_our_state_is_undone(project: Any, outcome: str, half: int) -> None:
    """An item that another command saved during the phase, and all decisions so far, survive."""
    acts = dict(list(ACTS.items())[half::2])
    ids = [f"WRK-{n:03}" for n in range(1, len(acts) + 1)]
    script = {
        f"{one}/build": [{
            "write": {f"{one}.txt": "code\n"},
            "sh": f"{command(project, 'add', f'Added while {one} was built')} > /dev/null; {act}; echo code > {one}.txt",
            "result": {"result": outcome, "summary": f"reason {one}", "follow_ups": [f"Follow-up of {one}"]},
        }]
        for one, act in zip(ids, acts.values(), strict=True)
    }
    set_up(project, *(f"{one} {BUILDING}" for one in ids), script=script, execution="max_wip = 99")
    project.git("commit", "-q", "--allow-empty", "-m", "There is something to go back to")
    process = project.start("run", *(word for one in ids for word in ("--target", one)), "--auto-advance")
    log = project.finish(process, 3 if outcome == "blocked" else 0)
    titles = sorted(row["title"] for row in project.items().values())
    expected = [f"{start} {one}{end}" for one in ids for start, end in (("Added while", " was built"), ("Follow-up of", ""))]
    if outcome == "blocked":
        expected += [f"Item {one}" for one in ids]
        rows = project.items()
        assert {rows[one]["status"] for one in ids} == {"blocked"}
        for one in ids:
            assert rows[one]["blocked_reason"].startswith(f"reason {one}")
            assert not (project.root / f"{one}.txt").exists() or "by the agent" in project.git("log", "--format=%s", f"{one}.txt")
    else:
        assert [(project.root / f"{one}.txt").read_text() for one in ids] == ["code\n"] * len(ids)
        assert [s for s in reversed(project.subjects()) if s.startswith("[WRK")] == [f"[{one}][build] reason {one}" for one in ids]
    assert titles == sorted(expected)
    assert "There is something to go back to" in project.subjects()
    assert project.committed() == project.text()
    assert project.text().count("# by an agent") == ("edit the backlog" in acts)
    assert project.status() == ""
    for act, one in zip(acts, ids, strict=True):
        told = f"[{one}][BUILD] put back or removed BACKLOG.yaml" in log
        if act in ("checkout of the backlog", "reset to the commit before"):
            assert told, act
        if act in ("nothing", "stash and pop", "add", "edit the backlog", "commit everything"):
            assert not told, act
        assert (f"[{one}][BUILD] took commits off: " in log) == ("HEAD~1" in acts[act])


@pytest.mark.slow
def test_a_backlog_set_back_while_the_agent_goes_on_is_no_edit_by_hand(project: Any) -> None:
    """The run looks at the file every second; an agent's `git stash` may be popped, or not."""
    os.mkfifo(project.outside / "go")
    waiting = {"announce": True, "await": "go", "result": BLOCKED}
    set_up(project, f"WRK-001 {BUILDING}", f"WRK-002 {BUILDING}", f"WRK-003 {BUILDING}", script={
        "WRK-001/build": [{"result": BLOCKED}],
        "WRK-002/build": [{"sh": "git stash -q", **waiting}],
        "WRK-003/build": [{"sh": "git checkout -q -- .", **waiting}],
    })
    inbox = project.root / "BACKLOG_INBOX.yaml"
    process = project.start("run")
    log = ""
    for _ in range(2):
        project.announced()
        for line in (1, 2):  # two complaints: there was a look in between
            inbox.write_text("\n" * line + "- [\n")
            log += project.read_until(process, "Nothing is taken from the inbox")
        inbox.unlink()
        (project.outside / "go").write_text("")
    log += project.finish(process, 3)
    assert project.statuses() == dict.fromkeys(("WRK-001", "WRK-002", "WRK-003"), "blocked build")
    for one in ("WRK-002", "WRK-003"):
        assert log.count(f"[{one}][BUILD] put back or removed BACKLOG.yaml; it is written again from memory") == 1
    assert "by hand" not in log
    assert project.committed() == project.text()
