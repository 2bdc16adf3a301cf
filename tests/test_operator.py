"""What an operator met in a night at the terminal: advice that is right, and files of theirs that stay."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from orchestrator import MessageEntry, phase_message, state_message

IN_BUILD, IN_PLAN = (f"in_progress phase={phase} phase_pool=main" for phase in ("build", "plan"))
CODE = [{"write": {"code.txt": "x\n"}}]
HANG = {"announce": True, "hang": True}
SALVAGED = "refs/orchestrator/salvage/WRK-001/build"


def hold(project: Any, *steps: Any) -> None:
    """A run whose one build is finished, and held: what is to check it is not there."""
    project.set_up(f"WRK-001 {IN_BUILD}", script={"*": steps or CODE}, phases="build!", more='verify = [["no-such-check"]]\n')
    project.run("run", code=4)


def way_back(project: Any, log: str) -> str:
    """What the one command prints that a log names for getting a file back."""
    (command,) = set(re.findall(r"what they held: (git show refs/\S+:)PATH, for README.md", log))
    return subprocess.run(f"{command}README.md", shell=True, cwd=project.root, capture_output=True, text=True, check=True).stdout


def test_what_the_operator_commits_after_a_kill_stays_as_it_is(project: Any) -> None:
    """A file that was dirty as the killed build began is not taken back to that."""
    path = project.root / "notes.txt"
    path.write_text("one\n")
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*": [{"write": {"code.txt": "half\n"}, **HANG}, *CODE]})
    path.write_text("one\ntwo\n")
    project.killed("--allow-dirty")
    path.write_text("one\ntwo\nthree\n")
    project.git("commit", "-qm", "notes", "notes.txt")
    project.run("run")
    assert path.read_text() == "one\ntwo\nthree\n"
    assert project.paths(f"{SALVAGED}/1") == ["code.txt"]
    assert project.status() == ""


def test_a_dirty_file_that_changes_under_a_build_is_named_with_the_way_to_get_it_back(project: Any) -> None:
    build = {"write": {"my notes.txt": "one\ntwo\n", "code.txt": "x\n"}}
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*": [build]}, execution="max_retries = 0")
    (project.root / "my notes.txt").write_text("one\n")
    done = project.run("run", "--allow-dirty", code=3)
    assert (project.root / "my notes.txt").read_text() == "one\n"
    reason = project.items()["WRK-001"]["blocked_reason"]
    assert "my notes.txt" in reason
    assert f"{SALVAGED}/1" in reason
    assert f"What you have changed there meanwhile, too: git show {SALVAGED}/1:PATH\n" in done.stderr
    assert project.git("show", f"{SALVAGED}/1:my notes.txt") == "one\ntwo\n"
    assert project.paths(f"{SALVAGED}/1") == ["code.txt", "my notes.txt"]


def test_the_log_of_a_pipe_and_the_program_itself_are_in_nobodys_way(project: Any) -> None:
    project.run("vendor", f"{project.root}/tools/")
    command = f"timeout 60 {sys.executable} tools/orchestrator.py run 2>&1 | cat | tee night.log"
    done = subprocess.run(["bash", "-c", command], cwd=project.root, capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True)
    assert "(AllDoneOrBlocked)" in done.stdout, done.stdout
    assert project.status() == "?? night.log\n?? tools/\n"


def test_what_waits_or_is_held_by_the_guardrails_is_told_with_what_comes_of_it(project: Any) -> None:
    project.set_up("WRK-001 ready risk=high", "WRK-002 new dependencies=[WRK-001]")
    target = ("run", "--target", "WRK-002")
    assert "  1 item waiting for WRK-001 (ready): WRK-002\n" in project.run(*target, "--dry-run").stdout
    assert "(AllDoneOrBlocked): 1 item waiting for WRK-001 (ready): WRK-002\n" in project.run(*target).stderr
    project.run("run", code=3)
    assert "unblock ID --override-guardrails\n" in project.run("status").stdout


def test_check_tells_of_a_config_that_is_gone(project: Any) -> None:
    (project.root / "orchestrator.toml").unlink()
    said = project.run("check", code=1).stdout
    assert "orchestrator.toml is in git, but not on disk" in said


@pytest.mark.slow
def test_a_run_that_ends_while_an_agent_rests_leaves_nothing_unfinished(project: Any) -> None:
    project.set_up("WRK-001 ready", phases="plan", script={"*": [{"exit": 1, "no_result": True}]})
    project.run("run", code=4)
    assert json.loads(project.run("status", "--json").stdout)["unfinished"] is None
    assert not (project.root / ".git/orchestrator/journal").exists()
    assert project.git("for-each-ref", "refs/orchestrator") == ""


def test_a_commit_of_a_command_tells_all_that_it_holds(project: Any) -> None:
    project.set_up("WRK-001 new", "WRK-002 blocked blocked_from_status=new blocked_reason=why")
    project.run("unblock", "WRK-002")
    project.run("edit", "WRK-001", "--priority", "5", "--commit")
    items = project.git("log", "-1", "--format=%(trailers:key=Orchestrator-Item,valueonly,separator=%x2c)")
    assert items == "WRK-001,WRK-002\n"


def test_no_line_of_a_conventional_message_is_too_long_for_commitlint() -> None:
    path = "/" + "long/" * 40
    entry = MessageEntry("WRK-001", "build", "failed", f"look at {path} there")
    for message in (phase_message([entry], "run", "conventional"), state_message(f"Edit {path}", [entry], "run", "conventional")):
        assert max(map(len, message.splitlines())) <= 100
        assert path[:60] in message


@pytest.mark.slow
def test_a_branch_that_was_rewound_is_told_of_once_for_all_that_was_in_flight(project: Any) -> None:
    project.set_up(*(f"WRK-00{n} {IN_PLAN}" for n in (1, 2)), script={"*": [HANG]}, execution="max_concurrent = 2\nmax_wip = 2")
    project.git("commit", "-q", "--allow-empty", "-m", "to be rewound")
    project.killed(agents=2)
    project.git("reset", "-q", "--hard", "HEAD~1")
    project.script({"*/plan": [{"document": "a.md"}], "*": CODE})
    assert "took commits off the branch" in project.run("run", code=1).stderr
    project.run("run", "--cap", "2")
    assert set(project.statuses().values()) == {"in_progress build"}


@pytest.mark.slow
def test_what_the_operator_does_while_a_phase_is_held_stays_theirs_however_often_it_is_held(project: Any) -> None:
    """Our halt commit, and one of a command, move the branch in between."""
    hold(project)
    project.run("add", "Another", "--commit")
    (project.root / "mine.txt").write_text("mine\n")
    (project.root / "README.md").write_text("edited\n")
    assert "is finished, but" in project.run("run", code=1).stderr
    assert "verify command" in project.run("status").stdout
    project.configure("build!")
    project.git("commit", "-qm", "config", "orchestrator.toml")
    project.run("run", "--cap", "0", "--allow-dirty")
    assert [path for path in project.paths("HEAD") if not path.startswith("_worklog/")] == ["BACKLOG.yaml", "code.txt"]
    assert project.status() == " M README.md\n?? mine.txt\n"
    assert project.agent_log() == ["WRK-001 build 1"]
    assert project.git("for-each-ref", "refs/orchestrator/snapshots") == ""


@pytest.mark.slow
def test_a_held_phase_whose_item_is_closed_is_salvaged(project: Any) -> None:
    hold(project)
    project.run("close", "WRK-001", "--reason", "not wanted", "--commit")
    (project.root / "mine.txt").write_text("mine\n")
    project.run("run", "--allow-dirty")
    assert project.git("show", f"{SALVAGED}/1:code.txt") == "x\n"
    assert project.status() == "?? _worklog/\n?? mine.txt\n"
    assert "Outcome: complete" not in project.git("log", "--format=%B")


@pytest.mark.slow
def test_a_held_phase_that_fails_its_mended_check_is_charged_and_tried_again(project: Any) -> None:
    """On another branch a command says meanwhile which one its item is kept for."""
    hold(project, {"write": {"code.txt": "bad\n"}}, {"write": {"code.txt": "good\n"}})
    project.git("stash", "-qu")
    project.git("switch", "-qc", "other")
    before = project.git("rev-parse", "HEAD")
    assert "It is kept for the branch main" in project.run("add", "New", "--commit").stdout
    assert project.git("rev-parse", "HEAD") == before
    project.git("switch", "-q", "--discard-changes", "main")
    project.git("stash", "pop", "-q")
    project.configure("build!", more='verify = [["grep", "good", "code.txt"]]\n')
    project.git("commit", "-qm", "config", "orchestrator.toml")
    assert "failed after all: verify command `grep good code.txt`" in project.run("run", "--target", "WRK-001").stderr
    assert project.agent_log() == ["WRK-001 build 1", "WRK-001 build 2"]
    assert "> verify command `grep good code.txt`" in (project.outside / "prompt-WRK-001-build-2.md").read_text()
    assert project.git("show", "HEAD:code.txt") == "good\n"


def test_what_the_operator_commits_beside_a_document_phase_is_not_unstaged_again(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_PLAN}", script={"*/plan": [{"document": "a.md", "announce": True, "await": "go"}]})
    path = project.root / "README.md"
    path.write_text("one\n")
    project.git("add", "README.md")
    path.write_text("one\ntwo\n")
    process = project.start("run", "--allow-dirty", "--cap", "1")
    project.announced()
    project.git("commit", "-qm", "mine", "README.md")
    (project.outside / "go").write_text("")
    project.finish(process)
    assert project.status() == ""


def test_what_an_agent_sweeps_into_a_commit_of_its_own_is_named(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_PLAN}", script={"*/plan": [{"document": "a.md", "sh": "git add -A; git commit -qm swept"}]})
    (project.root / "mine.txt").write_text("mine\n")
    done = project.run("run", "--allow-dirty", "--cap", "1")
    assert "these hold what you had not committed: mine.txt" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_document_agent_that_writes_over_an_edit_of_the_operators_leaves_a_way_back(project: Any, fails: bool) -> None:
    """What an agent printed last, as it failed, is told, and in no commit's message."""
    act = {"document": "a.md", "sh": "git checkout -q README.md; echo agent >> README.md; echo token ghp_SECRET", "no_result": fails}
    project.set_up(f"WRK-001 {IN_PLAN}", script={"*/plan": [act]}, execution="max_retries = 0")
    (project.root / "README.md").write_text("mine\n")
    for item in ("WRK-001_item-wrk-001", "WRK-002"):  # documents are agents'
        (project.root / "changes" / item).mkdir(parents=True)
        (project.root / "changes" / item / "a.md").write_text("old\n")
    done = project.run("run", "--allow-dirty", "--cap", "1", "--strict", code=3 if fails else 0)
    assert way_back(project, done.stderr) == "mine\n"
    assert done.stderr.count("files of yours were written over") == 2  # as it happens, and in the summary
    assert ("Last output:\ntoken ghp_SECRET" in project.items()["WRK-001"].get("blocked_reason", "")) == fails
    assert "ghp_" not in project.git("log", "--format=%B")
    assert fails or "uncommitted changes: README.md" in project.run("run", code=1).stderr


