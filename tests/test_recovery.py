"""Killed at any point, the next start finishes what was decided and starts again what was not.

The command is killed by itself (SIGKILL) at a chosen audit event: a file of the project opened for
writing, a rename, a child process started. The agents are not killed: ending them is the duty of
the next start.
"""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HANG = {"announce": True, "hang": True}
IN_BUILD = "in_progress phase=build phase_pool=main"
RECOVERED = "[orchestrator] Recover backlog state"
HALT = "[orchestrator] Save backlog state on halt"

# Kills the process at the NTH event that names MATCH; with NTH 0 it lists the events instead.
WATCH = """
import itertools
numbers = itertools.count(1)
def describe(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(ROOT):
        return "open " + args[0] if args[2] & (os.O_WRONLY | os.O_RDWR) else ""
    if event == "os.rename":
        return "rename " + os.fsdecode(args[1])
    if event == "subprocess.Popen":
        return "start " + " ".join(os.fsdecode(word) for word in args[1])
    return ""
def watch(event, args):
    said = describe(event, args)
    if said and MATCH in said:
        if next(numbers) == NTH:
            os.kill(os.getpid(), signal.SIGKILL)
        if not NTH:
            with open(EVENTS, "a") as file:
                file.write(said.replace("\\n", " ") + "\\n")
"""


def inject(project: Any, match: str, nth: int) -> None:
    events = str(project.outside / "events")
    project.inject(f"ROOT, EVENTS, MATCH, NTH = {str(project.root)!r}, {events!r}, {match!r}, {nth}\n{WATCH}")


def prepare(project: Any, *items: str, phases: str = "plan build!", script: Any = None, execution: str = "") -> None:
    project.configure(phases, execution=execution)
    config = project.root / "orchestrator.toml"  # so that copies of the project use their own agent
    config.write_text(config.read_text().replace(str(project.outside), "../outside"))
    project.backlog(*items)
    project.commit_all()
    project.script(script or {})


def recovered(project: Any) -> str:
    """Start once more without working: everything holds after that; returns the log."""
    log: str = project.run("run", "--cap", "0").stderr
    assert project.committed() == project.text()
    assert project.status() == ""
    assert project.survivors() == []
    assert project.git("for-each-ref", "refs/orchestrator/snapshots", "refs/orchestrator/backlog") == ""
    return log


def worklog(project: Any) -> str:
    return "".join(path.read_text() for path in sorted((project.root / "_worklog").glob("*.md")))


# ---- The whole tool killed while an agent works --------------------------------------------------


@pytest.mark.slow
def test_f_f2_f3_killed_in_a_destructive_phase(project: Any) -> None:
    """The agent is ended before anything else is done; what it left is on a ref, and not charged."""
    prepare(project, f"WRK-001 {IN_BUILD}", "WRK-002 ready", execution="max_wip = 2", script={
        "*/build": [{**HANG, "write": {"half.py": "1\n", "README.md": "spoilt\n"}}, {"write": {"code.py": "1\n"}}]})
    process = project.start("run")
    project.announced()
    process.kill()
    process.wait()
    assert len(project.survivors()) == 1
    assert project.committed() != project.text()  # the promotion of WRK-002
    log = recovered(project)
    assert "ended a process that an agent left behind" in log
    assert project.subjects()[:2] == [RECOVERED, "Set up"]
    assert project.paths() == ["BACKLOG.yaml"]
    ref = "refs/orchestrator/salvage/WRK-001/build/1"
    assert project.git("show", f"{ref}:half.py", f"{ref}:README.md") == "1\nspoilt\n"
    assert project.statuses() == {"WRK-001": "in_progress build", "WRK-002": "in_progress plan"}
    assert "attempts" not in project.text()
    project.run("run", "--target", "WRK-001")
    assert project.agent_log() == ["WRK-001 build 1"] * 2
    assert project.subjects()[0] == "[WRK-001][build] build done"


@pytest.mark.slow
def test_killed_in_a_document_phase_and_a_run_that_refuses_on_another_branch(project: Any) -> None:
    """Its documents so far are committed; on another branch a start says where to go first."""
    prepare(project, "WRK-001 ready", script={"*/plan": [{**HANG, "document": "half.md"}, {"document": "plan.md"}]})
    process = project.start("run")
    project.announced()
    process.kill()
    process.wait()
    project.git("stash", "push", "-q", "BACKLOG.yaml")
    project.git("switch", "-q", "-c", "elsewhere")
    refused = project.run("run", code=1).stderr
    assert "git switch main" in refused
    assert len(project.survivors()) == 1
    project.git("switch", "-q", "main")
    project.git("stash", "pop", "-q")
    recovered(project)
    assert project.git("show", "HEAD:changes/WRK-001_item-wrk-001/half.md", "HEAD~1:changes/WRK-001_item-wrk-001/half.md")
    assert project.statuses() == {"WRK-001": "in_progress plan"}


