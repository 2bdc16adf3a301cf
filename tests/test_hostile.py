"""Agents that do to our state, the repository and our output what they should not."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

BLOCKED: dict[str, object] = {"result": "blocked", "summary": "needs a decision"}
BUILDING = "in_progress phase=build phase_pool=main"
RESULTS = "mkdir -p .orchestrator/results"

# What an agent does right after another command has saved an item, in one shell.
ACTS = {
    "nothing": ":",
    "stash": "git stash -uq",
    "stash and pop": "git stash -q; git stash pop -q",
    "checkout": "git checkout -q -- .",
    "checkout of the backlog": "git checkout -q HEAD -- BACKLOG.yaml",
    "reset": "git reset -q --hard",
    "clean": f"git clean -qfdx; {RESULTS}",
    "remove the work folder": f"rm -rf .orchestrator; {RESULTS}",
    "commit everything": "git commit -qam 'by the agent'",
    "add": "git add BACKLOG.yaml",
    "delete": "rm BACKLOG.yaml",
    "delete from the index": "git rm -q --cached BACKLOG.yaml",
    "edit the backlog": "echo '# by an agent' >> BACKLOG.yaml",
}


def command(project: Any, *words: str) -> str:
    """Shell text that runs the command itself, as an agent may."""
    argv = ["env", f"PYTHONPATH={project.program.parent}", sys.executable, "-m", project.program.stem, "--root", str(project.root)]
    return " ".join(f"'{word}'" for word in (*argv, *words))


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["blocked", "phase_complete"])
@pytest.mark.parametrize("half", [0, 1])
def test_what_an_agent_does_to_our_state_is_undone(project: Any, outcome: str, half: int) -> None:
    """An item that another command saved during the phase, and all decisions so far, survive."""
    acts = dict(list(ACTS.items())[half::2])
    ids = [f"WRK-{n:03}" for n in range(1, len(acts) + 1)]
    script = {
        f"{one}/build": [{
            "write": {f"{one}.txt": "code\n"},
            "sh": f"{command(project, 'add', f'Added while {one} was built')} > /dev/null; {act}; echo code > {one}.txt",
            "result": {"result": outcome, "summary": f"reason {one}", "follow_ups": [f"Follow-up of {one}"]},
        }]
        for one, act in zip(ids, acts.values(), strict=True)
    }
    project.set_up(*(f"{one} {BUILDING}" for one in ids), phases="build!", script=script, execution="max_wip = 99")
    project.git("commit", "-q", "--allow-empty", "-m", "There is something to go back to")
    process = project.start("run", *(word for one in ids for word in ("--target", one)), "--auto-advance")
    project.finish(process, 3 if outcome == "blocked" else 0)
    expected = [f"{start} {one}{end}" for one in ids for start, end in (("Added while", " was built"), ("Follow-up of", ""))]
    if outcome == "blocked":
        expected += [f"Item {one}" for one in ids]
        rows = project.items()
        assert {rows[one]["status"] for one in ids} == {"blocked"}
        for one in ids:
            assert rows[one]["blocked_reason"].startswith(f"reason {one}")
            assert not (project.root / f"{one}.txt").exists() or "by the agent" in project.git("log", "--format=%s", f"{one}.txt")
    else:
        assert [(project.root / f"{one}.txt").read_text() for one in ids] == ["code\n"] * len(ids)
        assert [s for s in reversed(project.subjects()) if s.startswith("[WRK")] == [f"[{one}][build] reason {one}" for one in ids]
    assert sorted(project.titles().values()) == sorted(expected)
    assert "There is something to go back to" in project.subjects()
    assert project.committed() == project.text()
    assert project.text().count("# by an agent") == ("edit the backlog" in acts)
    assert project.status() == ""


# ---- Results, logs and terminals -----------------------------------------------------------------

NASTY = "Bad\x1b[31mred\x1b]0;title\x07\x00\x9b2J\nsecond: line\u202e # not a comment"


def result(**keys: object) -> dict[str, object]:
    return {"phase": "plan", "result": "phase_complete", "summary": "planned", **keys}


@pytest.mark.slow
def test_hostile_result_files_fail_the_attempt_and_nothing_else(project: Any, tmp_path: Path) -> None:
    """What lies at the result path, by shell text, and what the block reason says about it."""
    good = json.dumps(result(item_id="@"))
    odd = ("summary", "context", "follow_ups", "duplicates", "description", "updated_assessments", "commit_summary", "requires_human_review", "block_type")
    files = {
        "nan": good[:-1] + ', "follow_ups": [NaN, Infinity, 1e999]}',
        "twice": good[:-1] + ', "item_id": "WRK-999"}',
        "outside": json.dumps(result(item_id="../../etc/passwd")),
        "types": json.dumps({**result(item_id="@"), **{key: [{"x": 1}] for key in odd}}),
    }
    (tmp_path / "files").mkdir()
    says = {"nan": "", "twice": "WRK-999", "outside": "expected", "types": ""}
    acts = {name: (f"cp '{tmp_path}/files/{name}' $R", words) for name, words in says.items()} | {
        "huge": ("truncate -s 50M $R", "was refused: it is no regular file of at most 5000000 bytes"), "link": ("ln -s /etc/passwd $R", "no regular file"),
        "dangling": ("ln -s nowhere $R", "no regular file"), "fifo": ("mkfifo $R", "no regular file"), "folder": ("mkdir $R", "no regular file"),
        "no folder": ("rm -rf .orchestrator/results", "no result file"), "elsewhere": ("ln -s /etc .orchestrator/x; rm -rf .orchestrator/results; ln -s /tmp .orchestrator/results", "no result file"),
        "log of 100 MB": ("head -c 100000000 /dev/zero; yes x | head -c 20000000 >&2", "no result file"),
    }
    ids = {name: f"WRK-{n:03}" for n, name in enumerate(acts, 1)}
    for name, data in files.items():
        (tmp_path / "files" / name).write_text(data.replace("@", ids[name]))
    script = {f"{ids[name]}/plan": [{"no_result": True, "sh": f"R=$ORCHESTRATOR_RESULT_PATH; {act}"}] for name, (act, _) in acts.items()}
    items = (f"{one} in_progress phase=plan phase_pool=main" for one in ids.values())
    project.set_up(*items, phases="plan", script=script, execution="max_retries = 0\ncircuit_breaker = 1000\nmax_wip = 100")
    process = project.start("run")
    log = project.finish(process)
    assert "Traceback" not in log
    rows = project.items()
    for name, (_, says) in acts.items():
        if says:
            assert rows[ids[name]]["blocked_reason"].startswith("plan failed after 1 attempt: "), name
            assert says in rows[ids[name]]["blocked_reason"], name
        else:
            assert ids[name] not in rows, name
    assert not (project.root / "../etc").exists()
    assert project.committed() == project.text()
    assert project.status() == ""


@pytest.mark.slow
def test_texts_of_agents_stay_texts_and_follow_ups_have_a_limit(project: Any) -> None:
    titles = [NASTY, "# no comment", "- no list", "key: value", "'", '"', "{", "&a *b !c", "../../escape", "x" * 5000, "---", "null", "2026-01-01"]
    many = [f"Follow-up number {n}" for n in range(3000)]
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main", "WRK-002 in_progress phase=plan phase_pool=main", phases="plan", script={
        "WRK-001/plan": [{"document": "p.md", "sh": "printf '\\033[2J\\000\\233mout\\n'; printf '\\033]0;x\\007err\\n' >&2", "result": {
            "result": "blocked", "summary": NASTY, "context": NASTY, "follow_ups": [*titles, *({"title": one, "context": NASTY} for one in many)], "commit_summary": NASTY}}],
        "WRK-002/plan": [{"document": "p.md", "exit": 1, "no_result": True, "sh": "printf '\\033[2J\\000\\233mout\\n'; printf '\\033]0;x\\007err\\n' >&2; git update-ref refs/heads/evil HEAD; false"}],
    }, execution="max_retries = 0\ncircuit_breaker = 9")
    done = project.run("run", "--target", "WRK-001", "--target", "WRK-002", "--auto-advance", "--cap", "2", code=3)
    outputs = [done.stdout, done.stderr]
    for words in (("status",), ("show", "WRK-001"), ("show", "WRK-002"), ("run", "--dry-run"), ("check",), ("status", "--json")):
        got = project.run(*words, code=None)
        outputs += [got.stdout, got.stderr]
    outputs.append(project.git("log", "--format=%B"))
    for text in outputs:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text), text[:2000]
    items = project.items()
    assert len(items) == 2 + 200
    assert "follow_ups are 3013: at most 200 are taken" in done.stderr
    got = [row["title"] for row in items.values()][2:]
    assert got[0] == "Badred second: line # not a comment"
    assert got[1:5] == titles[1:5]
    assert all("\n" not in title for title in got)
    assert project.committed() == project.text()
    assert sorted(path.name for path in (project.root / "changes").iterdir()) == ["WRK-001_item-wrk-001", "WRK-002_item-wrk-002"]
