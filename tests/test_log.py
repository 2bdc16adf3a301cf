"""`log`: every decision from git history alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import backlog
import orchestrator
from backlog import item_texts, read_item_text
from gitutil import ABSENT_OID, GitError, Repo
from tests.conftest import Project, sh

WORKLOG = "## 2026-01-01T00:00:00+00:00 — {} (Item)\n\n- **{}:** {}\n- **Summary:** It works\n\n---\n\n"


def commit(project: Project, message: str, *items: str) -> str:
    """Commit a backlog of these items (see `Project.backlog`); returns the commit."""
    project.backlog(*items)
    project.commit_all(message)
    return project.git("rev-parse", "HEAD").strip()


def tell(project: Project, *args: str, code: int = 0) -> tuple[str, str]:
    """Run `log` in this process; returns both streams."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert orchestrator.main(["--root", str(project.root), "log", *args]) == code
    return out.getvalue(), err.getvalue()


def log(project: Project, *args: str, code: int = 0) -> dict[str, Any]:
    got: dict[str, Any] = json.loads(tell(project, "--json", *args, code=code)[0])
    return got


def moves(project: Project, *args: str) -> list[tuple[str, str, str]]:
    """(item, from, to) of each decision."""
    return [
        (
            row["item"],
            f"{row['status_from']} {row['phase_from']}".strip(),
            f"{row['status_to']} {row['phase_to']}".strip(),
        )
        for row in log(project, *args)["decisions"]
    ]


# -- a run -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_can_be_told_again_from_its_history(project: Project) -> None:
    project.script({"WRK-001/build": [{"write": {"code.py": "1\n"}}], "WRK-002/build": [{"result": {"result": "blocked", "context": "Which colour?"}}]})
    project.backlog("WRK-001 new", "WRK-002 ready")
    project.commit_all()
    project.run("run")
    project.run("unblock", "WRK-002", "--notes", "Blue", "--commit")
    rows = log(project)["decisions"]
    journal = json.loads((project.root / ".git/orchestrator/run.json").read_text())
    of_two = [(r["status_from"], r["status_to"], r["reason"]) for r in rows if r["item"] == "WRK-002"]
    assert of_two[-2:] == [("in_progress", "blocked", "Which colour?"), ("blocked", "in_progress", "Blue")]
    done = next(r for r in rows if r["item"] == "WRK-001" and r["status_to"] == "done")
    assert (done["phase_from"], done["reason"], done["run_id"]) == ("build", "build done", journal["run_id"])
    assert "/".join(r["status_to"] for r in rows if r["item"] == "WRK-001").startswith("new/ready")


# -- how it reads ----------------------------------------------------------------------------------


def test_the_text_groups_decisions_by_commit_and_gives_reasons(project: Project) -> None:
    commit(project, "Plan the year", "WRK-001 new", "WRK-002 ready origin=WRK-009/prd")
    message = "[WRK-001][triage] Rated | [WRK-002][plan] Written\n\nOrchestrator-Run: run-7"
    commit(project, message, "WRK-001 blocked blocked_reason=Too_big", "WRK-002 in_progress phase=plan")
    first, second = project.git("log", "--format=%cI %H", "--reverse", "-2").splitlines()
    times = [line[:16].replace("T", " ") + "  " + line.split()[1][:10] for line in (first, second)]
    assert tell(project)[0] == (
        f"{times[0]}  Plan the year\n"
        "  WRK-001    added as new: Item WRK-001\n"
        "  WRK-002    added as ready: Item WRK-002\n"
        "      from WRK-009/prd\n"
        "\n"
        f"{times[1]}  run run-7\n"
        "  WRK-001    new → blocked\n"
        "      Too_big\n"
        "  WRK-002    ready → in_progress plan\n"
        "      Written\n"
    )


def test_one_item_alone(project: Project) -> None:
    commit(project, "One", "WRK-001 new", "XYZ-002 new")
    commit(project, "Two", "WRK-001 scoping phase=plan", "XYZ-002 ready")
    assert moves(project, "WRK-001") == [("WRK-001", "", "new"), ("WRK-001", "new", "scoping plan")]
    wrong = 'orchestrator: WRK-01: history knows no such item (did you mean "WRK-001"?)\n'
    assert tell(project, "WRK-01", code=2) == ("", wrong)


