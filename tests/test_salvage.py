"""What failed and interrupted work leaves: kept whole on refs, named, listed; and the operator's own files.

Killed at any point, the next start finishes what was decided and starts again what was not. The kill
at every event of a run is in test_interruptions.py.
"""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli, sh
from tests.gitkit import work_tree

BUILDING = "in_progress phase=build phase_pool=main"
PLANNING = "WRK-001 in_progress phase=plan phase_pool=main"
FAILS = {"result": {"result": "failed", "summary": "cannot"}}
REF = "refs/orchestrator/salvage/WRK-001/build/1"

# One of each kind: what git tracks, before the phase, and what the phase makes of it.
BEFORE = """
echo kept > keep.txt; echo mode > mode.sh; echo gone > gone.txt; echo renamed > 'old name.txt'
echo file > file-to-folder; mkdir folder-to-file; echo x > folder-to-file/inner.txt
echo file > file-to-link; ln -s keep.txt link; echo base > op.txt; echo base > op-staged.txt
"""
OPERATORS = "echo edited > op.txt; echo staged > op-staged.txt; git add op-staged.txt; echo more >> op-staged.txt; echo new > op-new.txt"
PHASE = """
chmod +x mode.sh; rm gone.txt; mv 'old name.txt' 'new name.txt'; rm file-to-folder; mkdir -p file-to-folder new/deep
echo inside > file-to-folder/inner.txt; rm -r folder-to-file; echo file > folder-to-file
ln -sf keep.txt file-to-link; ln -sf mode.sh link; echo new > new/deep/file.txt; : > empty; echo dash > ./-rf
echo x > "$(printf 'line\\nbreak')"; echo x > "$(printf 'latin-\\351')"; head -c 999 /dev/urandom > binary
"""
OURS = (".orchestrator", "_worklog", "changes", "BACKLOG.yaml")


def theirs(root: Path) -> dict[str, tuple[int, bytes]]:
    return {name: row for name, row in work_tree(root).items() if not name.startswith(OURS)}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["failed", "blocked", "timed out", "cancelled"])
def test_what_a_phase_left_is_kept_whole_and_nothing_else_moves(project: Any, tmp_path: Path, ending: str) -> None:
    sh(project.root, "sh", "-ec", BEFORE)
    build = {"sh": f"{PHASE} cp -a . {tmp_path}/left", "hang": ending in ("timed out", "cancelled")}
    build |= {"result": {"result": "blocked" if ending == "blocked" else "failed", "summary": "not finished"}}
    build |= {"announce": True} if ending == "cancelled" else {}
    script = {"WRK-001/build": [build, {"write": {"late.txt": "1\n"}}], "WRK-002/build": [{"write": {"other.txt": "1\n"}}]}
    limit = "timeout_minutes = 0.03\n" if ending == "timed out" else ""
    project.set_up(f"WRK-001 {BUILDING}", f"WRK-002 {BUILDING}", phases="build!", script=script, execution="max_retries = 0", more=limit)
    sh(project.root, "sh", "-ec", OPERATORS)
    before, staged = theirs(project.root), project.git("diff", "--cached")

    process = project.start("run", "--target", "WRK-001", "--allow-dirty")
    if ending == "cancelled":
        project.announced()
        process.send_signal(signal.SIGTERM)
    log = project.finish(process, 143 if ending == "cancelled" else 3)

    project.git("worktree", "add", "-q", "--detach", str(tmp_path / "kept"), REF)
    kept, left = theirs(tmp_path / "kept"), theirs(tmp_path / "left")
    assert {name: row for name, row in kept.items() if not name.startswith("op")} == {name: row for name, row in left.items() if not name.startswith("op")}
    assert [kept[name][1] for name in ("op.txt", "op-staged.txt")] == [b"base\n"] * 2  # nothing of the operator's
    assert "op-new.txt" not in kept
    assert theirs(project.root) == before
    assert project.git("diff", "--cached") == staged
    assert project.status() == "MM op-staged.txt\n M op.txt\n?? op-new.txt\n"
    assert f"[WRK-001][BUILD] what it left is kept on {REF}: " in log
    if ending != "cancelled":
        assert f"(its changes are kept on {REF})" in project.items()["WRK-001"]["blocked_reason"]
    assert REF in project.run("status").stdout
    assert REF in project.run("show", "WRK-001").stdout
    assert f"note: {REF} keeps what [WRK-001][build] left" in project.run("check", code=None).stdout

    # The next commits hold nothing of it, and the next prompt names it.
    if ending != "cancelled":
        project.run("unblock", "WRK-001")
    project.run("run", "--target", "WRK-002", "--target", "WRK-001", "--allow-dirty")
    month = [path for path in project.paths() if path.startswith("_worklog/")]
    assert sorted(project.paths()) == ["BACKLOG.yaml", *month, "late.txt"]
    assert sorted(project.paths("HEAD~1")) == ["BACKLOG.yaml", *month, "other.txt"]
    prompts = [path.read_text() for path in sorted((project.root / ".orchestrator/prompts").glob("WRK-001_build_*"), key=os.path.getmtime)]
    assert f"git show --stat {REF}" in prompts[-1]
    assert project.git("diff", "--cached") == staged


# ---- Listing -------------------------------------------------------------------------------------

