"""The commands around a run: step, complete, close, and what they commit."""

import json
import os
import re
import signal
from typing import Any

import pytest

import orchestrator
from tests.conftest import Cli, Project

STATUSES = ("new", "scoping", "ready", "in_progress phase=plan", "blocked blocked_reason=why")


def test_complete_and_close_take_an_item_out_and_tell_whoever_waited(project: Project, here: Cli) -> None:
    rows = [f"WRK-00{n} {status}" for n, status in enumerate(STATUSES, 3)]
    ids = [row.split()[0] for row in rows]
    waits = f"[WRK-001,{','.join(ids)},WRK-008]"
    project.backlog("WRK-001 new", f"WRK-002 new dependencies={waits}", *rows, "WRK-008 new")
    text = project.text().replace(waits, f"{waits}\n  description:\n    context: Old\n    problem: P")
    (project.root / "BACKLOG.yaml").write_text(text)
    project.commit_all()
    context = "Old"
    for one, row in zip(ids, rows, strict=True):
        done = here("complete", one, "--summary", "Shipped\nby hand")
        assert (done.out, done.err) == (f"Completed {one}: Item {one}\nNo longer waiting for it: WRK-002\n", "")
        context += f"\n[{one}, which this depended on, was done outside of this backlog] Item {one}: Shipped by hand"
        phase = "plan" if "plan" in row else "N/A"
        entry = f"— {one} (Item {one})\n\n- **Status:** Done\n- **Phase:** {phase}\n- **Summary:** Shipped by hand\n"
        assert entry in project.worklog()
    here("close", "WRK-008", "--reason", "Not wanted")
    assert "- **Status:** Closed\n- **Phase:** N/A\n- **Reason:** Not wanted\n" in project.worklog()
    context += "\n[WRK-008, which this depended on, was closed] Item WRK-008: Not wanted"
    items = project.items()
    assert list(items) == ["WRK-001", "WRK-002"]
    assert items["WRK-002"]["dependencies"] == ["WRK-001"]
    assert (items["WRK-002"]["description"]["context"], items["WRK-002"]["description"]["problem"]) == (context, "P")
    assert here("add", "Next", "one", "--depends-on", "WRK-008").out == (
        "Added WRK-009: Next one\nWRK-008 is done or gone already: nothing to wait for\n"
    )
    assert "dependencies" not in project.items()["WRK-009"]
    assert project.status() == " M BACKLOG.yaml\n?? _worklog/\n"  # nothing is committed unasked


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59.999999+00:00"])
def test_a_time_that_no_calendar_reaches_is_shown_as_it_is_and_changed_like_any_other(project: Project, here: Cli, time: str) -> None:
    project.backlog("WRK-001 new")
    (project.root / "BACKLOG.yaml").write_text(re.sub("2026.*", f"'{time}'", project.text()))
    assert here("show", "WRK-001").out.count(time[3:10]) == 2  # the year 1 as %Y has it
    here("edit", "WRK-001", "--priority", "1")
    assert str(project.items()["WRK-001"]["updated"]) > "2026"


def test_status_and_check_tell_an_active_run_a_killed_one_and_trouble_apart(project: Project, here: Cli) -> None:
    step = {"write": {"code.py": "1\n"}, "sh": "echo compiling", "announce": True, "await": "go"}
    project.script({"*/build": [step]})
    project.set_up("WRK-001 in_progress phase=build phase_pool=main")
    run = project.start("run", "--cap", "1")
    project.announced()
    project.environment["TZ"] = "UTC+25"  # no zone: no traceback
    for told in (project.run("status").stdout, here("check").out):  # what the agent has done is no dirt of the operator's
        assert re.search(rf"^A run is active: pid {run.pid}, since \S+ \S+ \(\d+ s\)\n  WRK-001 build \d+ s\b", told, re.M)
    (phase,) = json.loads(here("status", "--json").out)["active"]["phases"]
    assert (phase["item"], phase["phase"], phase["attempt"]) == ("WRK-001", "build", 1)

    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert (project.root / "code.py").exists()
    told = here("check").out
    assert re.search(r"left something unfinished; the next `run` recovers it first, then looks for changes of yours\.\n  cut off, starts again: WRK-001 build\n", told)
    assert "cut off" in here("status").out
    plan = json.loads(here("run", "--dry-run", "--json").out)
    assert (plan["problems"], plan["active"], plan["unfinished"]["cut_off"]) == ([], None, ["WRK-001 build"])

    other = project.git("commit-tree", "HEAD^{tree}", "-m", "x").strip()
    project.git("merge", "-q", "-s", "ours", "--no-commit", "--allow-unrelated-histories", other)
    told = here("check", code=1).out
    assert "problem: a merge is in progress" in told
    assert told.endswith("\n1 problem\n")