def test_lines_fit_the_terminal_and_hold_no_control_characters(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = (project.root / "BACKLOG.yaml").read_text()
    long = ("x" * 90, "why " * 60)
    item = '- id: WRK-001\n  title: "\\e[31mRed {}"\n  status: blocked\n  blocked_reason: "{}"\n'.format(*long)
    (project.root / "BACKLOG.yaml").write_text(text.replace("items: []", f"items:\n{item}".rstrip()))
    project.commit_all("A long \x1b[31m subject " + "y" * 80)
    out = tell(project)[0]
    assert max(len(line) for line in out.splitlines()) <= 60
    assert "\x1b" not in out


def test_a_history_without_decisions_says_so(project: Project, make_repo: Callable[..., Path]) -> None:
    assert tell(project)[0] == "No decision has been committed yet.\n"


def test_a_repository_without_commits_has_no_decisions(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    assert (repo.file_versions("BACKLOG.yaml"), repo.files_under("_worklog/")) == ([], [])


# -- whose history ---------------------------------------------------------------------------------


def test_the_file_is_followed_through_a_rename(project: Project) -> None:
    commit(project, "One", "WRK-001 new", "WRK-002 new", "WRK-003 new")
    project.git("mv", "BACKLOG.yaml", "tasks.yaml")
    (project.root / "orchestrator.toml").write_text('[project]\nbacklog_path = "tasks.yaml"\n')
    project.commit_all("Move it")
    file = project.root / "tasks.yaml"
    file.write_text(file.read_text().replace("status: new", "status: ready", 1))
    project.commit_all("Two")
    assert moves(project, "WRK-001") == [("WRK-001", "", "new"), ("WRK-001", "new", "ready")]


def test_decisions_of_a_merged_branch_are_told_once_and_by_their_own_commit(project: Project) -> None:
    commit(project, "Base", "WRK-001 new", "WRK-002 new", "WRK-003 new", "WRK-004 new", "WRK-005 new")
    project.git("switch", "-q", "-c", "side")
    side = commit(project, "Side", "WRK-001 ready", "WRK-002 new", "WRK-003 new", "WRK-004 new", "WRK-005 new")
    project.git("switch", "-q", "main")
    commit(project, "Main", "WRK-001 new", "WRK-002 new", "WRK-003 new", "WRK-004 new", "WRK-005 ready")
    project.git("merge", "-q", "--no-ff", "--no-commit", "side")
    text = project.text().replace("Item WRK-003\n  status: new", "Item WRK-003\n  status: ready")
    (project.root / "BACKLOG.yaml").write_text(text)
    project.commit_all("Merge, and decide one thing more")
    rows = log(project)["decisions"]
    assert [(r["item"], r["subject"]) for r in rows if r["status_to"] == "ready"] == [
        *sorted([("WRK-001", "Side"), ("WRK-005", "Main")], key=lambda pair: pair[1] == "Main"),
        ("WRK-003", "Merge, and decide one thing more"),
    ]
    assert next(r["commit"] for r in rows if r["subject"] == "Side") == side


def test_a_truncated_history_is_told_as_far_as_it_goes(project: Project, tmp_path: Path) -> None:
    commit(project, "One", "WRK-001 new")
    commit(project, "Two", "WRK-001 ready")
    shallow = tmp_path / "shallow"
    sh(tmp_path, "git", "clone", "-q", "--depth=1", f"file://{project.root}", str(shallow))
    project.root = shallow
    assert moves(project) == [("WRK-001", "", "ready")]


@pytest.mark.parametrize(("word", "told"), [("Status|Done", "done"), ("Status|Closed", "closed")])
def test_the_worklog_tells_how_an_item_left(project: Project, word: str, told: str) -> None:
    commit(project, "One", "WRK-001 in_progress phase=build")
    (project.root / "_worklog").mkdir()
    (project.root / "_worklog/2026-01.md").write_text(WORKLOG.format("WRK-001", *word.split("|")))
    commit(project, "Two")
    assert moves(project)[-1] == ("WRK-001", "in_progress build", told)
    assert log(project)["decisions"][-1]["reason"] == "It works"


def test_a_version_that_cannot_be_read_is_stepped_over(project: Project) -> None:
    commit(project, "One", "WRK-001 new", "WRK-002 new")
    text = project.text()
    (project.root / "BACKLOG.yaml").write_text(text.replace("title: Item WRK-002", "title: [half"))
    project.commit_all("Break it")
    commit(project, "Mend it", "WRK-001 new", "WRK-002 ready")
    assert moves(project)[2:] == [("WRK-002", "new", "ready")]


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "items:\n- id: A\n  status: new\n- id: B\n  status: new\nnext_item_id: 2\n",
        "schema_version: 3\nitems:  # all\n\n  # first\n  - id: A\n    status: new\n\n  # second\n  - id: B\n    status: new\n",
        "items:\r\n- id: A\r\n  status: new\r\n- id: B\r\n  status: new\r\n",
        "items:\n-   id: A\n    status: new\n    description:\n      context: |\n        - id: C\n        x\n-   status: new\n    id: B",
        "\ufeffitems:\n- id: A\n  status: new\n  tags:\n  - id\n  - x\n- id: B\n  status: new\nother:\n- id: C\n",
    ],
)
def test_items_are_cut_as_the_reader_sees_them(text: str) -> None:
    found = [read_item_text(piece, "x") for piece in item_texts(text.encode())]
    assert found == parse(text)
    assert [item["id"] for item in found] == ["A", "B"]


