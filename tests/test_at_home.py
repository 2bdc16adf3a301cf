"""Promise P6: the repository's own files, tools and habits are left alone."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.gitkit import sign_with_a_key

SLOW = pytest.mark.slow
BUILDING, PLANNING = (f"WRK-001 in_progress phase={phase} phase_pool=main" for phase in ("build", "plan"))
WRITES = [{"write": {"code.txt": "x\n"}}]


@pytest.mark.slow
def test_an_editors_own_files_are_in_no_commit_and_in_nobodys_way(project: Any) -> None:
    """They are there when the run starts, change while a build runs, and are there afterwards; one that is in git is like any."""
    names = (".BACKLOG.yaml.swp", "BACKLOG.yaml~", ".#BACKLOG.yaml", "sub/.x.py.swo")
    (project.root / "sub").mkdir()
    (project.root / "sub/old.txt~").touch()
    project.set_up(BUILDING, script={"*": [{"write": {"code.txt": "x\n", "sub/old.txt~": "y\n", **dict.fromkeys(names, "after\n")}, "sh": "touch .new.txt.swp"}]})
    for name in names:
        (project.root / name).write_text("before")
    project.run("run")
    assert project.items() == {}
    assert project.paths("HEAD") == ["BACKLOG.yaml", f"_worklog/{project.git('log', '-1', '--format=%cs')[:7]}.md", "code.txt", "sub/old.txt~"]
    assert [(project.root / name).read_text() for name in names] == ["after\n"] * 4
    assert not {*names, ".new.txt.swp"} & set(project.git("log", "--name-only", "--format=").split())


@pytest.mark.slow
def test_the_file_that_our_output_goes_to_is_in_no_commit_and_in_nobodys_way(project: Any) -> None:
    """One run recovers what a SIGKILL ended, and goes on in the same log."""
    project.set_up(BUILDING, phases="build!", script={"*": [{"announce": True, "hang": True}, *WRITES]})
    for code in (-9, 0):
        with (project.root / "run.log").open("a") as out:
            process = subprocess.Popen([sys.executable, str(project.program), "run"], cwd=project.root, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        project.started.append(process)
        if code:
            project.announced()
            process.kill()
        assert process.wait(60) == code, (project.root / "run.log").read_text()
    assert project.items() == {}
    assert project.status() == "?? run.log\n"
    assert ".log" not in project.git("log", "--all", "--name-only", "--format=")
    assert re.search(r"\[BUILD\] starts[^~]+WRK-001 is done", (project.root / "run.log").read_text())


def test_what_a_document_phase_leaves_elsewhere_is_a_stray_until_it_is_gone(project: Any) -> None:
    project.set_up(PLANNING, script={"*/plan": [{"sh": "echo note > scratch.txt"}], "*/build": WRITES})
    first = project.run("run", "--cap", "1")
    second = project.run("run")
    assert "touched files outside its outputs" in first.stderr
    assert "scratch.txt" not in second.stderr
    assert project.items() == {}
    assert project.status() == "?? scratch.txt\n"
    assert "scratch.txt" not in project.git("log", "--name-only", "--format=")
    (project.root / "scratch.txt").write_text("the operator's, by now\n")
    assert "uncommitted changes: scratch.txt" in project.run("run", code=1).stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_what_a_neighbour_had_stashed_away_as_a_phase_began_stays_the_operators(project: Any, killed: bool) -> None:
    """It comes back while that phase runs, and must not pass for what the phase left: a stray is nobody's."""
    stash = {"sh": "git stash -q --include-untracked", "document": "a.md"}
    script = {"WRK-001/plan": [{**stash, "announce": True, "await": "go1"}], "*/triage": [{"announce": True, "await": "go2"}], "WRK-002/plan": [stash]}
    project.set_up(PLANNING, phases="plan", script=script, execution="max_concurrent = 2\nmax_wip = 2")
    (project.root / "mine.txt").write_text("mine\n")
    process = project.start("run", "--allow-dirty")
    assert project.announced() == "WRK-001 plan 1"
    project.run("add", "Another one")
    assert project.announced() == "WRK-002 triage 1"
    (project.outside / "go1").write_text("")
    project.read_until(process, "took away what you had not committed; it is there again: mine.txt")
    if killed:
        project.read_until(process, "WRK-001 is done")
        process.kill()
        process.communicate()
        process = project.start("run", "--allow-dirty")
        project.announced()
    (project.outside / "go2").write_text("")
    log = project.finish(process)
    assert "touched files outside" not in log
    assert log.count("it is there again: mine.txt") == 1
    assert project.status() == "?? mine.txt\n"