@pytest.mark.slow
def test_a_decision_by_hand_between_a_crash_and_the_next_start_is_merged(project: Any) -> None:
    """Killed between journal and save: the saved result meets an edit of the operator."""
    prepare(project, f"WRK-001 {IN_BUILD}", "WRK-002 ready", script={"*/build": [{"write": {"code.py": "1\n"}}]})
    inject(project, "rename " + str(project.root / "BACKLOG.yaml"), 1)
    process = project.start("run", "--cap", "1")
    assert process.wait() == -9
    project.inject("")
    assert "WRK-001" in project.text()
    (project.root / "BACKLOG.yaml").write_text("# by hand\n" + project.text().replace("Item WRK-002", "Renamed"))
    recovered(project)
    assert project.subjects()[0] in ("[WRK-001][build] build done", HALT + " (CapReached)")
    assert "[WRK-001][build] build done" in project.subjects()
    assert project.statuses() == {"WRK-002": "in_progress plan"}
    assert project.text().startswith("# by hand\n")
    assert "title: Renamed" in project.text()
    assert worklog(project).count("**Outcome:** Complete") == worklog(project).count("**Status:** Done") == 1
    assert project.agent_log() == ["WRK-001 build 1"]


@pytest.mark.slow
def test_a_damaged_journal_is_refused_with_a_remedy(project: Any) -> None:
    prepare(project, "WRK-001 ready", script={"*": [HANG]})
    process = project.start("run")
    project.announced()
    process.kill()
    process.wait()
    journal = project.root / ".git/orchestrator/run.json"
    whole = journal.read_bytes()
    before = project.text()
    for damaged in (b"", whole[:100], b"[]", b'{"version": 99}'):
        journal.write_bytes(damaged)
        err = project.run("run", code=1).stderr
        assert "run.json" in err
        assert "delete that file" in err
        assert "Traceback" not in err
    assert project.text() == before
    journal.write_bytes(whole)
    recovered(project)


# ---- Killed at every event -----------------------------------------------------------------------

ONLY = ("--only", "id=WRK-001,WRK-002")
SCRIPT = {
    "WRK-001/plan": [{"document": "plan.md", "result": {"follow_ups": ["Found on the way"]}}],
    "WRK-001/build": [
        {"write": {"half.py": "1\n", "README.md": "spoilt\n"}, "result": {"result": "failed", "summary": "cannot"}},
        {"write": {"code.py": "1\n"}, "sh": "git rm -q --ignore-unmatch old.py"},
    ],
    "WRK-002/triage": [{}],
    "WRK-002/plan": [{"document": "plan.md", "result": {"result": "blocked", "summary": "needs a decision"}}],
}
STEPS = ["new", "scoping", "ready", "in_progress plan", "in_progress build", "blocked plan"]


def template(project: Any) -> None:
    """A project whose run has every kind of phase, an inbox, a retry and a halt commit."""
    (project.root / "old.py").write_text("old\n")
    prepare(project, "WRK-001 ready", "WRK-002 new")
    (project.root / "BACKLOG_INBOX.yaml").write_text("- title: From the inbox\n")


def copy_of(project: Any, where: Path) -> Any:
    shutil.copytree(project.root, where / "repo", symlinks=True)
    copy = type(project)(where / "repo", where / "outside")
    copy.script(SCRIPT)
    return copy


def progress(text: str) -> dict[str, int]:
    """How far each of the two items has come, by the file alone; gone means done."""
    found = {"WRK-001": 99, "WRK-002": 99}
    for block in text.split("\n- id: ")[1:]:
        status = re.search(r"\n  status: (\S+)", block)
        phase = re.search(r"\n  phase: (\S+)", block)
        if block[:7] in found and status:
            found[block[:7]] = STEPS.index(" ".join(m[1] for m in (status, phase) if m))
    return found


