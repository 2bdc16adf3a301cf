"""Whole runs through the real command: what is committed, what is left alone, what is decided.

Several related outcomes share a run where they can: a run costs about half a second.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import Cli

CODE = {"write": {"code.py": "done = 1\n"}}
BLOCKED = {"result": "blocked", "summary": "needs a decision"}
FAILED = {"result": "failed", "summary": "cannot"}
IN_BUILD = "in_progress phase=build phase_pool=main"
HALT = "[orchestrator] Save backlog state on halt"


def log_of(project: Any, since: str) -> list[tuple[str, list[str]]]:
    """Subject and sorted paths of each commit since `since`, oldest first."""
    commits = project.git("rev-list", "--reverse", f"{since}..HEAD").split()
    return [(project.git("show", "-s", "--format=%s", c).strip(), sorted(project.paths(c))) for c in commits]


def month(project: Any) -> str:
    (path,) = (project.root / "_worklog").iterdir()
    return f"_worklog/{path.name}"


def prompt(project: Any, item_id: str, phase: str, attempt: int) -> str:
    return str((project.outside / f"prompt-{item_id}-{phase}-{attempt}.md").read_text())


def clean_and_saved(project: Any) -> None:
    """What holds after every run that was not told otherwise."""
    assert project.committed() == project.text()
    project.git("diff-index", "--quiet", "HEAD")  # which believes the index without a look at the files
    assert project.status() == ""
    assert project.git("for-each-ref", "refs/orchestrator/snapshots") == ""


ODD_NAMES = ["with space.txt", "grün ☃.txt", "-leading", "new\nline", 'quo"te', "tab\there", "*", ":(top)x", "[WRK-001] -> b"]


def test_d03_d04_d07_d08_a1_a2_i2_commits_hold_code_and_decision_and_nothing_of_the_operator(project: Any) -> None:
    """A document phase, then a destructive one with files of odd names and kinds; the operator's own changes of every kind."""
    quoted = " ".join(f"'./{name}'" for name in ODD_NAMES)
    odd = f"for f in {quoted}; do echo 1 > \"$f\"; done; ln -s 'with space.txt' link; echo '#!/bin/sh' > run.sh; chmod +x run.sh"
    project.set_up("WRK-001 ready", script={
        "*/plan": [{"document": "plan.md", "sh": "echo secret > .env.local; git add .env.local; echo more >> README.md"}],
        "*/build": [{"write": {"code.py": "1\n", "lib/new.py": "2\n"}, "sh": f"git rm -q old.py && git mv name.py 'new name.py'; {odd}"}],
    })
    for name in ("old.py", "name.py", "half.py", "gone.py"):
        (project.root / name).write_text(f"{name}\n" * 5)
    project.commit_all()
    start = project.git("rev-parse", "HEAD").strip()
    (project.root / "staged.txt").write_text("staged\n")
    (project.root / "half.py").write_text("staged half\n")
    project.git("add", "staged.txt", "half.py")
    (project.root / "half.py").write_text("staged half\nand a rest\n")
    project.git("rm", "-q", "gone.py")
    (project.root / "README.md").write_text("edited\n")
    (project.root / "untracked.txt").write_text("untracked\n")
    done = project.run("run", "--allow-dirty", "--json")
    log = month(project)
    assert log_of(project, start) == [
        ("[WRK-001][plan] plan done", ["BACKLOG.yaml", log, "changes/WRK-001_item-wrk-001/plan.md"]),
        ("[WRK-001][build] build done", sorted(["BACKLOG.yaml", log, "code.py", "lib/new.py", "name.py", "old.py", "new name.py", "link", "run.sh", *ODD_NAMES])),
    ]
    modes = {row.split("\t")[1]: row[:6] for row in project.git("ls-tree", "-z", "HEAD").split("\0") if row}
    assert (modes["link"], modes["run.sh"]) == ("120000", "100755")
    message = project.git("show", "-s", "--format=%B", "HEAD")
    run_id = json.loads(done.stdout)["run_id"]
    body = message.strip().split("\n")
    assert body[:5] == ["[WRK-001][build] build done", "", f"Orchestrator-Run: {run_id}", "Orchestrator-Item: WRK-001", "Orchestrator-Phase: build"]
    assert body[5].startswith("Orchestrator-Attempt: ")
    assert body[6:] == ["Orchestrator-Outcome: complete"]
    assert "phase: build" in project.git("show", "HEAD~1:BACKLOG.yaml")
    assert "WRK-001" not in project.committed()
    assert project.committed() == project.text()
    assert project.worklog().count("## ") == 3  # plan, build, archived
    assert project.git("show", f"HEAD:{log}") == project.worklog()
    status = "A  .env.local\n M README.md\nD  gone.py\nMM half.py\nA  staged.txt\n?? untracked.txt\n"
    assert project.status() == status
    assert project.git("show", ":half.py") == "staged half\n"
    assert (project.root / "half.py").read_text() == "staged half\nand a rest\n"
    assert (project.root / "README.md").read_text() == "edited\nmore\n"


