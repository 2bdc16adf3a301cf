"""A state that was parked for one branch stays out of every other one, however many runs there are."""

from __future__ import annotations

from typing import Any

import pytest

PARKED = "refs/orchestrator/backlog"


@pytest.mark.slow
def test_a_parked_state_waits_for_its_branch_through_several_runs(project: Any) -> None:
    project.configure()
    project.backlog("WRK-001 done")
    project.commit_all()
    for branch in ("side", "other"):
        project.git("switch", "-q", "-c", branch, "main")
        project.git("commit", "-q", "--allow-empty", "-m", branch)
    project.git("switch", "-q", "main")
    project.git("merge", "-q", "--no-ff", "--no-commit", "other")
    project.run("add", "Decided on main", "--commit")
    parked = project.git("rev-parse", PARKED)
    project.git("merge", "--abort")
    project.git("checkout", "-q", "-f", "side")
    waits = f"the backlog state of main waits on {PARKED} ({parked[:10]}); the next run on that branch"
    for _ in range(2):
        assert waits in project.run("run").stderr
        assert list(project.statuses()) == ["WRK-001"]
        assert project.git("rev-parse", PARKED) == parked
    remark = f"({parked[:10]}); the next run on main takes it up"
    assert remark in project.run("check", code=None).stdout
    project.git("switch", "-q", "main")
    project.run("run", "--cap", "0")
    assert list(project.statuses()) == ["WRK-001", "WRK-002"]
    assert project.committed() == project.text()
    assert project.git("for-each-ref", PARKED) == ""
