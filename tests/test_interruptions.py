"""Killed or stopped anywhere, the tool loses nothing that anybody has seen it decide.

A run is killed (SIGKILL) at its 1st, 2nd, 3rd … audit event, or gets the signals of a terminal during
its 1st, 2nd, 3rd … git call, save or agent. The outcome is then held against what was seen from
outside: the prompts and results that the agent noted, the commits there were, the lines that the
run had printed. The backlog file alone is no witness for itself.
"""

import faulthandler
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Any, NamedTuple

import pytest

from backlog import parse_yaml

# Sends the process group the signal that STRIKES has for the number of an event that MATCH is in;
# without STRIKES it lists the events. What would change nothing (a folder that is there) is none.
WATCH = """
import itertools
numbers = itertools.count(1)
def describe(event, args):
    if event == "subprocess.Popen":
        return " ".join(os.fsdecode(word) for word in args[1])
    if event in ("os.kill", "os.killpg") and args[0]:
        return str(args)
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return ""
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        return ""
    path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else ""
    needed = os.path.lexists(path) != (event == "os.mkdir") or event == "open"
    return path if needed and path.startswith(ROOT) else ""
def watch(event, args):
    said = describe(event, args)
    if said and MATCH in f"{event} {said}":
        number = STRIKES.get(next(numbers))
        if number:
            os.kill(0, number)
        if not STRIKES:
            with open(EVENTS, "a") as file:
                file.write(f"{event} {said}".replace("\\n", " ") + "\\n")
"""

# Stands before git in PATH: sends signals to the group of whoever calls it, as `calls` says.
GIT = r"""#!/bin/sh
here=${0%/*}
read -r n < "$here/calls.n"
n=$((n + 1))
echo $n > "$here/calls.n"
while read -r call number; do
    [ "$call" = $n ] && kill "-$number" "-$PPID"
done < "$here/calls"
PATH=${PATH#*:}
exec git "$@"
"""

# Notes each prompt as it gets it, and each result once it is written. At the attempt that `interrupt`
# names it sends signals to the group of the run; then it hangs, or finishes in spite of TERM.
AGENT = r"""#!/bin/sh
here=${0%/*}
say() { echo "$1 $ORCHESTRATOR_ITEM_ID $ORCHESTRATOR_PHASE $ORCHESTRATOR_ATTEMPT" >> "$here/seen"; }
cat > /dev/null
say prompt
attempt=$ORCHESTRATOR_ITEM_ID/$ORCHESTRATOR_PHASE/$ORCHESTRATOR_ATTEMPT
if [ -e "$here/interrupt" ]; then
    read -r where mode numbers < "$here/interrupt"
    if [ "$attempt" = "$where" ]; then
        rm "$here/interrupt"
        [ "$mode" = finish ] && trap '' TERM
        for number in $numbers; do kill "-$number" "-$PPID"; done
        [ "$mode" = hang ] && exec sleep 1000
    fi
fi
result=phase_complete summary="$ORCHESTRATOR_PHASE done" more=
case $attempt in
WRK-001/plan/*) echo plan > "$ORCHESTRATOR_CHANGE_DIR/plan.md"; more=', "follow_ups": ["Found on the way"]' ;;
WRK-001/build/1) echo spoilt > README.md; echo half > half.py; result=failed summary=cannot ;;
WRK-001/build/*) echo code > code.py; rm -f old.py ;;
WRK-002/triage/*) more=', "updated_assessments": {"size": "small", "complexity": "low", "risk": "high", "impact": "low"}' ;;
esac
printf '{"item_id": "%s", "phase": "%s", "result": "%s", "summary": "%s"%s}' "$ORCHESTRATOR_ITEM_ID" \
    "$ORCHESTRATOR_PHASE" "$result" "$summary" "$more" > "$ORCHESTRATOR_RESULT_PATH"
say result
"""