@pytest.mark.slow
def test_two_documents_in_one_batch_and_a_backlog_that_does_not_parse_for_a_while(project: Any) -> None:
    """Three at once and no fourth. Nothing is written while the file is broken; once it is mended, one commit has both."""
    items = [f"WRK-00{n} ready" for n in (1, 2, 3, 4)]
    project.set_up(*items, phases="plan", execution="max_concurrent = 3\nmax_wip = 3", script={
        f"WRK-00{n}/plan": [{"document": "plan.md", "announce": True, "await": f"go{n}"}] for n in (1, 2, 3, 4)
    })
    process = project.start("run")
    assert {project.announced() for _ in range(3)} == {f"WRK-00{n} plan 1" for n in (1, 2, 3)}
    assert project.statuses() == {**{f"WRK-00{n}": "in_progress plan" for n in (1, 2, 3)}, "WRK-004": "ready"}
    good = project.text()
    broken = good + "items: [\n"
    (project.root / "BACKLOG.yaml").write_text(broken)
    (project.outside / "go1").write_text("")
    (project.outside / "go2").write_text("")
    log = project.read_until(process, " is done: ") + project.read_until(process, " is done: ")
    assert project.text() == broken
    (project.outside / "mended").write_text(good.replace("title: Item WRK-003", "title: Renamed  # by hand"))
    (project.outside / "mended").replace(project.root / "BACKLOG.yaml")
    log += project.read_until(process, "committed ")
    assert project.announced() == "WRK-004 plan 1"  # only now that others have ended
    (project.outside / "go3").write_text("")
    log += project.read_until(process, "committed ")
    (project.outside / "go4").write_text("")
    log += project.finish(process)
    assert log.count("warning:") == log.count("warning: BACKLOG.yaml:34:1: duplicate key 'items'") == 1, log
    last, third, batch, before = project.subjects()[:4]
    assert (last, third, before) == ("[WRK-004][plan] plan done", "[WRK-003][plan] plan done", "Set up")
    assert set(batch.split(" | ")) == {"[WRK-001][plan] plan done", "[WRK-002][plan] plan done"}
    documents = ["changes/WRK-001_item-wrk-001/plan.md", "changes/WRK-002_item-wrk-002/plan.md"]
    assert sorted(project.paths("HEAD~2")) == ["BACKLOG.yaml", month(project), *documents]
    assert "title: Renamed  # by hand" in project.git("show", "HEAD~2:BACKLOG.yaml")
    trailers = project.git("show", "-s", "--format=%(trailers:key=Orchestrator-Item,valueonly)", "HEAD~2").split()
    assert sorted(trailers) == ["WRK-001", "WRK-002"]
    clean_and_saved(project)