def test_a_rewound_branch_does_not_leave_the_half_done_work_as_the_operators(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_BUILD}", script={"*": [{"write": {"code.txt": "half\n"}, **HANG}]}, phases="build!")
    project.killed()
    project.git("commit", "-q", "--amend", "-m", "reworded", "--only")
    project.run("run", code=1)
    assert project.git("show", f"{SALVAGED}/2:code.txt") == "half\n"
    assert project.status() == ""


def test_status_tells_of_a_stop(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_PLAN}", script={"*": [{"document": "a.md", "announce": True, "await": "go"}]})
    process = project.start("run")
    project.announced()
    project.run("stop")
    assert "it was asked to stop" in project.run("status").stdout
    (project.outside / "go").write_text("")
    assert "asked to stop: what is in flight is finished" in project.finish(process)


def test_an_item_that_is_deleted_while_its_build_runs_is_in_no_commit(project: Any) -> None:
    delete = "sed -i '/^- id: WRK-001/,/^- id: WRK-002/{/WRK-002/!d}' BACKLOG.yaml"  # as a person does it
    project.set_up("WRK-001 in_progress phase=build phase_pool=main", "WRK-002 blocked", phases="build!", script={"*": [{"sh": f"echo x > code.txt; {delete}"}]})
    done = project.run("run", code=None)
    assert list(project.items()) == ["WRK-002"], done.stderr
    ref = "refs/orchestrator/salvage/WRK-001/build/1"
    assert "[WRK-001][BUILD] its item was deleted meanwhile\n" in done.stderr
    assert f"[WRK-001][BUILD] what it left is kept on {ref}: code.txt\n" in done.stderr
    assert (project.git("show", f"{ref}:code.txt"), (project.root / "code.txt").exists()) == ("x\n", False)
    assert "code.txt" not in project.git("log", "--name-only", "--format=", "main")
    assert project.status() == ""


