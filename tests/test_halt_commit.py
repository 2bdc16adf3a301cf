"""The halt commit, through the real command.

Each of the eight halt reasons is reached by real arguments and agents, once with BACKLOG.yaml
changed outside phase commits and once without, with the operator's staged, modified and untracked
files around. Trouble with git is in test_git_trouble.py.
"""

import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

BLOCKS = {"result": {"result": "blocked", "summary": "needs a decision"}}
FAILS = {"result": {"result": "failed", "summary": "cannot"}}
USER_STATUS = " M README.md\nA  staged.txt\n?? untracked.txt\n"


class Case(NamedTuple):
    """A way to a halt reason."""

    reason: str
    dirty: bool  # whether BACKLOG.yaml changes outside phase commits
    items: tuple[str, ...]
    args: tuple[str, ...] = ()
    script: dict[str, Any] = {}  # noqa: RUF012
    code: int = 0
    execution: str = ""
    during: Callable[[Any, Any], None] | None = None  # what happens while the run is active


def terminate(project: Any, process: Any) -> None:
    project.announced()
    process.send_signal(signal.SIGTERM)


HANG = {"announce": True, "hang": True}
ACTIVE = "WRK-001 in_progress phase=build phase_pool=main"
CASES = [
    Case("ShutdownRequested", True, ("WRK-001 ready",), script={"*": [{**HANG, "on_term": "finish", **BLOCKS}]}, code=143, during=terminate),
    Case("ShutdownRequested", False, (ACTIVE,), script={"*": [HANG]}, code=143, during=terminate),
    Case("CircuitBreakerTripped", True, ("WRK-001 ready", "WRK-002 ready"), script={"*": [FAILS]}, code=4, execution="max_retries = 0"),
    Case("TargetBlocked", True, ("WRK-001 ready",), ("--target", "WRK-001"), {"*": [BLOCKS]}, code=3),
    Case("TargetBlocked", False, ("WRK-001 blocked blocked_from_status=ready blocked_reason=why",), ("--target", "WRK-001"), code=3),
    Case(
        "TargetCompleted", True, (ACTIVE, "WRK-002 ready"),
        ("--target", "WRK-001", "--target", "WRK-002", "--auto-advance"), {"WRK-002/*": [BLOCKS], "*/build": [{"write": {"code.py": "1\n"}}]},
    ),
    Case("TargetCompleted", False, (ACTIVE,), ("--target", "WRK-001"), {"*/build": [{"write": {"code.py": "1\n"}}]}),
    Case("NoMatchingItems", True, ("WRK-001 ready", "WRK-002 in_progress"), ("--only", "tag=none")),
    Case("NoMatchingItems", False, ("WRK-001 ready",), ("--only", "tag=none")),
    Case("FilterExhausted", True, ("WRK-001 ready tags=[x]", "WRK-002 ready"), ("--only", "tag=x"), {"*": [BLOCKS]}, code=3),
    Case("FilterExhausted", False, (ACTIVE + " tags=[x]", "WRK-002 ready"), ("--only", "tag=x"), {"*/build": [{"write": {"code.py": "1\n"}}]}),
    Case("AllDoneOrBlocked", True, ("WRK-001 ready",), script={"*": [BLOCKS]}, code=3),
    Case("AllDoneOrBlocked", False, ("WRK-001 blocked blocked_from_status=ready blocked_reason=why",), code=3),
    Case("CapReached", True, ("WRK-001 ready",), ("--cap", "0")),
    Case("CapReached", False, (ACTIVE,), ("--cap", "0")),
]


def as_parameter(case: Case) -> Any:
    quick = case.dirty and case.reason in ("ShutdownRequested", "AllDoneOrBlocked")
    marks = () if quick else (pytest.mark.slow,)
    return pytest.param(case, id=f"{case.reason}-{'dirty' if case.dirty else 'clean'}", marks=marks)


@pytest.mark.parametrize("case", [as_parameter(case) for case in CASES])
def test_every_halt_reason_commits_the_backlog_alone_and_only_if_dirty(project: Any, case: Case) -> None:
    project.set_up(*case.items, script=case.script, execution=case.execution)
    (project.root / "staged.txt").write_text("staged by the operator\n")
    project.git("add", "staged.txt")
    (project.root / "README.md").write_text("edited by the operator\n")
    (project.root / "untracked.txt").write_text("untracked\n")
    process = project.start("run", "--allow-dirty", *case.args)
    if case.during:
        case.during(project, process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == case.code, out + err
    message = f"[orchestrator] Save backlog state on halt ({case.reason})"
    halts = [subject for subject in project.subjects() if "on halt" in subject]
    assert halts == ([message] if case.dirty else [])
    assert f"({case.reason})" in err
    if case.dirty:
        assert project.subjects()[0] == message
        trailers = project.git("show", "-s", "--format=%(trailers:key=Orchestrator-Item,valueonly)").split()
        assert trailers
        assert set(trailers) <= {"WRK-001", "WRK-002", "WRK-003"}
        assert project.paths() == ["BACKLOG.yaml"]
        assert "saved the backlog state: commit " in err
    if case.dirty and case.during:  # a result that arrives while the run is being stopped is saved, and then committed
        assert project.statuses() == {"WRK-001": "blocked plan"}
        assert project.subjects()[1] == "[WRK-001][plan] Blocked: needs a decision"
    assert project.committed() == project.text()
    assert project.status() == USER_STATUS
    touched = {path for commit in project.git("log", "--format=%H").split() for path in project.paths(commit)}
    assert not touched & {"staged.txt", "untracked.txt"}
    assert project.git("show", "HEAD:README.md") == "A project\n"


def test_a_backlog_the_operator_left_dirty_is_committed_staged_or_not_but_once(project: Any) -> None:
    for staged in (False, True):
        project.backlog("WRK-001 blocked blocked_from_status=ready blocked_reason=why", head=f"# staged: {staged}\n")
        if staged:
            project.git("add", "BACKLOG.yaml")
        project.run("run", code=3)
        assert project.subjects()[0] == "[orchestrator] Save backlog state on halt (AllDoneOrBlocked)"
        assert project.paths() == ["BACKLOG.yaml"]
        assert project.committed().startswith(f"# staged: {staged}\n")
        assert project.status() == ""
    before = project.git("rev-parse", "HEAD")
    project.run("run", code=3)
    assert project.git("rev-parse", "HEAD") == before