@pytest.mark.slow
def test_d01_b1_b3_blocked_and_failed_documents_are_committed_without_the_backlog(project: Any) -> None:
    """The halt commit has the decisions, alone, and the next run starts on a clean tree."""
    project.set_up("WRK-001 ready", "WRK-002 ready", phases="plan", execution="max_retries = 0", script={
        "WRK-001/plan": [{"document": "plan.md", "result": {**BLOCKED, "context": "which way?"}}],
        "WRK-002/plan": [{"document": "plan.md", "result": {**FAILED, "follow_ups": ["Kept all the same"]}}],
    })
    start = project.git("rev-parse", "HEAD").strip()
    project.run("run", "--cap", "2")
    log = month(project)
    assert log_of(project, start) == [
        ("[WRK-001][plan] Blocked: which way?", [log, "changes/WRK-001_item-wrk-001/plan.md"]),
        ("[WRK-002][plan] Failed: plan failed after 1 attempt: cannot", [log, "changes/WRK-002_item-wrk-002/plan.md"]),
        (f"{HALT} (CapReached)", ["BACKLOG.yaml"]),
    ]
    clean_and_saved(project)
    assert project.statuses() == {"WRK-001": "blocked plan", "WRK-002": "blocked plan", "WRK-003": "new"}
    assert project.items()["WRK-001"]["blocked_reason"] == "which way?"
    head = project.git("rev-parse", "HEAD")
    project.run("run", "--cap", "0")
    assert project.git("rev-parse", "HEAD") == head


@pytest.mark.slow
def test_d16_d17_d35_d36_d59_triage_routes_guards_merges_and_adds_follow_ups(project: Any) -> None:
    """One item per outcome of a triage, all in one run."""
    big = {"size": "large", "complexity": "high", "risk": "high"}
    project.set_up(
        "WRK-001 new", "WRK-002 new", "WRK-003 new", "WRK-004 new", "WRK-005 blocked blocked_from_status=new dependencies=[WRK-004]",
        "WRK-006 new", phases="plan", script={
            "WRK-001/triage": [{"write": {"_ideas/WRK-001_item.md": "idea\n"}, "result": {
                "updated_assessments": {"size": "medium", "risk": "nonsense"},
                "follow_ups": ["Bare title", {"title": "With context", "context": "because"}, {"no": "title"}, {"title": "bare  TITLE"}],
                "description": {"problem": "It is slow"},
            }}],
            "WRK-002/triage": [{"result": {"updated_assessments": big}}],
            "WRK-003/triage": [{"result": {"requires_human_review": True}}],
            "WRK-004/triage": [{"result": {"duplicates": ["WRK-001"]}}],
            "WRK-006/triage": [{"result": {"follow_ups": None, "duplicates": None, "pipeline_type": "no-such"}}],
        },
    )
    start = project.git("rev-parse", "HEAD").strip()
    done = project.run("triage", "--cap", "5", code=None)
    commits = log_of(project, start)
    log = month(project)
    assert [subject for subject, _ in commits] == [f"[WRK-00{n}][triage] triage done" for n in (1, 2, 3, 4, 6)]
    assert commits[0][1] == ["BACKLOG.yaml", "_ideas/WRK-001_item.md", log]
    assert [paths for _, paths in commits[1:]] == [["BACKLOG.yaml", log]] * 4
    rows = project.statuses()
    assert rows["WRK-001"] == "ready"
    assert {rows[f"WRK-00{n}"] for n in (2, 3, 4, 6)} == {"blocked"}
    assert project.items()["WRK-004"]["blocked_reason"].startswith("it seems to be a duplicate of WRK-001 (Item WRK-001);")
    assert project.items()["WRK-005"]["dependencies"] == ["WRK-004"]
    for measure in ("size", "complexity", "risk"):
        assert measure in project.items()["WRK-002"]["blocked_reason"]
    assert "human" in project.items()["WRK-003"]["blocked_reason"]
    assert "no-such" in project.items()["WRK-006"]["blocked_reason"]
    added = {project.items()[one]["title"]: project.items()[one] for one in rows if one > "WRK-006"}
    assert set(added) == {"Bare title", "With context"}
    assert added["With context"]["description"]["context"] == "because"
    assert added["With context"]["status"] == "new"
    assert "nonsense" in done.stderr
    clean_and_saved(project)