@pytest.mark.slow
@pytest.mark.parametrize("committed", [False, True])
def test_an_item_written_by_hand_is_there_for_every_command_and_runs_once(project: Any, committed: bool) -> None:
    """Only its title is needed, be the file committed or not; an agent that takes the file back makes no second one."""
    project.configure("plan")
    project.script({"*/triage": [{"sh": "git checkout -q HEAD -- BACKLOG.yaml"}]})
    path = project.root / "BACKLOG.yaml"
    path.write_text("schema_version: 3\nitems:\n- title: Mine\n- id: WRK-001\n  title: Other\nnext_item_id: 1\n")
    if committed:
        project.commit_all()
    before = path.read_bytes()
    for argv in (["status"], ["run", "--dry-run"], ["show", "WRK-002"]):
        assert "Mine" in project.run(*argv).stdout
    assert path.read_bytes() == before
    project.run("run", *([] if committed else ["--allow-dirty"]))
    assert sorted(project.agent_log()) == ["WRK-001 plan 1", "WRK-001 triage 1", "WRK-002 plan 1", "WRK-002 triage 1"]
    assert project.items() == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clone", pytest.param("submodule", marks=SLOW)])
def test_a_repository_that_an_agent_leaves_in_the_tree_is_named(project: Any, make_repo: Any, kind: str) -> None:
    """A commit that nobody else has is not pointed to; what else the build did is committed, at a later attempt as well."""
    library, path = make_repo("library"), "vendor/lib"
    project.configure("build!", more='verify = [["true"]]\n')
    project.backlog(*(f"WRK-00{n} in_progress phase=build phase_pool=main" for n in (1, 2)))
    act = f"git clone -q {library} {path}"
    if kind == "submodule":
        project.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(library), path)
        act = f"git -C {path} commit -q --allow-empty -m 'Only here'"
    project.commit_all()
    project.hook("pre-commit", "exit 0")
    second = {"write": {"b.txt": "b\n"}}
    project.script({"WRK-001/*": [{"sh": f"{act}; date +%N > code.txt"}], "WRK-002/*": [{**second, "result": {"result": "failed"}}, second]})
    first, second = project.run("run", "--cap", "1"), project.run("run")
    assert f"a submodule at a commit that none of its remotes has: {path}. No commit" in first.stderr
    assert path not in second.stderr
    assert project.agent_log() == ["WRK-001 build 1", "WRK-002 build 1", "WRK-002 build 2"]
    assert project.items() == {}
    assert project.git("log", "--format=", "--name-only", "-2", "--", "code.txt", "b.txt", "vendor") == "b.txt\ncode.txt\n"
    assert project.status() == (f"?? {path}/\n" if kind == "clone" else f" M {path}\n").replace("vendor/lib/", "vendor/")


# ---- How the repository wants its commits --------------------------------------------------------

COMMITLINT = r"""#!/usr/bin/env python3
# What commitlint's usual rules ask for, in short.
import re, sys
head, *rest = open(sys.argv[1]).read().rstrip("\n").split("\n")
kinds = "build|chore|ci|docs|feat|fix|perf|refactor|revert|style|test"
if not re.fullmatch(rf"({kinds})(\([^()]+\))?!?: [a-z].*[^.]", head) or max(map(len, [head, *rest])) > 100 or rest and rest[0]:
    sys.exit(f"not conventional: {head}")
"""


