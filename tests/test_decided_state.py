"""What was decided stands: no older state that comes back undoes it, and no edit is lost on the way.

Real runs of a small pipeline in which WRK-001 gets done first. Then an agent, the operator, an
editor or a crash brings an older state of BACKLOG.yaml back, or a wreck of it. Judged are whole
outcomes: the items, what HEAD holds, how often each phase was paid for, and what was said.
"""

import os
import re
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import sh

ITEMS = ("WRK-001 ready", "WRK-002 ready", "WRK-003 ready")
TARGETS = ("run", "--target", "WRK-001", "--target", "WRK-002")
IDLE = ("run", "--only", "id=WRK-404")  # a start that finishes what was left, and works on nothing
# In an agent's shell: say that it is at work, and wait until the test lets it go on.
PAUSE = "echo at work > ../outside/announce; cat ../outside/go > /dev/null; "
DOCUMENTS = {"*/prd": [{"document": "prd.md"}], "*/build": [{"sh": "echo code >> code.py"}], "*/review": [{"document": "review.md"}]}
OLD = "git checkout -q HEAD~3 -- BACKLOG.yaml"
COMMIT = "; echo x > other; git add other; git commit -qm agent"
RETITLE = "sed -i.bak 's/title: Item WRK-003/title: Edited/' BACKLOG.yaml; rm BACKLOG.yaml.bak"
BLOCKED = {"result": {"result": "blocked", "summary": "a question"}}


def quick(rows: Iterable[Any], *names: Any) -> list[Any]:
    """Rows of a table of which all but those named are slow."""
    return [row if row in names else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow) for row in rows]


def prepare(project: Any, script: dict[str, Any]) -> None:
    project.set_up(*ITEMS, phases="prd build! review", script={**script, **{key: steps for key, steps in DOCUMENTS.items() if key not in script}})
    os.mkfifo(project.outside / "go")


def pausing(then: str = "", **more: Any) -> list[dict[str, Any]]:
    """One visit of an agent that waits for the test, then does what a shell is told; a tame one."""
    return [{"sh": f"{PAUSE}{then or ':'}", **more}, {"sh": "echo again > again.py"}]


def go_on(project: Any) -> None:
    (project.outside / "go").write_text("")


def edited(text: str, item_id: str) -> str:
    """As an editor that has changed the title of an item would save it."""
    assert f"title: Item {item_id}\n" in text
    return text.replace(f"title: Item {item_id}\n", "title: Edited\n")


def journals(project: Any) -> list[Path]:
    return sorted((project.root / ".git/orchestrator").glob("journal*"))


def warnings(log: str, word: str) -> list[str]:
    return [line for line in log.splitlines() if "warning" in line and word in line]


def check(project: Any, statuses: dict[str, str], log: str = "", again: str = "") -> None:
    """The items are these, HEAD and the file agree, and nothing but `again` was paid for twice."""
    assert project.statuses() == statuses, log
    assert project.committed() == project.text(), log
    paid = Counter(line.rsplit(" ", 1)[0] for line in project.agent_log())
    assert [phase for phase, number in paid.items() if number > 1 and phase != again] == [], log
    assert project.survivors() == []
    assert journals(project) == []


# ---- An older state that comes back --------------------------------------------------------------

WAYS = {
    "checked out": OLD,
    "checked out and edited": f"{OLD}; {RETITLE}",
    "checked out, edited and committed": f"{OLD}; {RETITLE}; git commit -qam agent",
    "written without git's index": f"git show HEAD~3:BACKLOG.yaml > BACKLOG.yaml; {RETITLE}",
    "cleaned": "git rm -q --cached BACKLOG.yaml; git clean -fdxq -e 'orchestrator.toml' -e .orchestrator",
}
CASES = [*(("build", way) for way in list(WAYS)[1:4]), ("prd", "checked out"), ("build", "cleaned")]