def test_d20_the_operators_ratings_stand_and_nothing_is_paid_for_before_a_human_has_decided(project: Any, here: Cli) -> None:
    """Triage rates everything small and safe; `add` has said otherwise of one, of another triage does."""
    rated = {"updated_assessments": {"size": "medium", "risk": "medium"}}
    project.set_up(phases="research? build!", script={
        "WRK-002/triage": [{"result": rated}], "*/build": [{"sh": "echo $ORCHESTRATOR_ITEM_ID > code.txt"}]})
    for argv in (["Big", "--size", "large", "--risk", "high"], ["Risky"], ["Small"]):
        here("add", *argv)
    project.commit_all("Wishes")
    project.run("run")
    assert project.agent_log() == [f"WRK-{n:03} triage 1" for n in (1, 2, 3)] + ["WRK-003 build 1"]
    assert project.statuses() == {"WRK-001": "blocked research", "WRK-002": "blocked research"}
    big, risky = project.items()["WRK-001"], project.items()["WRK-002"]
    assert (big["size"], big["risk"]) == ("large", "high")
    assert big["blocked_reason"].startswith("the guardrails are exceeded by size large (limit medium), risk high (limit low);")
    assert risky["blocked_reason"].startswith("the guardrails are exceeded by risk medium (limit low);")
    assert here("unblock", "WRK-002", "--override-guardrails").out == "Unblocked WRK-002: scoping again\n"
    assert project.items()["WRK-002"]["guardrail_override"] is True
    plan = json.loads(here("run", "--dry-run", "--json").out)["items"]
    assert [(row["id"], row["phase"]) for row in plan if row["phase"]] == [("WRK-002", "research")]


@pytest.mark.slow
def test_d10_d13_d14_d15_a_triage_that_fails_uses_its_attempts_and_then_blocks(project: Any) -> None:
    project.set_up("WRK-001 new", "WRK-002 new", execution="max_retries = 1\ncircuit_breaker = 9", script={
        "WRK-001/triage": [{"result": FAILED}, {"result": {"phase": "build"}}],
        "WRK-002/triage": [{"no_result": True, "write": {"half.txt": "1\n"}, "sh": "echo broken pipe of the agent; true", "exit": 7}, {"result": {"updated_assessments": {"size": "large"}}}],
    })
    project.run("triage", code=3)
    assert project.agent_log() == [f"WRK-00{n} triage {attempt}" for n in (1, 2) for attempt in (1, 2)]
    assert "build" in project.items()["WRK-001"]["blocked_reason"]  # the identity that it claimed
    assert "cannot" in prompt(project, "WRK-001", "triage", 2)
    assert "broken pipe of the agent" in prompt(project, "WRK-002", "triage", 2)
    assert "size" in project.items()["WRK-002"]["blocked_reason"]
    (project.root / "half.txt").unlink()  # outside the outputs of a triage: left as it is
    clean_and_saved(project)


def test_d50_d57_retry_with_the_failure_in_the_prompt_and_the_attempt_on_a_ref(project: Any) -> None:
    (project.root / "old.py").write_text("old\n")
    seen = project.outside / "seen"
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*/build": [
        {"write": {"half.py": "half\n", "README.md": "spoilt\n"}, "sh": "git rm -q old.py; git add half.py",
         "result": {**FAILED, "context": "the compiler says no"}},
        {"sh": f"git status --porcelain > {seen}", "write": {"code.py": "1\n"}},
    ]})
    done = project.run("run")
    ref = "refs/orchestrator/salvage/WRK-001/build/1"
    assert seen.read_text() == " M BACKLOG.yaml\n?? code.py\n"  # code.py is the second attempt's
    text = prompt(project, "WRK-001", "build", 2)
    for words in ("cannot", "the compiler says no", ref, "2 of 3"):
        assert words in text
    assert ref in done.stderr
    assert project.git("show", f"{ref}:half.py") == "half\n"
    assert project.git("show", f"{ref}:README.md") == "spoilt\n"
    assert "old.py" not in project.git("ls-tree", "--name-only", ref).split()
    assert sorted(project.paths()) == ["BACKLOG.yaml", month(project), "code.py"]
    assert project.git("show", "HEAD:README.md") == "A project\n"
    assert project.agent_log() == ["WRK-001 build 1", "WRK-001 build 2"]
    clean_and_saved(project)