def test_check_names_the_open_merge_that_broke_the_backlog(project: Project, here: Cli) -> None:
    other = project.git("commit-tree", "HEAD^{tree}", "-m", "x").strip()
    project.git("merge", "-q", "-s", "ours", "--no-commit", "--allow-unrelated-histories", other)
    (project.root / "BACKLOG.yaml").write_text("<<<<<<< ours\n")
    assert "a merge is in progress" in here("check", code=1).err


def test_an_id_given_by_hand_moves_the_counter_on(project: Project, here: Cli) -> None:
    text = project.text()
    (project.root / "BACKLOG.yaml").write_text(re.sub(r"items: \[\]", "items:\n- id: WRK-900\n  title: by hand", text))
    project.commit_all()
    here("complete", "WRK-900", "--commit")
    assert project.committed() == re.sub(r"(next_item_id:) .*", r"\1 900", text)
    (project.root / "BACKLOG.yaml").write_text(text.replace("items: []", "items:\n- id: WRK-905\n  title: by hand"))
    assert here("add", "Next").out == "Added WRK-906: Next\n"
    assert list(project.items()) == ["WRK-905", "WRK-906"]


COMMANDS = [
    (("add", "Write it"), "Added WRK-004: Write it", "Add WRK-004: Write it"),
    (("advance", "WRK-001"), "Advanced WRK-001 from plan to build", "Advance WRK-001 from plan to build"),
    (("advance", "WRK-001", "--to", "review"), "Advanced WRK-001 from build to review", "Advance WRK-001 from build to review"),
    (("advance", "WRK-001", "--to", "plan"), "Advanced WRK-001 from review to plan", "Advance WRK-001 from review to plan"),
    (("unblock", "WRK-002"), "Unblocked WRK-002: new again", "Unblock WRK-002: new again"),
    (("complete", "WRK-001", "--summary", "x"), "Completed WRK-001: Item WRK-001", "Complete WRK-001: Item WRK-001"),
    (("close", "WRK-003", "--reason", "x"), "Closed WRK-003: Item WRK-003", "Close WRK-003: Item WRK-003"),
]


def test_commands_commit_the_backlog_alone(project: Project, here: Cli) -> None:
    project.set_up("WRK-001 in_progress phase=plan", "WRK-002 blocked blocked_reason=x", "WRK-003 new", phases="plan build! review")
    (project.root / "README.md").write_text("edited\n")
    (project.root / "new.txt").write_text("new\n")
    project.git("add", "new.txt")
    for argv, said, _ in COMMANDS:
        assert here(*argv, "--commit").out.startswith(f"{said}\n")
    made = project.git("log", "--reverse", "--format=%x00%s", "--name-only", f"-{len(COMMANDS)}").split("\0")[1:]
    assert [one.split("\n\n") for one in made] == [[f"[orchestrator] {subject}", "BACKLOG.yaml\n"] for _, _, subject in COMMANDS]
    assert project.committed() == project.text()
    assert [line for line in project.status().splitlines() if "_worklog" not in line] == [" M README.md", "A  new.txt"]


@pytest.mark.slow
def test_a_step_is_one_phase_with_the_guardrails_overridden(project: Project) -> None:
    project.set_up("WRK-001 ready size=large risk=high", "WRK-002 new", script={"*/build": [{"write": {"code.py": "1\n"}}]})
    assert "  WRK-001 plan Item WRK-001\n" in project.run("step", "WRK-001", "--dry-run").stdout
    done = project.run("step", "WRK-001")
    assert project.agent_log() == ["WRK-001 plan 1"]
    assert "Halt: the limit for this run is used up (CapReached)" in done.stderr
    item: Any = project.items()["WRK-001"]
    assert (item["status"], item["phase"], item["guardrail_override"]) == ("in_progress", "build", True)
    assert project.status() == ""
    again = project.run("step", "WRK-001")
    assert "WRK-001 is done" in again.stderr
    assert list(project.items()) == ["WRK-002"]
    assert project.status() == ""


def test_edit_changes_what_is_said_and_nothing_else(project: Project, here: Cli) -> None:
    project.set_up("WRK-001 new size=large risk=low priority=3 tags=[a] owner=me", "WRK-002 new", head="# ours\n")
    said = here("edit", "WRK-001", "--title", "New\nname", "--size", "s", "--tag", "b", "--depends-on", "WRK-002", "--clear", "risk", "--clear", "priority", "--commit")
    assert said.out == "Edited WRK-001: size, tags, dependencies, title, risk, priority\n"
    item = project.items()["WRK-001"]
    assert (item["title"], item["size"], item["tags"], item["dependencies"], item["owner"]) == ("New name", "small", ["b"], ["WRK-002"], "me")
    assert not {"risk", "priority"} & set(item)
    assert project.text().startswith("# ours\n")
    assert project.subjects()[0] == "[orchestrator] Edit WRK-001: size, tags, dependencies, title, risk, priority"
    (row,) = json.loads(here("log", "--json").out)["log"]
    assert (row["item"], row["outcome"]) == ("WRK-001", "edited")
    (project.root / "BACKLOG.yaml").write_text(project.text().replace("  status: new", "  status: new\n  description:\n    context: Old\n    problem: P", 1))
    here("edit", "WRK-001", "--description", "New")
    description = project.items()["WRK-001"]["description"]
    assert (description["context"], description["problem"]) == ("New", "P")