class Place(NamedTuple):
    """Where an item can be in this story, and what must be found once it is there."""

    where: str  # status, phase, failed attempts
    worklog: tuple[str, ...] = ()
    subject: str = ""  # of a commit
    adds: str = ""  # the title of a new item


STORY = {
    "WRK-001": (
        Place("ready"),
        Place("in_progress plan"),
        Place("in_progress build", ("plan Complete",), "[WRK-001][plan] plan done", "Found on the way"),
        Place("in_progress build 1"),
        Place("gone", ("build Complete", "Done "), "[WRK-001][build] build done"),
    ),
    "WRK-002": (Place("new"), Place("blocked", ("triage Complete", "triage Blocked"), "[WRK-002][triage] triage done")),
    "WRK-003": (Place("ready"), Place("blocked", ("promotion Blocked",), "[WRK-003][promotion] Blocked: the guardrails")),
}
END = {item_id: len(places) - 1 for item_id, places in STORY.items()}
ATTEMPTS = ("WRK-001/plan/1", "WRK-001/build/1", "WRK-001/build/2", "WRK-002/triage/1")
RUN = ("run", "--allow-dirty", "--only", f"id={','.join(STORY)}")
TITLES = {"Item WRK-001", "Item WRK-002", "Item WRK-003"}
SAID = {  # what the run prints or the agent notes → the place that the item in it has reached then
    r"(?P<id>\S+) is (?P<where>\w+(?:, \w+ next)?) now$": "{where}",
    r"(?P<id>\S+) is done: ": "gone",
    r"(?P<id>\S+) is blocked: ": "blocked",
    r"\[(?P<id>\S+)\]\[PLAN\] starts: ": "in_progress plan",
    r"\[(?P<id>\S+)\]\[BUILD\] starts: ": "in_progress build",
    r"\[(?P<id>\S+)\]\[BUILD\] attempt 1 of \d failed: ": "in_progress build 1",
    r"prompt (?P<id>\S+) plan 1$": "in_progress plan",
    r"prompt (?P<id>\S+) build 1$": "in_progress build",
    r"prompt (?P<id>\S+) build 2$": "in_progress build 1",
}
FINISHED = {  # the same for results, each of which a run that ends in order takes into account
    r"result (?P<id>WRK-001) plan 1$": "in_progress build",
    r"result (?P<id>WRK-001) build 1$": "in_progress build 1",
    r"result (?P<id>WRK-001) build 2$": "gone",
    r"result (?P<id>WRK-002) triage 1$": "blocked",
}
COMMIT = r"(?:committed|.*: commit) ([0-9a-f]{10})\b"
REF = r".* kept on (refs/\S+?)[:)]"
FOUND = r"WRK-001: new items from it: (\S+)"
STAGED = {"staged.txt": "mine\n", "mixed.txt": "once\n"}
UNSTAGED = {"mixed.txt": "twice\n", "notes.md": "more\n", "mine.txt": "untracked\n"}
OPERATORS = {"MM mixed.txt", " M notes.md", "A  staged.txt", "?? mine.txt"}
STATE = Path(".git/orchestrator")


# ---- The project, and a run that is struck -------------------------------------------------------

@pytest.fixture
def story(project: Any) -> Any:
    """A project for a run with every kind of phase, a retry, both blocks and an archive."""
    faulthandler.cancel_dump_traceback_later()  # a matrix takes minutes
    root = project.root
    project.configure(execution="max_wip = 3")
    config = (root / "orchestrator.toml").read_text()
    (root / "orchestrator.toml").write_text(re.sub(r"(?m)^command = .*", 'command = ["../outside/agent.sh"]', config))
    for name in ("old.py", "notes.md", "mixed.txt"):
        (root / name).write_text("committed\n")
    project.set_up("WRK-001 ready", "WRK-002 new", "WRK-003 ready size=large")
    for name, text in STAGED.items():
        (root / name).write_text(text)
    project.git("add", *STAGED)
    for name, text in UNSTAGED.items():
        (root / name).write_text(text)
    return project