@pytest.mark.slow
def test_d29_retries_exhausted_and_a_claim_without_a_change(project: Any) -> None:
    """Blocked with the salvage ref; an item that succeeds in between keeps the breaker shut."""
    project.set_up(
        f"WRK-001 {IN_BUILD}", f"WRK-002 {IN_BUILD}", f"WRK-003 {IN_BUILD}", phases="build!",
        execution="max_retries = 1\nmax_wip = 3", script={
            "WRK-001/build": [{}, {"write": {"bad.py": "1\n"}, "result": FAILED}],
            "WRK-002/build": [CODE],
            "WRK-003/build": [{"write": {"bad.py": "2\n"}, "exit": 9, "no_result": True}],
        },
    )
    done = project.run("run")
    assert "nothing in the repository changed" in prompt(project, "WRK-001", "build", 2)
    ref = "refs/orchestrator/salvage/WRK-001/build/1"
    assert ref in project.items()["WRK-001"]["blocked_reason"]
    assert project.git("show", f"{ref}:bad.py") == "1\n"
    assert project.git("show", "refs/orchestrator/salvage/WRK-003/build/2:bad.py") == "2\n"
    assert project.statuses() == {"WRK-001": "blocked build", "WRK-003": "blocked build"}
    assert "(AllDoneOrBlocked)" in done.stderr
    clean_and_saved(project)


def test_what_only_waits_for_a_place_is_told_at_the_halt(project: Any) -> None:
    held = "in_progress phase=plan phase_pool=main dependencies=[WRK-002]"
    project.set_up(f"WRK-001 {held}", "WRK-002 blocked blocked_from_status=ready", "WRK-003 ready")
    done = project.run("run", code=3)
    assert "(AllDoneOrBlocked): 1 item waiting for WRK-002 (blocked): WRK-001; 1 item later (max_wip = 1, max_concurrent = 1): WRK-003\n" in done.stderr


@pytest.mark.slow
def test_d32_h1_h3_the_operators_hooks_reject_once_and_mend_once(project: Any) -> None:
    """A hook that rejects fails the attempt, one that mends files gets a second look; it never sees state commits."""
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*/build": [{"write": {"code.py": "bad\n"}}, {"write": {"code.py": "ugly\n"}}]})
    hook = project.root / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        f"#!/bin/sh\ngit diff --cached --name-only >> {project.outside}/hooked\n"
        "if grep -q bad code.py; then echo 'style: bad'; exit 1; fi\n"
        "if grep -q ugly code.py; then echo pretty > code.py; exit 1; fi\n"
    )
    hook.chmod(0o755)
    project.run("run")
    assert "style: bad" in prompt(project, "WRK-001", "build", 2)
    assert project.git("show", "HEAD:code.py") == "pretty\n"
    assert project.subjects()[:2] == ["[WRK-001][build] build done", "Set up"]
    assert "code.py" in (project.outside / "hooked").read_text().split()
    clean_and_saved(project)


@pytest.mark.slow
@pytest.mark.parametrize("most", [4, 5])
def test_a_hook_that_mends_again_and_again_is_run_four_times(project: Any, most: int) -> None:
    """What it changes beside the commit, as it rejects, is in no commit."""
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*": [{"write": {"code.py": "1\n"}}]}, execution="max_retries = 0")
    project.hook("pre-commit", f"echo x > made.txt; [ $(wc -l < code.py) -ge {most} ] || {{ echo 1 >> code.py; echo no; exit 1; }}")
    done = project.run("run", code=0 if most == 4 else 3)
    if most == 4:
        assert project.git("show", "HEAD:code.py") == "1\n" * 4
        assert project.status() == "?? made.txt\n"
    else:
        assert "hook rejected the commit:\nno" in project.items()["WRK-001"]["blocked_reason"], done.stderr