def test_logs_tell_what_the_agents_of_an_item_said_and_did(project: Project, here: Cli) -> None:
    project.backlog("WRK-001 new")
    folder = project.root / ".orchestrator" / "logs" / "WRK-001"
    assert here("logs", "WRK-001").out.startswith("No agent has said anything here yet: ")
    assert here("logs", "WRK-01", code=2).err.startswith("orchestrator: WRK-01: there is no such item")
    folder.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"type": "assistant", "message": {"content": [{"type": "text", "text": "I look\nat it."}]}},
        {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {"command": "make \x1b[2J\n test"}}]}},
    ]
    (folder / "build-1.out").write_text("\n".join(map(json.dumps, events)) + "\na warning\n")
    (folder / "build-1.err").write_text("not logged in\n")
    (folder / "plan-1.out").write_text('{"type": "result", "result": "x"}\n')
    (project.root / "orchestrator.toml").write_text("")  # claude, and its pipeline
    for n, name in enumerate(("plan-1.out", "build-1.out", "build-1.err")):
        os.utime(folder / name, (n, n))
    told = "==> build-1.out <==\nI look\nat it.\nBash: make test\na warning\n==> build-1.err <==\nnot logged in\n"
    assert here("logs", "WRK-001", "build", "-f").out == told  # nothing is at work that could be followed
    assert here("logs", "WRK-001").out == "==> plan-1.out <==\nx\n" + told


def test_colour_is_for_terminals_and_can_be_asked_for(project: Project, here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    project.backlog("WRK-001 in_progress phase=nope")
    (project.root / "new.txt").write_text("")
    assert "\x1b" not in here("check", code=1).out
    assert "\x1b" not in here("--color", "never", "check", code=1).out
    coloured = here("check", "--color", "always", code=1)
    assert "\x1b[31mproblem:\x1b[0m " in coloured.out
    assert here("--color=always", "show", "WRK-009", code=2).err.startswith("\x1b[31morchestrator:\x1b[0m WRK-009: ")


@pytest.mark.slow
def test_quiet_logs_of_a_run(project: Project) -> None:
    project.set_up("WRK-001 new")
    quiet = project.run("--quiet", "triage")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    project.script({"*/plan": [{"result": {"result": "blocked", "context": "Which?"}}]})
    blocked = project.run("run", "--quiet", code=3).stderr
    assert blocked.splitlines()[0].endswith("warning: WRK-001 is blocked: Which?")
    assert "\nNeeds you (1):\n" in blocked
    halt = project.run("triage").stderr.strip().splitlines()[0]
    assert halt == "Halt: nothing is left that can run (AllDoneOrBlocked)"


def test_the_form_of_json_is_documented(project: Project, here: Cli) -> None:
    project.set_up("WRK-001 new", "WRK-002 new dependencies=[WRK-001]")
    for line in ("status", "status --graph", "show WRK-001", "log", "check", "run --dry-run"):
        argv = line.split()
        got = json.loads(here(*argv, "--json").out)
        form = orchestrator.JSON_FORMS[argv[0]]
        documented = set(re.findall(r"\w+", form if argv[0] != "show" else form + orchestrator.JSON_FORMS["status"]))
        assert got.pop("schema") == 1
        assert set(got) <= documented
        rows = [row for key, rows in got.items() if isinstance(rows, list) for row in rows if isinstance(row, dict)]
        assert {key for row in rows for key in row} <= documented
        shown = " ".join(here(argv[0], "--help").out.split())
        assert " ".join(form.split())[:60] in shown


@pytest.mark.slow
def test_what_commands_took_out_after_an_addition_stays_out(project: Project, here: Cli) -> None:
    """The file's counter is then one that no commit has; in a commit of the command, and for the next run."""
    for title in ("One", "Two", "Three"):
        here("add", title, "--commit")
    here("add", "Four")
    here("close", "WRK-003", "--reason", "no", "--commit")
    assert project.committed() == project.text()
    here("add", "Five")
    here("complete", "WRK-002")
    project.run("run", "--cap", "0")
    assert list(project.titles().values()) == ["One", "Four", "Five"]
    assert project.committed() == project.text()