def copy_of(story: Any, where: Path) -> Any:
    where.mkdir()
    shutil.copytree(story.root, where / "repo", symlinks=True)
    copy = type(story)(where / "repo", where / "outside")
    for name, text in (("agent.sh", AGENT), ("git", GIT)):
        (copy.outside / name).write_text(text)
        (copy.outside / name).chmod(0o755)
    return copy


class Blow(NamedTuple):
    """Signals to the process group of a run: at which audit events, git calls, or which attempt."""

    strikes: dict[int, int]  # number of the event or call → signal
    match: str = ""  # what the events have in their descriptions
    in_git: bool = False
    attempt: str = ""  # then all of `strikes` at once
    mode: str = ""  # of the agent

    def __str__(self) -> str:
        place = self.attempt or ("git call" if self.in_git else f"{self.match} event".strip())
        return f"{place} {self.strikes}{' ' * bool(self.mode)}{self.mode}"


def run_struck(project: Any, blow: Blow, *args: str) -> tuple[str, int]:
    """What a run printed until it ended of such a blow, or for a reason of its own; its exit code."""
    outside = project.outside
    if blow.attempt:
        (outside / "interrupt").write_text(f"{blow.attempt} {blow.mode} {' '.join(str(int(n)) for n in blow.strikes.values())}\n")
    elif blow.in_git:
        (outside / "calls").write_text("".join(f"{call} {int(number)}\n" for call, number in blow.strikes.items()))
        (outside / "calls.n").write_text("0\n")
        project.inject(f"os.environ['PATH'] = {f'{outside}:'!r} + os.environ['PATH']\ndef watch(event, args): pass")
    else:
        strikes = {number: int(one) for number, one in blow.strikes.items()}
        project.inject(
            f"ROOT, EVENTS = {str(project.root)!r}, {str(outside / 'events')!r}\n"
            f"MATCH, STRIKES = {blow.match!r}, {strikes!r}\n{WATCH}"
        )
    process = project.start(*args)
    _, err = process.communicate(timeout=60)
    project.inject("")
    return err, process.returncode


def noted(project: Any) -> list[str]:
    with suppress(FileNotFoundError):
        return list((project.outside / "seen").read_text().splitlines())
    return []