@pytest.mark.parametrize(("phase", "way"), quick(CASES, ("build", "checked out and edited")))
def test_an_older_state_that_an_agent_brings_back_undoes_nothing(project: Any, phase: str, way: str) -> None:
    step = {**DOCUMENTS[f"*/{phase}"][0]}
    step["sh"] = f"{PAUSE}{WAYS[way]}; {step.get('sh', ':')}"
    prepare(project, {f"WRK-002/{phase}": [step, *DOCUMENTS[f"*/{phase}"]]})
    run = project.start(*TARGETS)
    project.announced()
    assert project.run("add", "Added meanwhile").stdout.startswith("Added WRK-004")
    go_on(project)
    log = project.finish(run)
    check(project, {"WRK-003": "ready", "WRK-004": "new"}, log)
    assert project.titles() == {"WRK-003": "Edited" if "Edited" in WAYS[way] else "Item WRK-003", "WRK-004": "Added meanwhile"}


@pytest.mark.parametrize(("phase", "more"), quick([("prd", ""), ("build", COMMIT)], ("build", COMMIT)), ids=["prd", "build, commit"])
def test_a_branch_that_an_agent_rewinds_stops_the_run_and_undoes_no_decision(project: Any, phase: str, more: str) -> None:
    prepare(project, {f"WRK-002/{phase}": pausing(f"git reset -q --hard HEAD~3{more}")})
    run = project.start(*TARGETS)
    project.announced()
    project.run("add", "Added meanwhile")
    tip = project.git("rev-parse", "HEAD").strip()
    go_on(project)
    log = project.finish(run, code=1)
    there = project.statuses()
    assert there.pop("WRK-002").startswith("in_progress"), log
    assert there == {"WRK-003": "ready", "WRK-004": "new"}, log
    assert project.committed() == project.text()
    ref = project.git("for-each-ref", "--contains", tip, "--format=%(refname)", "refs/orchestrator/salvage").split()
    assert ref, log
    assert any("git " in line and (tip[:7] in line or ref[0] in line) for line in log.splitlines()), log
    assert project.git("merge-base", "--is-ancestor", "HEAD~1", "HEAD") == ""
    # Without the operator's help the next run goes on from what was decided.
    project.script(DOCUMENTS)
    log = project.run("run", "--allow-dirty", "--target", "WRK-002").stderr
    check(project, {"WRK-003": "ready", "WRK-004": "new"}, log, again=f"WRK-002 {phase}")


# ---- A stale buffer ------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_stale_buffer_that_is_saved_during_a_run_gives_its_edit_alone(project: Any) -> None:
    prepare(project, {"WRK-001/build": pausing("echo code > code.py"), "WRK-002/prd": pausing(document="prd.md")})
    run = project.start("run", "--cap", "4")
    project.announced()
    buffer = project.text()  # an editor loads it
    go_on(project)
    project.announced()
    assert "WRK-001" not in project.statuses()
    (project.root / "BACKLOG.yaml").write_text(edited(buffer, "WRK-002"))
    go_on(project)
    log = project.finish(run)
    check(project, {"WRK-002": "in_progress build", "WRK-003": "ready"}, log)
    assert project.titles() == {"WRK-002": "Edited", "WRK-003": "Item WRK-003"}
    assert len(warnings(log, "WRK-001")) == 1, log


@pytest.mark.slow
def test_a_stale_buffer_that_is_saved_in_the_morning_gives_its_edit_alone(project: Any) -> None:
    prepare(project, {"WRK-001/review": pausing(document="review.md")})
    buffer = project.text()
    run = project.start("run", "--cap", "4")
    project.announced()
    go_on(project)
    project.finish(run)
    (project.root / "BACKLOG.yaml").write_text(edited(buffer, "WRK-002"))
    log = project.run("run", "--cap", "1").stderr
    check(project, {"WRK-002": "in_progress review", "WRK-003": "ready"}, log)
    assert project.titles() == {"WRK-002": "Edited", "WRK-003": "Item WRK-003"}
    assert len(warnings(log, "WRK-001")) == 1, log


@pytest.mark.slow
def test_what_is_committed_by_hand_in_the_morning_is_meant(project: Any) -> None:
    prepare(project, {})
    project.run("run", "--cap", "4")
    path = project.root / "BACKLOG.yaml"
    path.write_text(re.sub(r"(?m)^  (status: in_progress|phase: build|phase_pool: main)\n", "", project.text())
                    .replace("title: Item WRK-002\n", "title: Item WRK-002\n  status: ready\n"))
    project.git("commit", "-qam", "Take it back")
    log = project.run(*IDLE).stderr
    check(project, {"WRK-002": "ready", "WRK-003": "ready"}, log)