def test_salvage_is_listed_with_the_command_that_drops_that_of_finished_items(project: Any, here: Cli) -> None:
    """Refs of an open, a done and an archived item, of an unknown one and of another branch's."""
    project.backlog("WRK-001 blocked", "WRK-002 done", "WRK-004 new")
    (project.root / "BACKLOG.yaml").write_text(project.text().replace("next_item_id: 3", "next_item_id: 7"))
    project.commit_all()
    ours, base = (project.git("commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", text).strip() for text in ("Left", "Elsewhere"))
    elsewhere = project.git("commit-tree", "HEAD^{tree}", "-p", base, "-m", "of another branch").strip()
    names = ("WRK-001/build/1", "WRK-002/build/1", "WRK-002/build/2", "WRK-003/fix/1", "WRK-005/build/1", "WRK-099/build/1")
    refs = {f"refs/orchestrator/salvage/{name}": elsewhere if "005" in name else ours for name in names}
    for ref, commit in refs.items():
        project.git("update-ref", ref, commit)
    parts = {ref: ref.split("/")[3:] for ref in refs}
    rows = [f"  {item} {phase:5} {ref}" for ref, (item, phase, _) in parts.items()]
    lines = here("status").out.splitlines()
    assert lines[-len(rows) - 1].endswith("(`git show --stat REF`):")
    assert lines[-len(rows) :] == rows
    assert here("show", "WRK-001").out.endswith(f"\n\nLeft by attempts that did not complete, and kept (`git show --stat REF`):\n{rows[0]}\n")
    known = [
        {"ref": ref, "item": item, "phase": phase, "commit": refs[ref], "finished": item in ("WRK-002", "WRK-003")}
        for ref, (item, phase, _) in parts.items()
    ]
    assert json.loads(here("status", "--json").out)["salvage"] == known
    assert json.loads(here("show", "WRK-002", "--json").out)["salvage"] == known[1:3]
    out = here("check").out
    assert [line for line in out.splitlines() if "keeps what" in line] == [
        f"note: {ref} keeps what [{item}][{phase}] left" for ref, (item, phase, _) in parts.items()
    ]
    assert json.loads(here("check", "--json").out)["salvage"] == known
    (note,) = [line for line in out.splitlines() if "finished items left: " in line]
    assert project.git("for-each-ref", "--format=%(refname)", "refs/orchestrator/").split() == list(refs)
    sh(project.root, "sh", "-c", note.partition("finished items left: ")[2])
    left = [ref for ref in refs if "WRK-002" not in ref and "WRK-003" not in ref]
    assert project.git("for-each-ref", "--format=%(refname)", "refs/orchestrator/").split() == left
    assert "finished" not in here("check").out


# ---- What becomes of the rest --------------------------------------------------------------------

@pytest.mark.slow
def test_stop_ends_the_retries_and_the_wait_before_them(project: Any) -> None:
    project.set_up(PLANNING, script={"*": [FAILS]}, execution="max_retries = 3")
    config = project.root / "orchestrator.toml"
    config.write_text(re.sub("retry_delay_seconds = .*", "retry_delay_seconds = 300", config.read_text()))
    process = project.start("run")
    project.read_until(process, "attempt 1 of 4 failed")
    said = project.run("stop").stdout
    assert said.endswith("finishes the phases in flight and halts.\n")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert project.agent_log() == ["WRK-001 plan 1"]
    assert "attempts: 1" in project.committed()


def test_init_does_not_replace_a_backlog_that_is_only_missing_on_disk(project: Any) -> None:
    project.set_up("WRK-001 ready")
    (project.root / "BACKLOG.yaml").unlink()
    done = project.run("init", code=1)
    assert f"git -C {project.root} restore BACKLOG.yaml" in done.stderr
    assert not (project.root / "BACKLOG.yaml").exists()


# ---- Killed, and what the next start makes of it -------------------------------------------------

HANG = {"announce": True, "hang": True}
RECOVERED = "[orchestrator] Recover backlog state"
HALT = "[orchestrator] Save backlog state on halt"

# Kills the process as it is about to rename, or add to, a file for the NTH time, or the one after that.
def recovered(project: Any) -> str:
    """Start once more without working: everything holds after that; returns the log."""
    log: str = project.run("run", "--cap", "0").stderr
    assert project.committed() == project.text()
    assert project.status() == ""
    assert project.survivors() == []
    assert project.git("for-each-ref", "refs/orchestrator/snapshots", "refs/orchestrator/backlog") == ""
    return log


@pytest.mark.slow
def test_f_f2_f3_killed_in_a_destructive_phase(project: Any) -> None:
    """The agent is ended before anything else is done; what it left is on a ref, and not charged."""
    project.set_up(f"WRK-001 {BUILDING}", "WRK-002 ready", execution="max_wip = 2", script={
        "*/build": [{**HANG, "write": {"half.py": "1\n", "README.md": "spoilt\n"}}, {"write": {"code.py": "1\n"}}]})
    project.killed()
    assert len(project.survivors()) == 1
    assert project.committed() != project.text()  # the promotion of WRK-002
    (project.root / "mine.py").write_text("written after the crash\n")
    log = recovered(project)
    assert "ended a process that an agent left behind" in log
    assert project.subjects()[:2] == [RECOVERED, "Set up"]
    assert project.paths() == ["BACKLOG.yaml"]
    ref = "refs/orchestrator/salvage/WRK-001/build/1"
    assert project.git("show", f"{ref}:half.py", f"{ref}:README.md") == "1\nspoilt\n"
    assert f"What you have changed there meanwhile, too: git show {ref}:PATH\n" in log
    project.git("restore", f"--source={ref}", "--", "mine.py")
    assert project.status() == "?? mine.py\n"
    (project.root / "mine.py").unlink()
    assert project.statuses() == {"WRK-001": "in_progress build", "WRK-002": "in_progress plan"}
    assert "attempts" not in project.text()
    project.run("run", "--target", "WRK-001")
    assert project.agent_log() == ["WRK-001 build 1"] * 2
    assert project.subjects()[0] == "[WRK-001][build] build done"