@pytest.mark.slow
def test_an_agent_that_commits_by_itself_in_a_subphase_and_before_it_fails(project: Any) -> None:
    commit = "git add -A -- '*.py' && git commit -qm 'by the agent'"
    half = {"result": "subphase_complete", "summary": "first half"}
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build! again!", script={
        "*/build": [{"write": {"own.py": "1\n", "own.txt": "1\n"}, "sh": commit, "result": half}, CODE],
        "*/again": [{"write": {"half.py": "1\n"}, "sh": commit + "; echo rest > rest.py", "result": FAILED}, {"write": {"more.py": "1\n"}}],
    })
    start = project.git("rev-parse", "HEAD").strip()
    done = project.run("run")
    log = month(project)
    assert log_of(project, start) == [
        ("by the agent", ["own.py"]),
        ("[WRK-001][build] first half", [log, "own.txt"]),
        ("[WRK-001][build] build done", ["BACKLOG.yaml", log, "code.py"]),
        ("by the agent", ["half.py"]),
        ("[WRK-001][again] again done", ["BACKLOG.yaml", log, "more.py"]),
    ]
    first = project.git("rev-parse", "HEAD~4")
    assert f"[WRK-001][BUILD] commits made meanwhile: {first[:10]}" in done.stderr
    ref = "refs/orchestrator/salvage/WRK-001/again/1"
    assert project.git("show", f"{ref}:rest.py") == "rest\n"
    assert "Subphase Complete" in project.worklog()
    clean_and_saved(project)


@pytest.mark.slow
def test_d21_d22_d23_d24_i1_only_by_status_whole_dependencies_and_items_that_could_never_run(project: Any) -> None:
    """What does not fit the config is mended or blocked; dependencies are those of the whole backlog."""
    project.set_up(
        "WRK-001 ready pipeline_type=unknown", "WRK-002 ready tags=[x] dependencies=[WRK-003]",
        "WRK-003 blocked blocked_from_status=ready blocked_reason=no", "WRK-004 ready tags=[x]", "WRK-005 in_progress",
        "WRK-006 ready size=large", phases="plan", execution="max_wip = 5", script={"*/plan": [{"document": "p.md"}]})
    done = project.run("run", "--only", "status=ready", "--only", "tag=x", code=None)
    assert project.agent_log() == ["WRK-004 plan 1"]
    left = {"WRK-001": "blocked", "WRK-002": "ready", "WRK-003": "blocked"}
    assert project.statuses() == {**left, "WRK-005": "in_progress plan", "WRK-006": "ready"}
    assert "(FilterExhausted)" in done.stderr or "(AllDoneOrBlocked)" in done.stderr
    clean_and_saved(project)
    project.run("run")
    assert project.agent_log() == ["WRK-004 plan 1", "WRK-005 plan 1"]
    assert project.statuses() == {**left, "WRK-006": "blocked"}
    assert "unknown" in project.items()["WRK-001"]["blocked_reason"]
    assert "large" in project.items()["WRK-006"]["blocked_reason"]
    clean_and_saved(project)