def at_work(project: Any) -> list[str]:
    """Processes that were started in the project, by us or by an agent."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(entry / "cwd").startswith(str(project.root)):
                found.append((entry / "cmdline").read_text())
    return found


# ---- What was seen, and what must hold then ------------------------------------------------------

class Seen(NamedTuple):
    """What the world knows of a run at the moment it ends."""

    lines: list[str]  # printed by it, and noted by the agent
    commits: list[str]
    committed: str  # BACKLOG.yaml in HEAD


def look(project: Any, printed: str) -> Seen:
    lines = [re.sub(r"^\S+ (warning: )?", "", line) for line in printed.splitlines()]
    return Seen([*lines, *noted(project)], project.git("rev-list", "HEAD").split(), project.committed())


def place(item_id: str, where: str) -> int:
    where = re.sub(r"(\w+), (\w+) next", r"\1 \2", where)
    found = [number for number, one in enumerate(STORY[item_id]) if one.where.startswith(where)]
    assert found, f"{item_id} is {where}"
    return found[0]


def places(text: str) -> dict[str, int]:
    """How far each item has come, by a backlog."""
    backlog: Any = parse_yaml(text.encode())
    found = dict.fromkeys(STORY, "gone")
    for row in backlog["items"]:
        if row["id"] in STORY:
            found[row["id"]] = " ".join(str(row[key]) for key in ("status", "phase", "attempts") if key in row)
    return {item_id: place(item_id, where) for item_id, where in found.items()}


def demanded(was: Seen, rules: dict[str, str]) -> dict[str, int]:
    """How far each item must have come: what was printed, prompted or committed is not taken back."""
    least = places(was.committed)
    for pattern, where in rules.items():
        for found in filter(None, (re.match(pattern, line) for line in was.lines)):
            if found["id"] in STORY:
                reached = place(found["id"], where.format(**found.groupdict()))
                least[found["id"]] = max(least[found["id"]], reached)
    return least


def check(project: Any, *witnesses: Seen, in_order: bool = False) -> dict[str, int]:
    """Everything that must hold once a run has ended, or the start after a kill; how far the items are."""
    assert project.committed() == project.text()
    assert set(project.status().splitlines()) == OPERATORS
    assert (project.survivors(), at_work(project)) == ([], [])
    assert project.git("for-each-ref", "refs/orchestrator/snapshots") == ""
    files = [path.relative_to(project.root) for path in project.root.rglob("*")]
    assert not [path for path in files if re.search(r"\.lock$|\.tmp$|/orchestrator-", str(path)) and path.parent != STATE]
    now = places(project.text())
    for was in witnesses:
        least = demanded(was, SAID | FINISHED if in_order else SAID)
        assert all(now[item_id] >= least[item_id] for item_id in STORY), (now, least, was.lines)
        check_lines(project, was)
    check_story(project, now)
    check_ids(project, witnesses)
    check_operators_files(project)
    check_prompts(project)
    return now


def check_lines(project: Any, was: Seen) -> None:
    """Commits, refs and new items that were spoken of are there."""
    commits = project.git("rev-list", "HEAD").split()
    assert set(was.commits) <= set(commits)
    refs = project.git("for-each-ref", "--format=%(refname)").split()
    titles = project.titles()
    for line in was.lines:
        if found := re.match(COMMIT, line):
            assert any(commit.startswith(found[1]) for commit in commits), line
        if found := re.match(REF, line):
            assert found[1] in refs, line
        if found := re.match(FOUND, line):
            assert titles[found[1]] == "Found on the way"


def check_story(project: Any, now: dict[str, int]) -> None:
    """State, worklog, commits, documents and new items tell the same story, each thing once."""
    passed = [(item_id, one) for item_id, last in now.items() for one in STORY[item_id][: last + 1]]
    text = "".join(path.read_text() for path in sorted((project.root / "_worklog").glob("*.md")))
    entries = re.findall(r"^## .*? — (\S+) .*\n\n- \*\*(?:Phase|Status):\*\* (\S+)(?:\n- \*\*Outcome:\*\* (.*))?", text, re.M)
    assert sorted(map(" ".join, entries)) == sorted(f"{item_id} {entry}" for item_id, one in passed for entry in one.worklog)
    subjects, told = project.subjects(), [one.subject for ones in STORY.values() for one in ones if one.subject]
    assert sorted(part for part in told for subject in subjects if part in subject) == sorted(one.subject for _, one in passed if one.subject)
    gone = {f"Item {item_id}" for item_id, one in passed if one.where == "gone"}
    there = TITLES - gone | {one.adds for _, one in passed if one.adds}
    assert sorted(project.titles().values()) == sorted(there)
    tree = set(project.git("ls-tree", "-r", "--name-only", "HEAD").split())
    assert ("code.py" in tree) == ("old.py" not in tree) == bool(gone)
    assert "half.py" not in tree
    if now["WRK-001"] >= place("WRK-001", "in_progress build"):
        assert "changes/WRK-001_item-wrk-001/plan.md" in tree
    assert (project.root / "README.md").read_text() == "A project\n"


def check_ids(project: Any, witnesses: Iterable[Seen]) -> None:
    """No id ever stood for two things, and the next one is new."""
    commits = project.git("rev-list", "HEAD", "--", "BACKLOG.yaml").split()
    states: list[Any] = [parse_yaml(project.git("show", f"{commit}:BACKLOG.yaml").encode()) for commit in commits]
    named: dict[str, str] = {}
    for row in (row for state in states for row in state["items"]):
        assert named.setdefault(row["id"], row["title"]) == row["title"]
    assert len(set(named.values())) == len(named)
    spoken = [item_id for was in witnesses for line in was.lines for item_id in re.findall(r"\bWRK-\d+", line)]
    assert states[0]["next_item_id"] >= max(int(item_id[4:]) for item_id in (*spoken, *named))


def check_operators_files(project: Any) -> None:
    assert {name: project.git("show", f":{name}") for name in STAGED} == STAGED
    files = {**STAGED, **UNSTAGED}
    assert {name: (project.root / name).read_text() for name in files} == files
    start = project.git("rev-list", "--max-parents=0", "HEAD").strip()
    assert project.git("log", "--format=%s", f"{start}..HEAD", "--", *files) == "Set up\n"


def check_prompts(project: Any) -> None:
    """No phase is asked for again once what followed from it was acted upon, nor an attempt charged."""
    lines = noted(project)
    for item_id in STORY:
        asked = [line.split()[2:] for line in lines if line.startswith(f"prompt {item_id} ")]
        order = [["triage", "plan", "build"].index(phase) * 10 + int(attempt) for phase, attempt in asked]
        assert order == sorted(order), asked
        assert {attempt for phase, attempt in asked if phase != "build"} <= {"1"}
        assert ["build", "2"] not in asked or "result WRK-001 build 1" in lines


# ---- The matrices --------------------------------------------------------------------------------

def at_all(story: Any, tmp_path: Path, jobs: Iterable[tuple[Callable[..., str], Any]]) -> Counter[str]:
    """Strike a copy of the project each, several at once; returns how often it came out how."""

    def one(number: int, strike: Callable[..., str], blow: Any) -> tuple[str, str]:
        where = tmp_path / str(number)
        project = copy_of(story, where)
        try:
            outcome = strike(project, blow), ""
        except AssertionError as error:
            return "lost", f"{blow}, see {where}: {error}"
        finally:
            project.end()
        shutil.rmtree(where)
        return outcome

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(one, *zip(*((n, *job) for n, job in enumerate(jobs)), strict=True)))
    wrong = "\n".join(told for _, told in outcomes if told)
    assert not wrong, wrong
    return Counter(what for what, _ in outcomes)


def go_on(project: Any, *args: str) -> None:
    """Run again. Some items wait for a human, so a run that finishes none exits with 3."""
    done = project.run(*RUN, *args, code=None)
    assert done.returncode in (0, 3), done.stderr


def killed(project: Any, blows: tuple[Blow, ...]) -> str:
    """Kill a run, maybe the start after it as well; all must be there after the next start.

    With the second kill goes a look at how the work is brought to its end.
    """
    was = []
    for blow, args in zip(blows, ((), ("--cap", "0")), strict=False):
        printed, code = run_struck(project, blow, *RUN, *args)
        assert code in (-SIGKILL, 0, 3), printed
        was.append(look(project, printed))
    go_on(project, "--cap", "0")
    check(project, *was)
    if len(blows) > 1:
        go_on(project)
        assert check(project, *was) == END
    return "recovered"


def stopped(project: Any, blow: Blow) -> str:
    """Signal a run; it ends in order at once, unless it was at its end, or before its beginning."""
    printed, code = run_struck(project, blow, *RUN)
    first = next(iter(blow.strikes.values()))
    was = look(project, printed)
    if "Halt: " not in printed:
        assert code in (-first, 128 + first), printed
        assert "Traceback" not in printed
        assert (project.subjects()[0], noted(project)) == ("Set up", [])
        return "not begun"
    now = check(project, was, in_order=True)
    if "(ShutdownRequested)" not in printed:
        assert (code, now) == (0, END), printed
        return "finished"
    assert code in [128 + number for number in blow.strikes.values()], printed  # at once: any
    result = f"result {blow.attempt.replace('/', ' ')}" in was.lines
    assert not (result and blow.mode == "hang")
    if blow.mode and len(blow.strikes) == 1:
        assert result == (blow.mode == "finish")
        go_on(project)
        assert check(project, was) == END
    return "stopped"


def events_of(story: Any, where: Path) -> list[str]:
    """The events of a run that nobody disturbs, which also shows that the checks hold then."""
    project = copy_of(story, where)
    printed, code = run_struck(project, Blow({}), *RUN)
    was = look(project, printed)
    assert (code, check(project, was, in_order=True)) == (0, END)
    for pattern in (*SAID, *FINISHED, COMMIT, REF, FOUND):  # none is blind
        assert any(re.match(pattern, line) for line in was.lines), pattern
    return [str(line) for line in (project.outside / "events").read_text().splitlines()]


def signals(number: int) -> dict[int, int]:
    """All signals in turn, once or, with another one at the next opportunity, twice."""
    kinds = (SIGINT, SIGTERM, SIGHUP)
    first = {number: kinds[number % 3]}
    return {**first, number + 1: kinds[number // 6 % 3]} if number // 3 % 2 else first


def test_killed_at_a_few_events(story: Any, tmp_path: Path) -> None:
    """Where a destructive phase is committed, and in the start after it."""
    at_all(story, tmp_path, [(killed, [Blow({n: SIGKILL}) for n in (266, 20)])])


def spread(count: int, most: int) -> tuple[list[int], str]:
    """So many of the numbers up to `count`, spread over all of them from an offset that is told."""
    step = max(1.0, count / most)
    offset = random.uniform(0, step)
    return [int(offset + step * n) + 1 for n in range(min(count, most))], f"of {count}, from an offset of {offset:.2f},"


@pytest.mark.slow
def test_killed_all_over_a_run(story: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At events of each kind; at every tenth, the next start is killed as well."""
    numbers, told = spread(len(events_of(story, tmp_path / "whole")), 160)
    kills = [(n, 1 + n * 7 % 61) if place % 10 == 0 else (n,) for place, n in enumerate(numbers)]
    outcomes = at_all(story, tmp_path, [(killed, [Blow({n: SIGKILL}) for n in one]) for one in kills])
    with capsys.disabled():
        print(f"\nkilled at {outcomes['recovered']} events {told} lost 0")


