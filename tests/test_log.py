"""`log`, `status --done` and `show`: what happened, from trailers in git history and the worklog."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from backlog import archive_entry, last_summary, read_worklog, with_cost, worklog_entry
from gitutil import GitError, Repo
from orchestrator import Usage, usage_text, utc_now, worklog_costs
from tests.conftest import Cli, Project, sh


def log(here: Cli, *args: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(here("log", "--json", *args).out)["log"]
    return rows


def told(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [tuple(row[key] for key in ("item", "phase", "outcome", "summary")) for row in rows]


def commit(project: Project, *paragraphs: str) -> None:
    args = [word for text in paragraphs for word in ("-m", text)]
    project.git("commit", "-q", "--allow-empty", *args)


def trailers(*lines: str) -> str:
    return "\n".join(f"Orchestrator-{line}" for line in lines)


@pytest.mark.slow
def test_a_run_can_be_told_again_from_its_history(project: Project, here: Cli) -> None:
    project.script({
        "WRK-001/build": [{"write": {"code.py": "1\n"}}],
        "WRK-002/plan": [{"document": "PLAN.md"}],
        "WRK-002/build": [{"result": {"result": "blocked", "context": "Which colour?"}}],
    })  # fmt: skip
    project.set_up("WRK-001 new", "WRK-002 ready", "WRK-0021 blocked")
    run_id = json.loads(project.run("run", "--json").stdout)["run_id"]
    project.run("unblock", "WRK-002", "--notes", "Blue", "--commit")
    rows = log(here)
    assert told(rows)[0] == ("WRK-002", "", "unblocked", "Blue")
    assert ("WRK-001", "build", "complete", "build done") in told(rows)
    assert ("WRK-002", "build", "blocked", "Which colour?") in told(rows)
    assert {row["run_id"] for row in rows[1:]} == {run_id}
    assert told(log(here, "WRK-001")) == [("WRK-001", phase, "complete", f"{phase} done") for phase in ("build", "plan", "triage")]
    (done,) = json.loads(here("status", "--done", "--json").out)["items"]
    built = next(row["commit"] for row in rows if (row["item"], row["phase"]) == ("WRK-001", "build"))
    assert (done["id"], done["status"], done["commit"], done["summary"]) == ("WRK-001", "done", built, "build done")
    assert [row["id"] for row in json.loads(here("status", "--json").out)["items"]] == ["WRK-002", "WRK-0021"]
    shown = json.loads(here("show", "WRK-001", "--json").out)
    assert shown["documents"] == []
    assert shown["item"] == done
    assert [row["phase"] for row in shown["commits"]] == ["build", "plan", "triage"]
    text = here("show", "WRK-002").out
    assert text.startswith("WRK-002  Item WRK-002\n\nStatus: ")
    assert re.search(r"\n  [\d-]{10} [\d:]{5} plan  complete  [0-9a-f]{10} plan done\n", text.partition("\nHistory:\n")[2])
    assert text.endswith("\nDocuments:\n  changes/WRK-002_item-wrk-002/PLAN.md\n")
    got = json.loads(here("show", "WRK-002", "--json").out)
    assert set(got) >= {"schema", "item", "documents", "commits", "salvage"}
    assert (got["schema"], got["item"]["id"], got["documents"]) == (1, "WRK-002", ["changes/WRK-002_item-wrk-002/PLAN.md"])
    assert json.loads(here("show", "WRK-0021", "--json").out)["commits"] == []


def test_the_log_is_newest_first_and_can_be_limited(project: Project, here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for day, n in (("2026-01-01", 1), ("2026-02-01", 2)):
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"{day}T12:00:00Z")
        commit(project, f"[orchestrator] Add WRK-00{n}: x", trailers(f"Item: WRK-00{n}", "Outcome: added"))
    commit(project, "By somebody else")
    assert [row["item"] for row in log(here)] == ["WRK-002", "WRK-001"]
    assert [row["item"] for row in log(here, "-n", "1")] == ["WRK-002"]
    assert [row["item"] for row in log(here, "--since", "2026-01-15")] == ["WRK-002"]
    assert log(here, "-n", "0") == []
    assert log(here, "WRK-001", "--since", "2026-01-15") == []
    hashes = project.git("log", "--format=%h", "--abbrev=10", "--grep=Add").split()
    assert here("log").out == (
        "WHEN             ITEM    OUTCOME COMMIT     SUMMARY\n"
        f"2026-02-01 12:00 WRK-002 added   {hashes[0]} Add WRK-002: x\n"
        f"2026-01-01 12:00 WRK-001 added   {hashes[1]} Add WRK-001: x\n"
    )


def test_each_item_of_a_batch_is_told_with_its_own_words(project: Project, here: Cli) -> None:
    commit(
        project, "[WRK-001][plan] First, long and c… | [WRK-002][plan] Blocked: Second", "[WRK-001][plan] First, long and cut\n[WRK-002][plan] Blocked: Second",
        trailers("Run: r-1", "Item: WRK-001", "Phase: plan", "Outcome: complete", "Item: WRK-002", "Phase: plan", "Outcome: blocked")
        + "\nSigned-off-by: Operator <o@example.invalid>",
    )  # fmt: skip
    assert told(log(here)) == [("WRK-001", "plan", "complete", "First, long and cut"), ("WRK-002", "plan", "blocked", "Second")]
    assert told(log(here, "WRK-002")) == [("WRK-002", "plan", "blocked", "Second")]


def test_lines_fit_the_terminal_and_hold_no_control_characters(project: Project, here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    commit(project, "A long \x1b[31m subject " + "y" * 80, trailers("Item: WRK-001", "Outcome: \x1b[2Jadded"))
    out = here("log").out
    assert max(len(line) for line in out.splitlines() if "y" * 80 not in line) <= 60  # a word stays whole
    assert "\x1b" not in out


def test_neither_configuration_nor_a_shallow_history_disturbs(project: Project, here: Cli, cli: Cli, tmp_path: Path) -> None:
    commit(project, "[orchestrator] Add", trailers("Item: WRK-001", "Outcome: added"))
    for key, value in {"log.showSignature": "true", "trailer.separators": "=", "log.decorate": "full", "i18n.logOutputEncoding": "latin1"}.items():
        project.git("config", key, value)
    assert told(log(here)) == [("WRK-001", "", "added", "Add")]
    commit(project, "Later")
    sh(tmp_path, "git", "clone", "-q", "--depth=1", f"file://{project.root}", str(tmp_path / "shallow"))
    assert cli("--root", tmp_path / "shallow", "log").out == "There is no commit of the orchestrator's.\n"


def test_a_project_below_the_top_tells_of_itself_alone(project: Project, cli: Cli) -> None:
    (project.root / "b").mkdir()
    cli("--root", project.root / "b", "init")
    cli("--root", project.root / "b", "add", "Of b", "--commit")
    cli("--root", project.root, "add", "Of the top", "--commit")
    rows = json.loads(cli("--root", project.root / "b", "log", "--json").out)["log"]
    assert told(rows) == [("WRK-001", "", "added", "Of b")]


def test_finished_items_come_from_the_worklog_newest_first(project: Project, here: Cli) -> None:
    project.set_up("WRK-001 new", "WRK-002 in_progress phase=plan", "WRK-003 new")
    here("complete", "WRK-002", "--summary", "By hand", "--commit")
    here("close", "WRK-001", "--reason", "Not wanted")
    rows = json.loads(here("status", "--done", "--json").out)["items"]
    assert [(row["id"], row["title"], row["status"], row["summary"]) for row in rows] == [
        ("WRK-001", "Item WRK-001", "closed", "Not wanted"), ("WRK-002", "Item WRK-002", "done", "By hand"),
    ]  # fmt: skip
    assert [row["commit"] for row in rows] == [None, project.git("rev-parse", "HEAD").strip()]
    lines = here("status", "--done").out.splitlines()
    assert lines[0].split() == ["FINISHED", "ID", "STATUS", "COMMIT", "TITLE"]
    assert lines[1].endswith(" WRK-001 closed -          Item WRK-001")
    assert here("show", "WRK-001").out.splitlines()[:3] == ["WRK-001  Item WRK-001", "", "Status:   closed"]
    assert "Summary:  Not wanted\n" in here("show", "WRK-001").out
    assert here("status", "--done", "--only", "id=WRK-001", code=2).err.startswith("orchestrator: --done and --only cannot")


def test_without_a_worklog_the_trailers_tell_what_has_left(project: Project, here: Cli) -> None:
    commit(project, "[orchestrator] Close WRK-001: Old", "[WRK-001] Not wanted", trailers("Item: WRK-001", "Outcome: closed"))
    (row,) = json.loads(here("status", "--done", "--json").out)["items"]
    assert (row["id"], row["status"], row["summary"]) == ("WRK-001", "closed", "Not wanted")


def test_what_the_worklog_says_is_read_as_it_was_written() -> None:
    now = utc_now()
    item: Any = {"id": "WRK-001", "title": "Fix (it)", "phase": "build"}
    cost = usage_text(Usage(1.25, 1200, 30))
    text = "# By hand\n\n" + with_cost(worklog_entry(now, "WRK-001", "Fix (it)", "build", "Complete", "One\n\n---\n## two\n- **Cost:** no"), cost)
    text += "A note of the operator\n\n" + archive_entry(now, item) + archive_entry(now, item, "Closed", "Not wanted")
    phase, done, closed = read_worklog(text)
    assert phase == {
        "when": now.isoformat(), "item": "WRK-001", "title": "Fix (it)", "phase": "build", "outcome": "Complete",
        "summary": "One\n\n---\n## two\n- **Cost:** no", "cost": cost,
    }  # fmt: skip
    assert worklog_costs([phase]) == {"WRK-001": Usage(1.25, 1200, 30)}
    assert (done["status"], closed["status"], closed["reason"]) == ("Done", "Closed", "Not wanted")
    assert last_summary(read_worklog(text), "WRK-001") == phase["summary"]
    assert last_summary(read_worklog(text), "WRK-002") is None
    assert with_cost(text, "") == text


def test_a_cost_survives_its_text_and_entries_add_up() -> None:
    costs = [Usage(), Usage(0.0125), Usage(None, 5, 0), Usage(12.5, 1_234_567, 89)]
    for usage in costs:
        assert worklog_costs([{"item": "A-1", "cost": usage_text(usage)}]).get("A-1") == usage
    rows = [{"item": "A-1", "cost": usage_text(usage)} for usage in costs]
    assert worklog_costs([*rows, {"item": "A-2", "cost": usage_text(Usage(1.0))}]) == {"A-1": Usage(12.5125, 1_234_572, 89), "A-2": Usage(1.0)}


def test_blobs_come_one_by_one_and_a_missing_one_is_an_error(project: Project) -> None:
    repo = Repo.open(project.root)
    files = {project.root / "x": b"\0\n" * 200_000, project.root / "y": b""}
    big, small = (entry.oid for entry in repo.blobs(files))
    blobs = repo.read_blobs([big, small, "1" * 40])
    assert (len(next(blobs)), next(blobs)) == (400_000, b"")
    with pytest.raises(GitError, match=r"object 1+ is missing"):
        next(blobs)
    stopped = repo.read_blobs([big] * 50)  # a reader that loses interest ends the process
    next(stopped)
    stopped.close()
    assert list(repo.read_blobs([])) == []