@pytest.mark.slow
def test_conventional_commits(project: Any) -> None:
    """Every commit is worded so, those of the backlog's state as well; by default the start is refused."""
    said = "API limits, " + "explained at length, " * 12 + "and more."
    project.configure(execution="max_concurrent = 2\nmax_wip = 2")
    project.set_up(*(f"WRK-00{n} new" for n in (1, 2)), "WRK-003 blocked blocked_reason=why blocked_type=decision blocked_from_status=ready")
    project.script({
        "*/build": [{"sh": "date +%N > code.txt", "result": {"commit_summary": "Fix the limits.", "commit_type": "fix"}}],
        "WRK-002/build": [{"write": {"b.txt": "b\n"}, "result": {"summary": said, "commit_type": "mine"}}],
        "*/plan": [{"document": "PLAN.md", "result": {"summary": said}}],
    })  # fmt: skip
    project.hook("commit-msg", COMMITLINT)
    refused = project.run("run", code=1)
    project.configure(execution="max_concurrent = 2\nmax_wip = 2", more='[commits]\nstyle = "conventional"\n')
    project.run("run")
    project.run("close", "WRK-003", "--reason", "No longer wanted", "--commit")
    assert "hook rejected the commit's message, tried on a sample: not conventional: [WRK-001][build] a sample" in refused.stderr
    subjects = project.subjects()[:-3]
    assert "fix(wrk-001): build: Fix the limits" in subjects
    assert any(one.startswith("feat(wrk-002): build: API limits, explained") for one in subjects)
    assert any(one.startswith("chore(backlog): close WRK-003") for one in subjects)
    for commit in project.git("log", "--format=%H").split()[:-3]:
        message = project.outside / "message"
        message.write_text(project.git("log", "-1", "--format=%B", commit).rstrip("\n"))
        subprocess.run([sys.executable, "-c", COMMITLINT, message], check=True)
    log = {(row["item"], row["phase"]): row["summary"] for row in json.loads(project.run("log", "--json").stdout)["log"]}
    assert log["WRK-001", "build"] == "Fix the limits"
    assert log["WRK-002", "plan"].startswith("API limits, explained")


@pytest.mark.slow
def test_commits_are_signed_and_signed_off(project: Any) -> None:
    """With a key that git's own configuration names; a key that has gone is a reason not to start."""
    key = sign_with_a_key(project.root, project.outside)
    script = {"*/plan": [{"document": "PLAN.md"}], "*/build": [{"sh": "date +%N > code.txt"}]}
    project.set_up(PLANNING, "WRK-002 new", script=script, more="[commits]\nsignoff = true\n")
    project.hook("commit-msg", "grep -q '^Signed-off-by: ' $1 || { echo 'sign off'; exit 1; }")
    project.run("run", "--cap", "3")
    project.run("add", "Another", "--commit")
    made = project.git("log", "--format=%G? %(trailers:key=Signed-off-by,valueonly,separator=%x2c) %s").splitlines()[:-3]
    assert len(made) >= 4
    assert {line.split(" ")[0] for line in made} == {"G"}
    assert all("<operator@example.invalid>" in line for line in made)
    key.unlink()
    assert "commits cannot be signed" in project.run("run", code=1).stderr


@pytest.mark.slow
def test_a_phase_that_may_change_nothing_outlasts_a_hook_that_cannot_run(project: Any) -> None:
    project.set_up(BUILDING, phases="build!", script={}, more="allow_empty = true\n")
    project.hook("pre-commit", f"test -e {project.outside}/mended || exec no-such-tool")
    project.run("run", code=4)
    (project.outside / "mended").touch()
    project.run("run", "--cap", "0")
    assert project.agent_log() == ["WRK-001 build 1"]
    assert project.items() == {}


# ---- What others do meanwhile --------------------------------------------------------------------