@pytest.mark.slow
def test_d02_d2_a_second_run_other_commands_and_stop_beside_an_active_run(project: Any, here: Cli) -> None:
    items = ("WRK-001 ready", "WRK-002 ready", "WRK-003 new")
    step = {"document": "p.md", "sh": "echo reading", "announce": True, "await": "go"}
    project.set_up(*items, phases="plan again", script={"*/plan": [step]})
    process = project.start("run")
    project.announced()
    second = project.run("run", code=1)
    assert "another run is at work here (" in second.stderr
    assert f"pid {process.pid}, since" in second.stderr
    carries = "A run is active: its next commit carries the change.\n"
    assert here("add", "Added meanwhile", "--commit").out == f"Added WRK-004: Added meanwhile\n{carries}"
    refused = here("complete", "WRK-001", code=1).err
    assert refused.startswith("orchestrator: WRK-001: its phase plan is running just now. Wait for it, or ask")
    assert here("close", "WRK-003", "--reason", "no", "--commit").out == f"Closed WRK-003: Item WRK-003\n{carries}"
    follower = project.start("logs", "WRK-001", "-f")
    assert [follower.stdout.readline() for _ in range(2)] == ["==> plan-1.out <==\n", "reading\n"]
    assert "finishes the phases in flight" in here("stop").out
    (project.outside / "go").write_text("")
    log = project.finish(process)
    project.finish(follower)
    assert "(ShutdownRequested)" in log
    assert project.statuses() == {"WRK-001": "in_progress again", "WRK-002": "ready", "WRK-004": "new"}
    assert not [subject for subject in project.subjects() if "Added meanwhile" in subject or "Close" in subject]
    clean_and_saved(project)
    assert "No run is active" in here("stop").out


@pytest.mark.slow
def test_d06_d25_d39_k1_k2_k6_project_below_the_top_with_a_relative_root_and_an_absolute_config(project: Any) -> None:
    """The cap of the config holds; the halt commit is made wherever the config was named from."""
    sub = project.root / "sub dir"
    sub.mkdir()
    for name in ("BACKLOG.yaml", "orchestrator.toml"):
        (project.root / name).rename(sub / name)
    project.root = sub
    project.set_up("WRK-001 ready", "WRK-002 ready", "WRK-003 ready", execution="default_phase_cap = 3", script={
        "WRK-001/plan": [{"document": "p.md"}], "WRK-002/plan": [{"result": BLOCKED}],
        "*/build": [{"write": {"code.py": "1\n"}, "sh": "pwd > ../../outside/cwd; echo 1 > ../top.py"}],
    })
    relative = os.path.relpath(sub, project.outside)
    argv = [sys.executable, str(project.program), "run", "--root", relative, "--config", str(sub / "orchestrator.toml")]
    done = subprocess.run(argv, cwd=project.outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(CapReached)" in done.stderr
    assert (project.outside / "cwd").read_text().strip() == str(sub.resolve())
    built = project.git("log", "--format=%H", "-1", "--grep=build done").strip()
    assert sorted(project.paths(built)) == ["sub dir/BACKLOG.yaml", f"sub dir/{month(project)}", "sub dir/code.py", "top.py"]
    assert (project.subjects()[0], project.paths()) == (f"{HALT} (CapReached)", ["sub dir/BACKLOG.yaml"])
    assert project.git("show", "HEAD:./BACKLOG.yaml") == project.text()
    assert project.status() == ""


def test_unborn_branch(project: Any) -> None:
    project.git("update-ref", "-d", "HEAD")
    project.git("rm", "-rq", "--cached", ".")
    project.backlog(f"WRK-001 {IN_BUILD}")
    project.script({"*/build": [CODE]})
    project.run("run", "--allow-dirty")
    assert project.subjects() == ["[WRK-001][build] build done"]
    assert sorted(project.paths()) == ["BACKLOG.yaml", month(project), "code.py"]
    assert project.committed() == project.text()
    assert project.status() == "?? README.md\n?? orchestrator.toml\n"


def test_the_notify_command_gets_the_summary_and_may_leave_a_child(project: Any) -> None:
    told, child = project.outside / "told", project.outside / "child"
    body = f"cat > {told}; (exec sleep 100) > /dev/null & echo $! > {child}; exit 3"
    project.configure(more=f'[notify]\ncommand = ["sh", "-c", "{body}"]\n')
    project.commit_all()
    done = project.run("run", "--json")
    os.kill(int(child.read_text()), 9)
    assert json.loads(told.read_text()) == json.loads(done.stdout)
    assert "warning: notify.command failed: " in done.stderr