# ---- A state that could not be committed, and then decided over ----------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("end", ["abort", "commit"])
def test_the_latest_decision_stands_after_a_halt_during_an_open_merge(project: Any, end: str) -> None:
    merge = "git merge -q --no-ff --no-commit other"
    prepare(project, {"WRK-001/prd": [{"sh": merge, **BLOCKED}, {}]})
    project.git("branch", "-q", "other", project.git("commit-tree", "-p", "HEAD", "-m", "other", "HEAD^{tree}").strip())
    before = project.git("rev-parse", "HEAD")
    log = project.run("run", "--target", "WRK-001", code=3).stderr
    assert project.git("rev-parse", "HEAD") == before
    assert warnings(log, "merge is in progress"), log
    project.run("add", "Added meanwhile")
    project.run("close", "WRK-001", "--reason", "not wanted")
    project.git(*(("merge", "--abort") if end == "abort" else ("commit", "-qm", "Merged")))
    log = project.run(*IDLE).stderr
    check(project, {"WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}, log)


# ---- A file that does not parse ------------------------------------------------------------------

# In a clone, so that no run sees the file in between.
STASH_POP = (
    "(git clone -q . ../outside/clone; cd ../outside/clone; retitle() {"
    " sed \"s/title: Item WRK-002/title: $1/\" BACKLOG.yaml > new; mv new BACKLOG.yaml; };"
    " retitle One; git stash -q; retitle Two; git commit -qm two BACKLOG.yaml; git stash pop -q || true);"
    " mv ../outside/clone/BACKLOG.yaml BACKLOG.yaml; grep -q '<<<' BACKLOG.yaml; "
)
WRECKS = {
    "empty": ": > BACKLOG.yaml; ",
    "cut between items": "sed -n '/WRK-002/q;p' BACKLOG.yaml > cut; mv cut BACKLOG.yaml; ",
    "junk": "printf 'it is [\\n\\t{' > BACKLOG.yaml; ",
    "conflict markers": STASH_POP,
}
HALTS = {  # how the run ends right after the wreck: arguments, exit code
    "signal": (("run",), 143),
    "cap": (("run", "--cap", "1"), 0),
    "end": (("run", "--target", "WRK-001"), 0),
}


def check_set_aside(project: Any, log: str) -> None:
    left = (project.outside / "wreck").read_bytes()
    kept = [path for path in (project.root / ".orchestrator").rglob("*") if path.is_file() and path.read_bytes() == left]
    assert any(len(warnings(log, path.name)) == 1 for path in kept), log


@pytest.mark.slow
@pytest.mark.parametrize(("wreck", "halt"), quick([*((one, "cap") for one in ("empty", "cut between items", "conflict markers")), ("junk", "signal"), ("conflict markers", "end")], ("conflict markers", "end")))
def test_a_wreck_that_an_agent_leaves_before_a_halt_is_set_aside(project: Any, wreck: str, halt: str) -> None:
    phase, (args, code) = "review" if halt == "end" else "prd", HALTS[halt]
    leave = f"{WRECKS[wreck]}cp BACKLOG.yaml ../outside/wreck; "
    more = {"announce": True, "hang": True} if halt == "signal" else {}
    prepare(project, {f"WRK-001/{phase}": pausing(leave, document=f"{phase}.md", **more)})
    run = project.start(*args)
    project.announced()
    project.run("add", "Added meanwhile")
    go_on(project)
    if halt == "signal":
        project.announced()
        run.terminate()
    log = project.finish(run, code=code)
    rest = {"WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}
    there = project.statuses()
    where = {"signal": "in_progress prd", "cap": "in_progress build"}
    assert there == rest | ({"WRK-001": where[halt]} if halt in where else {}), log
    assert project.committed() == project.text()
    assert project.titles()["WRK-004"] == "Added meanwhile"
    check_set_aside(project, log)
    project.script(DOCUMENTS)  # the next night needs nobody
    log = project.run(*(TARGETS if halt in where else ("run", "--target", "WRK-002"))).stderr
    check(project, {"WRK-003": "ready", "WRK-004": "new"}, log, again="WRK-001 prd" if halt == "signal" else "")


# ---- Another branch, an open rebase --------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("phase", quick(["prd", "build"], "prd"))
def test_a_branch_that_is_switched_during_a_run_gets_nothing_of_ours(project: Any, phase: str) -> None:
    prepare(project, {f"WRK-001/{phase}": pausing()})
    project.git("switch", "-qc", "other")
    project.backlog("WRK-001 ready", "WRK-008 ready", "WRK-009 ready")
    project.git("commit", "-qam", "The other's")
    project.git("switch", "-q", "main")
    others = project.git("show", "other:BACKLOG.yaml")
    run = project.start("run", "--target", "WRK-001")
    project.announced()
    project.run("add", "Added meanwhile")
    project.git("switch", "-q", "--merge" if phase == "build" else "--discard-changes", "other")
    (project.root / "BACKLOG.yaml").write_text(others)
    go_on(project)
    log = project.finish(run, code=1)
    assert project.git("show", "other:BACKLOG.yaml") == others == project.text(), log
    assert "\nEnded by an error: see above\n" in log
    if journals(project):  # something is left to do on the run's branch
        err = project.run("run", "--allow-dirty", code=1).stderr
        assert "main" in err, err
        assert str(journals(project)[0]) in err or journals(project)[0].name in err, err
    assert project.git("show", "other:BACKLOG.yaml") == others == project.text()
    project.git("switch", "-q", "--discard-changes", "main")
    project.script(DOCUMENTS)
    log = project.run("run", "--allow-dirty", "--target", "WRK-001").stderr
    check(project, {"WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}, log, again=f"WRK-001 {phase}")
    assert project.git("show", "other:BACKLOG.yaml") == others


@pytest.mark.slow
def test_a_rebase_that_is_opened_during_a_run_is_left_alone(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(project, {"WRK-001/review": pausing(document="review.md")})
    monkeypatch.setenv("GIT_SEQUENCE_EDITOR", "sed -i.bak s/^pick/edit/")
    run = project.start("run", "--target", "WRK-001")
    project.announced()
    project.run("add", "Added meanwhile")
    project.git("rebase", "-q", "--autostash", "-i", "HEAD~1")
    stopped = project.git("rev-parse", "HEAD")
    go_on(project)
    log = project.finish(run, code=None)
    assert run.returncode in (0, 1), log
    assert project.git("rev-parse", "HEAD") == stopped
    assert "rebase" in log
    sh(project.root, "sh", "-ec", "git stash push -q BACKLOG.yaml || true; git rebase --continue")
    project.script(DOCUMENTS)
    log = project.run("run", "--allow-dirty", "--target", "WRK-001", code=None).stderr
    check(project, {"WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}, log, again="WRK-001 review")


# ---- Killed, then a colleague's work pulled ------------------------------------------------------

def kill_in_build(project: Any, by_hook: bool = False) -> None:
    """SIGKILL a run in WRK-001's build: while its agent works, or its finished work is committed."""
    work = "echo half > README.md; echo half > half.py; "
    prepare(project, {"WRK-001/build": [{"sh": work if by_hook else work + PAUSE}, {"sh": "echo again > again.py"}]})
    if by_hook:
        project.hook("pre-commit", f"cd {project.root}\n{PAUSE}")
    run = project.start("run", "--target", "WRK-001")
    project.announced()
    project.run("add", "Added meanwhile")
    run.kill()
    run.wait()
    if by_hook:
        go_on(project)
        (project.root / ".git/hooks/pre-commit").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while the agent works", "while its work is committed"])
def test_a_colleagues_work_that_is_pulled_after_a_kill_stays(project: Any, tmp_path: Path, when: str) -> None:
    sh(tmp_path, "sh", "-ec", "git init -q --bare -b main origin")
    project.git("remote", "add", "origin", str(tmp_path / "origin"))
    kill_in_build(project, by_hook="commit" in when)
    for pid in project.survivors():
        os.kill(pid, signal.SIGKILL)
    project.git("push", "-q", "-u", "origin", "main")
    sh(tmp_path, "sh", "-ec", "git clone -q origin colleague")
    for name in ("README.md", "half.py"):
        (tmp_path / "colleague" / name).write_text("a colleague's\n")
    sh(tmp_path / "colleague", "sh", "-ec", "git add -A; git commit -qm colleague; git push -q")
    project.git("stash", "-q", "--include-untracked")
    project.git("pull", "-q")
    log = project.run(*IDLE).stderr
    for name in ("README.md", "half.py"):
        assert (project.root / name).read_text() == project.git("show", f"HEAD:{name}") == "a colleague's\n", log
    assert project.status() == "", log
    check(project, {"WRK-001": "in_progress build", "WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}, log)
    project.script(DOCUMENTS)
    log = project.run("run", "--target", "WRK-001").stderr
    check(project, {"WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}, log, again="WRK-001 build")


@pytest.mark.slow
def test_a_finished_item_that_is_taken_back_is_waited_for_again(project: Any) -> None:
    merge = {"sh": "echo x > code.txt; git rev-parse HEAD > .git/MERGE_HEAD"}  # keeps it from being committed
    items = ("WRK-001 in_progress phase=build phase_pool=main", "WRK-002 ready dependencies=[WRK-001]")
    project.set_up(*items, phases="build!", script={"*": [merge]})
    project.run("run", "--target", "WRK-001")
    (project.root / ".git/MERGE_HEAD").unlink()
    (project.root / "code.txt").write_text("a colleague's\n")
    project.git("add", "code.txt")
    project.git("commit", "-q", "-m", "colleague", "code.txt")
    log = project.run(*IDLE).stderr
    assert "[WRK-001][build] was finished, but not committed when its run ended, and code.txt was changed in git" in log
    assert project.items()["WRK-002"]["dependencies"] == ["WRK-001"]
    assert project.run("status", "--done").stdout == "No item has been finished yet.\n"
    check(project, {"WRK-002": "ready", "WRK-001": "in_progress build"}, log)


# ---- Bad journals --------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("how", quick(["junk", "a line inside is junk"], "junk"))
def test_a_journal_that_cannot_be_read_gets_one_message_with_the_way_out(project: Any, how: str) -> None:
    kill_in_build(project)
    [journal] = journals(project)
    first, *others = journal.read_bytes().splitlines(keepends=True)
    data = b"\x00\xffno journal\n" if how == "junk" else b"".join([first, b"{half a li\n", *others])
    journal.write_bytes(data)
    before = (project.text(), project.git("rev-parse", "HEAD"))
    for command in (("run",), ("add", "One more")):
        done = project.run(*command, code=1)
        assert done.stderr.count(journal.name) >= 1, done.stderr
        assert "Traceback" not in done.stderr
        assert re.search(r"\brm\b|delete|remove|move", done.stderr), done.stderr
        assert (project.text(), project.git("rev-parse", "HEAD")) == before
        assert journal.read_bytes() == data
    journal.unlink()  # the way out
    for pid in project.survivors():  # which agents were at work stood there, too
        os.kill(pid, signal.SIGKILL)
    project.script(DOCUMENTS)
    log = project.run("run", "--allow-dirty", "--target", "WRK-001").stderr
    check(project, {"WRK-002": "ready", "WRK-003": "ready", "WRK-004": "new"}, log, again="WRK-001 build")


@pytest.mark.slow
def test_where_a_journal_is_every_command_uses_it(project: Any) -> None:
    """After a crash a `git stash` takes the file back; what is decided is shown and gone on from."""
    kill_in_build(project)
    project.git("stash", "-q", "--include-untracked")
    assert "Added meanwhile" not in project.text()
    assert "WRK-004" in project.run("status").stdout
    assert project.run("add", "One more").stdout.startswith("Added WRK-005")
    project.run("close", "WRK-004", "--reason", "not wanted")
    project.git("checkout", "-q", "--", "BACKLOG.yaml")
    log = project.run(*IDLE).stderr
    there = {"WRK-001": "in_progress build", "WRK-002": "ready", "WRK-003": "ready", "WRK-005": "new"}
    check(project, there, log)