@pytest.mark.slow
def test_two_projects_of_one_repository_know_nothing_of_each_other(project: Any) -> None:
    for name in ("a", "b"):
        (project.root / name).mkdir()
        project.configure("build!")
        project.backlog("WRK-001 in_progress phase=build phase_pool=main", head=f"# of {name}\n")
        for file in ("BACKLOG.yaml", "orchestrator.toml"):
            (project.root / file).rename(project.root / name / file)
    (project.root / "lib").mkdir()
    (project.root / "lib/a.py").write_text("1\n")
    project.commit_all()
    (project.root / "lib/a.py").write_text("2\n")  # a dirty file of a sibling project is in nobody's way
    project.script({"*": [{"announce": True, "hang": True}, {"sh": "echo x > code.txt"}]})
    a, b = ("--root", str(project.root / "a")), ("--root", str(project.root / "b"))
    one = project.start(*a, "run")
    project.announced()
    busy = f"another run is at work here \\(run .* of {project.root}/a, pid {one.pid}, since "
    assert re.search(busy, project.run(*b, "run", code=1).stderr)
    project.run(*b, "add", "For B", "--commit")
    one.kill()
    one.wait()
    project.run(*b, "run", "--cap", "0")
    project.run(*a, "run")
    assert (project.root / "a/BACKLOG.yaml").read_text().startswith("# of a\nschema_version: 3\nitems: []\n")
    assert (project.root / "b/BACKLOG.yaml").read_text().startswith("# of b\n")
    assert "title: For B" in project.git("show", "HEAD:b/BACKLOG.yaml")
    assert project.git("show", "HEAD:a/code.txt") == "x\n"
    assert project.status() == " M lib/a.py\n"


@pytest.mark.slow
def test_a_merge_that_an_agent_leaves_open_ends_the_run(project: Any) -> None:
    act = "git switch -q other; git commit -q --allow-empty -m x; git switch -q main; git merge -q --no-commit --no-ff other; echo x > code.txt"
    project.set_up(BUILDING, "WRK-002 in_progress phase=build phase_pool=main", phases="build!", script={"*": [{"sh": act}]})
    project.git("branch", "other")
    project.git("commit", "-q", "--allow-empty", "-m", "Mine")
    command = f"import orchestrator as o; o.COMMIT_GIVE_UP_S = 0.0; raise SystemExit(o.main(['--root', {str(project.root)!r}, 'run']))"
    done = subprocess.run([sys.executable, "-c", command], cwd=project.program.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert "CircuitBreakerTripped" in done.stderr
    project.git("merge", "--abort")
    project.run("run", "--cap", "0")
    assert project.git("show", "HEAD:code.txt") == "x\n"


@pytest.mark.slow
@pytest.mark.parametrize("act", ["git stash -q; git stash pop -q", "git reset -q"])
def test_what_is_only_staged_outlasts_an_agent_that_writes_documents(project: Any, act: str) -> None:
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main")
    (project.root / "README.md").write_text("staged\n")
    project.git("add", "README.md")
    (project.root / "README.md").write_text("edited\n")
    project.script({"*": [{"sh": act, "document": "PLAN.md"}]})
    project.run("run", "--allow-dirty", "--cap", "1")
    assert project.status() == "MM README.md\n"
    assert project.git("show", ":README.md") == "staged\n"


@pytest.mark.slow
@pytest.mark.parametrize("item", [BUILDING, PLANNING])
def test_what_is_staged_outlasts_an_agent_that_rewinds_the_branch(project: Any, item: str) -> None:
    project.set_up(item, script={"*": [{"sh": "git reset -q HEAD~1"}]})
    (project.root / "README.md").write_text("staged\n")
    project.git("add", "README.md")
    assert "took commits off the branch" in project.run("run", "--allow-dirty", code=1).stderr
    assert project.git("show", ":README.md") == "staged\n"


@pytest.mark.slow
def test_what_a_phase_or_a_hook_left_is_no_reason_to_refuse_a_build(project: Any) -> None:
    """A document agent's stray is built on; a hook formats a file, does not add it, and a build goes on from that."""
    build = {"sh": "echo $ORCHESTRATOR_ITEM_ID >> README.md; echo $ORCHESTRATOR_ITEM_ID >> code.txt"}
    script = {"*/plan": [{"sh": "echo planned >> README.md"}], "*/build": [build]}
    project.set_up(PLANNING, "WRK-002 in_progress phase=build phase_pool=main", script=script, execution="max_retries = 0")
    project.hook("pre-commit", "echo formatted >> code.txt")
    first = project.run("run", "--target", "WRK-001")
    second = project.run("run")
    assert "the hooks changed files without adding them; not committed: code.txt" in first.stderr
    assert project.items() == {}
    assert project.git("show", "HEAD:README.md") == "A project\nplanned\nWRK-001\nWRK-002\n"
    assert project.git("show", "HEAD:code.txt") == "WRK-001\nformatted\nWRK-002\n"
    assert "is blocked" not in first.stderr + second.stderr