@pytest.mark.slow
@pytest.mark.parametrize("act", ["git reset -q --hard", "git stash -qu", "rm -r _worklog", "sed -i '1,/^---$/d' _worklog/*; sed -i 1d _worklog/*"])
def test_what_an_agent_takes_out_of_the_worklog_is_there_again(project: Any, act: str) -> None:
    script = {"WRK-003/plan": [{"sh": act, "document": "b.md"}], "*/build": CODE, "*": [{"document": "a.md"}]}
    project.set_up("WRK-001 new", f"WRK-002 {IN_PLAN}", f"WRK-003 {IN_PLAN}", script=script)
    project.run("run", "--target", "WRK-002", "--cap", "1")
    project.run("close", "WRK-001", "--reason", "the customer said no")
    told = project.worklog()
    assert "lost entries; they are there again" in project.run("run", "--target", "WRK-003", "--cap", "1").stderr
    begins = re.findall(r"(?m)^## .*", project.worklog())
    assert (len(begins), set(begins) >= set(re.findall(r"(?m)^## .*", told))) == (3, True)
    assert project.worklog().startswith(told) or "sed" in act
    assert "the customer said no" in project.run("show", "WRK-001").stdout
    assert project.status() == ""


@pytest.mark.slow
def test_a_config_that_is_mended_after_a_kill_stays_mended(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*": [{"write": {"code.txt": "half\n"}, **HANG}, *CODE]})
    project.killed()
    path = project.root / "orchestrator.toml"
    mended = path.read_text() + "# mended\n"
    path.write_text(mended)
    project.run("run")
    assert path.read_text() == mended
    assert project.paths() == ["BACKLOG.yaml", *project.paths()[1:-1], "code.txt"]
    assert project.git("ls-tree", "-r", "--name-only", f"{SALVAGED}/1").split().count("code.txt") == 1


def test_hooks_that_take_all_out_of_the_commit_fail_the_attempt(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_BUILD}", phases="build!", script={"*": CODE}, execution="max_retries = 0\n")
    project.hook("pre-commit", "git reset -q -- code.txt")
    assert "the repository's hooks took all that was changed out of the commit" in project.run("run", code=3).stderr
    assert project.git("show", f"{SALVAGED}/1:code.txt") == "x\n"
    assert not (project.root / "code.txt").exists()


def test_a_document_that_git_ignores_is_told_of_and_a_commit_of_the_operators_is_not(project: Any) -> None:
    (project.root / ".gitignore").write_text("changes/\n")
    commit = "echo 1 > mine.txt; git add mine.txt; git commit -qm mine mine.txt"
    project.set_up(f"WRK-001 {IN_PLAN}", script={"*": [{"document": "a.md", "sh": commit}]})
    log = project.run("run", "--cap", "1").stderr
    assert "[WRK-001][PLAN] no document of it is in a commit: see .gitignore" in log
    assert "outside its outputs" not in log
    assert "mine.txt" not in project.paths()


def test_a_document_phase_that_is_stopped_leaves_a_way_back_to_what_it_wrote_over(project: Any) -> None:
    project.set_up(f"WRK-001 {IN_PLAN}", script={"*/plan": [{"sh": "echo agent > README.md", **HANG}]})
    (project.root / "README.md").write_text("mine\n")
    process = project.start("run", "--allow-dirty")
    project.announced()
    process.terminate()
    _, log = process.communicate(timeout=60)
    assert way_back(project, log) == "mine\n"


def test_entries_that_the_operator_takes_out_of_the_worklog_stay_out(project: Any) -> None:
    redact = "sed -i s/agreed/redacted/ _worklog/*; git commit -qm redacted _worklog"
    script = {"WRK-002/plan": [{"sh": redact, "document": "b.md"}], "*": [{"document": "a.md", "result": {"summary": "agreed"}}]}
    project.set_up(f"WRK-001 {IN_PLAN}", f"WRK-002 {IN_PLAN}", script=script)
    project.run("run", "--target", "WRK-001", "--cap", "1")
    assert "lost entries" not in project.run("run", "--target", "WRK-002", "--cap", "1").stderr
    assert "agreed" not in project.worklog()
