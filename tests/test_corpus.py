"""Real backlogs of years gone by, through the real command: load, leave alone, work on a copy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from backlog import State

PHASES = "research? prd tech-research design spec build! review"  # that the old files name, in their order


def backlogs(corpus: Path) -> list[Path]:
    found = sorted((corpus / "backlogs").glob("*.yaml"))
    assert found
    return found


def is_refused(path: Path) -> bool:
    return not re.search(r"^schema_version: 3$", path.read_text(), re.M)


@pytest.fixture
def project_with(project: Any) -> Any:
    """The project with a given backlog, and a config that knows its phases and prefix."""

    def prepare(path: Path) -> Any:
        text = path.read_text()
        prefix = re.search(r"^- id: ([A-Z]+)-\d", text, re.M)
        project.configure(PHASES, execution="max_retries = 0\ncircuit_breaker = 100")
        config = project.root / "orchestrator.toml"
        config.write_text(f'[project]\nprefix = "{prefix[1] if prefix else "WRK"}"\n{config.read_text()}')
        (project.root / "BACKLOG.yaml").write_bytes(path.read_bytes())
        project.commit_all()
        project.script({"*/build": [{"sh": "echo $ORCHESTRATOR_ITEM_ID >> code.txt"}]})
        return project

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("number", range(15))
def test_a_run_on_a_copy(corpus: Path, project_with: Any, number: int) -> None:
    files = backlogs(corpus)
    assert len(files) <= 15, "more real backlogs than this test looks at"
    if number >= len(files):
        pytest.skip("no such file")
    path = files[number]
    project = project_with(path)
    before = project.text()
    if is_refused(path) or "\nnext_item_id:" not in before:  # it may be cut off; a human says that it is not
        says = "schema_version" if is_refused(path) else "the line 'next_item_id: N' is missing"
        assert says in project.run("run", code=1).stderr
        assert (project.text(), project.status()) == (before, "")
        if is_refused(path):
            return
        before = f"{before}next_item_id: 900\n"
        (project.root / "BACKLOG.yaml").write_text(before)
        project.commit_all()
    check = project.run("check", code=None)
    if check.returncode:  # what the file itself has wrong is named, and nothing is done
        done = project.run("run", "--cap", "4", code=1)
        assert done.stderr.startswith("orchestrator: cannot start:\n- ")
        assert (project.text(), project.status()) == (before, "")
        pytest.skip(f"refused by name: {check.stdout.splitlines()[0]}")
    done = project.run("run", "--cap", "4", "--json", code=None)
    assert done.returncode in (0, 3), done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    assert summary["halt_reason"] in ("CapReached", "AllDoneOrBlocked")
    assert (project.committed(), project.status()) == (project.text(), "")
    old, new = (State.read(text.encode(), "B") for text in (before, project.text()))
    kept = [key for key in new.chunks if old.items.get(key) == new.items.get(key)]
    assert len(kept) >= len(old.chunks) - 4
    assert [new.chunks[key].strip("\n") for key in kept] == [old.chunks[key].strip("\n") for key in kept]
    assert project.text().startswith(before.partition("items:")[0])
    again = project.run("run", "--cap", "0", code=None)
    assert again.returncode in (0, 3), again.stderr
