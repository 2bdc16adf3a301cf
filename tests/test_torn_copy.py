"""The copy of the backlog in git's folder is not flushed: a power cut may leave anything in it."""

from __future__ import annotations

import signal
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("torn", [b"", b"schema_version: 3\nproject: cut o"])
def test_a_torn_copy_does_not_keep_a_run_from_starting(project: Any, torn: bytes) -> None:
    project.configure()
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    project.script({"*/plan": [{"announce": True, "hang": True}]})
    process = project.start("run")
    project.announced()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (copy,) = (project.root / ".git/orchestrator").glob("BACKLOG.yaml.saved")
    copy.write_bytes(torn)
    assert f"{copy} is damaged; BACKLOG.yaml itself counts" in project.run("run", "--cap", "0").stderr
    assert project.statuses() == {"WRK-001": "in_progress plan"}
    assert project.committed() == project.text()