def check_end(project: Any) -> None:
    """What holds once the work is done, however often it was cut off: nothing lost, nothing twice."""
    assert project.committed() == project.text()
    assert project.status() == ""
    titles = re.findall(r"^  title: (.*)$", project.text(), re.M)
    assert sorted(titles) == ["Found on the way", "From the inbox", "Item WRK-002"]
    assert progress(project.text()) == {"WRK-001": 99, "WRK-002": STEPS.index("blocked plan")}
    entries = re.findall(r"^## .*? — (\S+) .*\n\n- \*\*(?:Phase|Status):\*\* (\S+)(?:\n- \*\*Outcome:\*\* (.*))?", worklog(project), re.M)
    assert sorted(entries) == [
        ("WRK-001", "Done", ""), ("WRK-001", "build", "Complete"), ("WRK-001", "plan", "Complete"),
        ("WRK-002", "plan", "Blocked"), ("WRK-002", "triage", "Complete"),
    ]
    subjects = project.subjects()
    for subject in ("[WRK-001][plan] plan done", "[WRK-001][build] build done", "[WRK-002][triage] triage done"):
        assert sum(subject in one for one in subjects) == 1, subjects
    assert sum("[WRK-002][plan] Blocked: needs a decision" in one for one in subjects) == 1, subjects
    tree = project.git("ls-tree", "-r", "--name-only", "HEAD").split()
    for path in ("changes/WRK-001_item-wrk-001/plan.md", "changes/WRK-002_item-wrk-002/plan.md", "code.py"):
        assert path in tree
    assert not {"old.py", "half.py", "BACKLOG_INBOX.yaml"} & set(tree)
    assert project.git("show", "HEAD:README.md") == "A project\n"


def kill_at(original: Any, where: Path, match: str, nth: int) -> str:
    """Kill a run at one event, start again, work to the end; returns what went wrong, if anything."""
    where.mkdir()
    project = copy_of(original, where)
    try:
        inject(project, match, nth)
        process = project.start("run", *ONLY)
        project_log = project.finish(process, code=-9)
        project.inject("")
        before = progress(project.text()) if project.text() else {}
        left = [name for name in ("half.py",) if (project.root / name).exists()]
        recovered(project)
        after = progress(project.text())
        assert all(after[one] >= place for one, place in before.items()), (before, after, project_log)
        if left:
            refs = project.git("for-each-ref", "--format=%(refname)", "refs/orchestrator/salvage").split()
            assert any("half.py" in project.git("ls-tree", "--name-only", ref).split() for ref in refs)
        project.run("run", *ONLY, code=None)
        check_end(project)
    except AssertionError as error:
        return f"killed at {match!r} {nth}: {error}"
    finally:
        project.end()
    shutil.rmtree(where)
    return ""


def events_of(project: Any, where: Path) -> list[str]:
    """The events of a run that nobody disturbs."""
    where.mkdir()
    copy = copy_of(project, where)
    inject(copy, "", 0)
    copy.run("run", *ONLY)
    copy.inject("")
    check_end(copy)
    return [str(line) for line in (copy.outside / "events").read_text().splitlines()]


def kill_at_all(project: Any, tmp_path: Path, points: Iterable[tuple[str, int]]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(kill_at, project, tmp_path / f"point-{number}", match, nth)
            for number, (match, nth) in enumerate(points)
        ]
        return [job.result() for job in jobs]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_chosen_points_of_a_run(project: Any, tmp_path: Path, whole: bool) -> None:
    """The journal, the save, the worklog, each step of a commit, the halt commit."""
    template(project)
    events = events_of(project, tmp_path / "whole")

    def count(match: str) -> int:
        return sum(match in event for event in events)

    journal, saves = count("/run.json"), count("/repo/BACKLOG.yaml")
    points = [
        ("/repo/BACKLOG.yaml", saves // 2),  # between journal and save
        ("update-ref", count("update-ref")),  # in or after the halt commit
    ]
    if whole:
        points += [
            ("commit-tree", 2),  # between save and commit
            ("inbox.taken", 1),  # between claiming the inbox and saving its items
            ("/run.json", 2 * journal // 3),
            ("/run.json", journal),  # the run has ended, and its journal does not say so yet
            ("agent.py", 3),  # as the second attempt's agent is started
            ("_worklog", 2),  # between save and worklog
        ]
    wrong = [text for text in kill_at_all(project, tmp_path, points) if text]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_killed_at_every_event_of_a_run(project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every third event, or all of them with KILL_AT_EVERY=1 (which takes more than ten minutes)."""
    faulthandler.cancel_dump_traceback_later()  # this takes minutes
    template(project)
    events = events_of(project, tmp_path / "whole")
    numbers = range(1, len(events) + 1, int(os.environ.get("KILL_AT_EVERY", "3")))
    wrong = [text for text in kill_at_all(project, tmp_path, (("", n) for n in numbers)) if text]
    with capsys.disabled():
        print(f"\nkilled at {len(numbers)} points, lost {len(wrong)}")
    assert not wrong, "\n".join(wrong)