def parse(text: str) -> list[Any]:
    root: Any = backlog.parse_yaml(text.encode())
    return list(root["items"])


@pytest.mark.parametrize("text", ["", "items: []\nnext_item_id: 0\n", "items:\n", "other: 1\n"])
def test_no_items_give_no_texts(text: str) -> None:
    assert item_texts(text.encode()) == []


def test_this_projects_own_backlog_is_cut_as_it_is_read() -> None:
    data = (Path(__file__).resolve().parent.parent / "BACKLOG.yaml").read_bytes()
    assert [read_item_text(piece, "x") for piece in item_texts(data)] == parse(data.decode())


def test_blobs_come_one_by_one_and_a_missing_one_is_an_error(project: Project) -> None:
    repo = Repo.open(project.root)
    big = repo.blob(project.root / "x", b"\0\n" * 3_000_000).oid
    small = repo.blob(project.root / "y", b"").oid
    blobs = repo.read_blobs([big, small, "1" * 40])
    assert (len(next(blobs)), next(blobs)) == (6_000_000, b"")
    with pytest.raises(GitError, match=r"object 1+ is missing"):
        next(blobs)
    stopped = repo.read_blobs([big] * 50)  # a reader that loses interest ends the process
    next(stopped)
    stopped.close()
    assert list(repo.read_blobs([])) == []


def test_a_symlink_in_history_is_no_file(make_repo: Callable[..., Path]) -> None:
    root = make_repo()
    (root / "B.yaml").symlink_to("elsewhere")
    sh(root, "git", "add", "-A")
    sh(root, "git", "commit", "-q", "-m", "Link")
    (version,) = Repo.open(root).file_versions("B.yaml")
    assert (version.before, version.after) == ((ABSENT_OID,), ABSENT_OID)


@pytest.mark.slow
def test_the_number_of_git_processes_does_not_grow_with_the_history(project: Project) -> None:
    counts = []
    log_file = project.outside / "processes"
    project.inject(f"def watch(event, args):\n    if event == 'subprocess.Popen':\n        open({str(log_file)!r}, 'a').write('x')")
    for status in ("new", "scoping", "ready", "in_progress"):
        commit(project, status, f"WRK-001 {status}")
        log_file.write_text("")
        project.run("log")
        counts.append(len(log_file.read_text()))
    assert len(set(counts)) == 1