@pytest.mark.slow
@pytest.mark.parametrize(("act", "event"), [("git call", "subprocess.Popen git"), ("rename", "os.rename")])
def test_stopped_during_every_act(story: Any, tmp_path: Path, act: str, event: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the start, in a save, between tasks, in the halt commit; git is hit while it is at work."""
    count = sum(one.startswith(event) for one in events_of(story, tmp_path / "whole"))
    numbers, told = spread(count, 80)
    blows = [Blow(signals(n), match=event, in_git=act == "git call") for n in numbers]
    outcomes = at_all(story, tmp_path, [(stopped, blow) for blow in blows])
    with capsys.disabled():
        print(f"\nsignalled during {len(blows)} {act}s {told} lost 0: {dict(outcomes)}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hang", "finish"])
def test_stopped_while_an_agent_works(story: Any, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In each kind of phase; it has its grace, and a result that is finished meanwhile counts."""
    pairs = [(SIGINT,), (SIGTERM,), (SIGHUP,), (SIGINT, SIGINT), (SIGTERM, SIGINT), (SIGHUP, SIGTERM)]
    blows = [Blow(dict(enumerate(numbers)), attempt=attempt, mode=mode) for attempt in ATTEMPTS for numbers in pairs]
    outcomes = at_all(story, tmp_path, [(stopped, blow) for blow in blows])
    assert outcomes == {"stopped": len(blows)}
    with capsys.disabled():
        print(f"\nsignalled during {len(blows)} attempts of agents that {mode}, lost 0")
