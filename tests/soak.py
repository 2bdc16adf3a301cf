"""A soak: real runs with hostile agents, kills, commands and editors at once; then a judge looks for losses.

    python tests/soak.py --seconds 180 --seed 7 [--keep]

Everything happens in a temporary repository. What was promised is recorded outside of it: what each
command that exited 0 did, what each accepted edit set, what each agent was started for. At the end
comes one tame run, and the record is held against what is there. Exit code 1: something was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from backlog import parse_yaml  # noqa: E402

CONFIG = """
[project]
protected_branches = []
[execution]
max_wip = 3
max_concurrent = 3
max_retries = 1
retry_delay_seconds = 0
kill_grace_seconds = 1
circuit_breaker = 1000
[guardrails]
max_size = "large"
max_complexity = "high"
max_risk = "high"
[[pipelines.feature.phases]]
name = "prd"
[[pipelines.feature.phases]]
name = "build"
is_destructive = true
[[pipelines.feature.phases]]
name = "review"
[agent]
cli = "command"
"""

# Each act is a line of shell, done in the work tree beside two other agents; one that fails is none.
# None commits what the operator has staged: that would be kept, but no longer be the operator's.
ACTS = {
    "stash": "git stash -q",
    "stash all": "git stash -q --include-untracked",
    "pop": "git stash pop -q",
    "stash and pop": "git stash -q; sleep 0.2; git stash pop -q",
    "reset": "git reset -q --hard",
    "rewind": "git reset -q --hard HEAD~$((1 + N % 3))",
    "clean": "git clean -fdq",
    "old version": "git checkout -q HEAD~$((1 + N % 8)) -- BACKLOG.yaml",
    "old version, committed": "git checkout -q HEAD~$((1 + N % 8)) -- BACKLOG.yaml && git commit -qm agent BACKLOG.yaml",
    "old version, kept out of the index": "git show HEAD~$((1 + N % 8)):BACKLOG.yaml > BACKLOG.yaml",
    "commit": "echo $N > agent-$N.txt; git add agent-$N.txt; git commit -qm agent agent-$N.txt",
    "commit ours": "git commit -qm agent BACKLOG.yaml",
    "amend": "git commit -q --amend --only -m amended",
    "branch": "git switch -qc side-$N; sleep 0.1; git commit -q --allow-empty --only -m side; git switch -q main",
    "branch alone": "git branch side-$N",
    "empty": ": > BACKLOG.yaml",
    "cut": "head -c $((N % 900)) BACKLOG.yaml > cut-$N; mv cut-$N BACKLOG.yaml",
    "junk": "echo 'not: [a backlog' > BACKLOG.yaml",
    "markers": "{ echo '<<<<<<< Updated upstream'; cat BACKLOG.yaml; echo '>>>>>>> Stashed changes'; } > cut-$N; mv cut-$N BACKLOG.yaml",
    "delete": "rm BACKLOG.yaml",
}

AGENT = r"""
import json, os, random, subprocess, sys, time
here = os.path.dirname(os.path.abspath(__file__))
env = os.environ
item, phase, attempt = (env["ORCHESTRATOR_" + name] for name in ("ITEM_ID", "PHASE", "ATTEMPT"))
sys.stdin.read()
dice = random.Random(os.urandom(8))

def say(what, **more):
    row = {"at": time.time(), "what": what, "item": item, "phase": phase, "attempt": attempt, **more}
    with open(here + "/agents.jsonl", "a") as record:
        record.write(json.dumps(row) + "\n")

say("start")
with open(here + "/acts.json") as file:
    acts = json.load(file)
def act():
    if acts and dice.random() < 0.35:
        name = dice.choice(sorted(acts))
        say("act", act=name)
        subprocess.run(["sh", "-c", acts[name]], env={**env, "N": str(dice.randrange(100000))}, capture_output=True)

act()
time.sleep(dice.random() * 0.6 * bool(acts))
code = "code-%s.txt" % item if phase == "build" else env["ORCHESTRATOR_CHANGE_DIR"] + "/" + phase + ".md"
os.makedirs(os.path.dirname(code) or ".", exist_ok=True)
with open(code, "a") as file:
    file.write(f"{item} {phase} {time.time()}\n")
act()
kind = "phase_complete"
if acts:
    kind = dice.choices(["phase_complete", "failed", "blocked", "none"], [85, 5, 6, 4])[0]
result = {"item_id": item, "phase": phase, "result": kind, "summary": f"{phase} of {item}"}
if phase == "triage":
    result["updated_assessments"] = {"size": "small", "complexity": "low", "risk": "low", "impact": "low"}
if kind != "none":
    os.makedirs(os.path.dirname(env["ORCHESTRATOR_RESULT_PATH"]), exist_ok=True)
    with open(env["ORCHESTRATOR_RESULT_PATH"], "w") as file:
        json.dump(result, file)
    say("result", result=kind)
"""

DECOYS = {"staged.decoy": "staged\n", "modified.decoy": "modified\n", "untracked.decoy": "untracked\n"}
ITEM = "- id: {0}\n  title: First of {0}\n  status: ready\n  created: 2026-01-01T00:00:00+00:00\n  updated: 2026-01-01T00:00:00+00:00\n"
STALE = 0.4  # how many of the edits are made in a buffer that was loaded long ago
LAST_PHASE = "review"
COMPLETED = re.compile(r"\[(\w+-\d+)\]\[(\w+)\] (?!Blocked: |Failed: |Interrupted: |Salvaged )")  # in the subject of a commit of ours


class Soak:
    """The repository, the record, and everybody who works on it."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.dice = random.Random(seed)
        self.end = time.monotonic() + seconds
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        self.root, self.outside = self.folder / "repo", self.folder / "outside"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "ORCHESTRATOR_", "CLAUDE"))}
        who = {f"GIT_{role}_{key}": "soak" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        self.env |= {**who, "HOME": str(self.outside), "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        self.env["PYTHONPATH"] = str(self.outside)
        self.over = threading.Event()
        # The record.
        self.added: dict[str, str] = {}  # id → title, of every `add` that exited 0
        self.closed: dict[str, float] = {}
        self.perhaps_closed: set[str] = set()  # without a journal: an old buffer may bring it back
        self.titles: dict[str, list[tuple[str, bool]]] = {}  # by item: title, was it seen to be taken
        self.tags: dict[str, set[str]] = {}
        self.comments: set[str] = set()  # seen to be taken
        self.unseen: set[str] = set()  # those that were not; one may come late, out of a stash, with its head
        self.endings: Counter[str] = Counter()
        self.helped: Counter[str] = Counter()  # manual help for causes that are known
        self.losses: list[str] = []
        self.log: list[str] = []

    # ---- The repository ----

    def git(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(["git", *args], cwd=self.root, env=self.env, capture_output=True, text=True, errors="replace")
        if check and done.returncode:
            raise RuntimeError(f"git {args}: {done.stderr}")
        return done.stdout

    def prepare(self) -> None:
        self.root.mkdir()
        self.outside.mkdir()
        self.git("init", "-q", "-b", "main")
        for module in ("gitutil.py", "backlog.py", "orchestrator.py"):  # they may be edited meanwhile
            shutil.copy(HERE.parent / module, self.outside)
        (self.outside / "agent.py").write_text(AGENT)
        self.be_tame(False)
        command = json.dumps([sys.executable, "-E", "-S", str(self.outside / "agent.py")])
        (self.root / "orchestrator.toml").write_text(f"{CONFIG}command = {command}\n")
        ids = [f"WRK-{number:03}" for number in range(1, 9)]
        items = "".join(ITEM.format(item_id) for item_id in ids)
        (self.root / "BACKLOG.yaml").write_text(f"# ours\nschema_version: 3\nitems:\n{items}next_item_id: {len(ids)}\n")
        (self.root / "modified.decoy").write_text("committed\n")
        self.git("add", "-A")
        self.git("commit", "-qm", "Set up")
        for number in range(3):  # so that there is something to rewind to
            self.git("commit", "-q", "--allow-empty", "-m", f"before {number}")
        for name, text in DECOYS.items():
            (self.root / name).write_text(text)
        self.git("add", "staged.decoy")

    def be_tame(self, tame: bool) -> None:
        (self.outside / "acts.json").write_text(json.dumps({} if tame else ACTS))

    def start(self, *args: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "orchestrator", "--root", str(self.root), *args]
        return subprocess.Popen(
            argv, cwd=self.outside, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )

    def command(self, *args: str, seconds: float = 60) -> tuple[int, str, str]:
        """Exit code and output of a command; what must never be seen is noted as a loss."""
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            self.losses.append(f"{args} hangs:\n{out}{err}")
        self.note(f"{args} exited {process.returncode}", out + err)
        return process.returncode, out, err

    def note(self, what: str, output: str) -> None:
        self.log.append(f"==== {time.time():.2f} {what}\n{output}")
        early = "KeyboardInterrupt" in output and ", in main" not in output  # Python was starting
        if "Traceback (most recent" in output and not early:
            self.losses.append(f"{what}: a traceback:\n{output[-3000:]}")

    def items(self, text: str) -> dict[str, dict[str, Any]]:
        with suppress(ValueError, KeyError, TypeError):
            parsed: Any = parse_yaml(text.encode())
            return {row["id"]: row for row in parsed["items"]}
        return {}

    def now(self) -> dict[str, dict[str, Any]]:
        with suppress(OSError):
            return self.items((self.root / "BACKLOG.yaml").read_text(errors="replace"))
        return {}

    def agents(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return [json.loads(row) for row in (self.outside / "agents.jsonl").read_text().splitlines()]
        return []

    def survivors(self) -> Iterator[int]:
        mark = f"ORCHESTRATOR_PROMPT_FILE={self.root}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environ = (entry / "environ").read_bytes()
                if mark in environ and b"ORCHESTRATOR_RUN_ID=" in environ:
                    yield int(entry.name)

    # ---- Who works on it ----

    def run_again_and_again(self) -> None:
        refused = 0
        while not self.over.is_set():
            self.switch_back()
            before = len(self.agents())
            how, code, err = self.run_once()
            self.endings[how if code != 1 else "1"] += 1
            if code == 1 and how != "kill" and len(self.agents()) == before:
                refused = 0 if self.mend() else refused + 1
                if refused >= 3:
                    self.losses.append(f"no run starts any more:\n{err}")
                    return
            else:
                refused = 0
            if how != "kill" and (left := list(self.survivors())):
                self.losses.append(f"outlived their run: {left}")

    def run_once(self) -> tuple[str, int, str]:
        """One run that ends in some way; its exit code and log."""
        how = self.dice.choice(("kill", "kill", "term", "int", "stop", "cap", "cap", "all"))
        process = self.start("run", "--allow-dirty", "--cap", str(self.dice.randrange(2, 9) if how == "cap" else 100))
        outputs: list[str] = []
        reader = threading.Thread(target=lambda: outputs.extend(process.communicate()))
        reader.start()
        reader.join(self.dice.uniform(0.3, 9))
        if how == "stop" and "finishes the phases" in self.command("stop")[1]:
            pass  # else it has not taken its lock yet, or has ended
        elif how != "cap" or reader.is_alive():
            number = {"kill": signal.SIGKILL, "int": signal.SIGINT}.get(how, signal.SIGTERM)
            with suppress(ProcessLookupError):
                process.send_signal(number)
        reader.join(60)
        if reader.is_alive():
            process.kill()
            reader.join()
            self.losses.append(f"a run does not end ({how}):\n{''.join(outputs)[-3000:]}")
        self.note(f"run ({how}) exited {process.returncode}", "".join(outputs))
        return how, process.returncode, outputs[1]

    def switch_back(self) -> None:
        if self.git("symbolic-ref", "-q", "HEAD", check=False).strip() != "refs/heads/main":
            self.git("symbolic-ref", "HEAD", "refs/heads/main")
            self.helped["an agent was killed on another branch"] += 1

    def mend(self) -> bool:
        """Take away locks that agents' git commands left as they were killed: operators are told to."""
        locks = [path for path in (self.root / ".git").rglob("*.lock") if path.parent.name != "orchestrator"]
        for lock in locks:
            lock.unlink(missing_ok=True)
            self.helped["a killed git command left a lock"] += 1
        unmerged = self.git("diff", "--name-only", "--diff-filter=U").split("\n")[:-1]
        if unmerged:
            self.git("checkout", "-q", "HEAD", "--", *unmerged)
            self.helped["an agent's stash pop left conflicts"] += 1
        return bool(locks or unmerged)

    def give_commands(self) -> None:
        number = 0
        while not self.over.wait(self.dice.uniform(0.1, 1.5)):
            items, kept = self.now(), self.is_kept()
            ids = sorted(filter(None, items)) or ["WRK-001"]  # one that an editor has just added has none yet
            item_id, number = self.dice.choice(ids), number + 1
            kind = self.dice.choice(("add", "add", "unblock", "unblock", "close", "advance"))
            if kind == "add":
                title = f"Added {number}"
                code, out, _ = self.command("add", title, *(["--commit"] if number % 5 == 0 else []))
                if code == 0:
                    self.record_addition(out, title, kept)
            elif kind == "close" and len(ids) > 4 and self.dice.random() < 0.4:
                if self.command("close", item_id, "--reason", "not wanted")[0] == 0:
                    self.perhaps_closed.add(item_id)
                    if kept and self.is_kept():
                        self.closed[item_id] = time.time()
            elif kind == "unblock":
                blocked = [one for one in ids if items.get(one, {}).get("status") == "blocked"]
                if blocked:
                    self.command("unblock", self.dice.choice(blocked), "--notes", f"note {number}")
            elif kind == "advance" and items.get(item_id, {}).get("phase") == "prd":
                self.command("advance", item_id)

    def is_kept(self) -> bool:
        """Whether a journal is there; what is only in the file, an editor's old buffer takes away."""
        return (self.root / ".git/orchestrator/journal").exists()

    def record_addition(self, out: str, title: str, kept: bool) -> None:
        found = re.search(r"Added (\w+-\d+)", out)
        if found and not (kept and self.is_kept()):
            return
        if not found:
            self.losses.append(f"`add` exited 0 and said {out!r}")
        elif found[1] in self.added:
            self.losses.append(f"{found[1]} was handed out twice: {self.added[found[1]]!r}, {title!r}")
        else:
            self.added[found[1]] = title

    def edit_by_hand(self) -> None:
        """An edit counts once a command that came after it shows it; until then a reset may take it away."""
        number = 0
        path = self.root / "BACKLOG.yaml"
        while not self.over.wait(self.dice.uniform(0.1, 1)):
            number += 1
            with suppress(OSError):
                text = path.read_text()
                items = self.items(text)
                if not items or "next_item_id" not in text:  # a wreck, as anybody sees
                    continue
                item_id = self.dice.choice(sorted(items))
                stale = self.dice.random() < STALE
                kind = self.dice.choice(("title", "tags") if stale else ("title", "tags", "comment"))
                if stale and self.over.wait(self.dice.uniform(0.5, 8)):
                    return
                if kind == "comment":  # above the items; in an old copy of them those made since are not seen
                    self.comments = {comment for comment in self.comments if comment in text}
                if edited := self.edited(text, item_id, kind, f"{number}"):
                    self.save(path, edited)
                    self.accept(item_id, kind, f"{number}")

    def edited(self, text: str, item_id: str, kind: str, mark: str) -> str:
        if kind == "comment":
            return text.replace("items:\n", f"# comment {mark}.\nitems:\n", 1)
        title = re.compile(rf"(?m)^(- id: {item_id}\n(?:(?:  |#).*\n)*?  title: ).*\n")
        if kind == "title":
            return title.sub(rf"\g<1>Title {mark}\n", text) if title.search(text) else ""
        if re.search(rf"(?m)^- id: {item_id}\n(?:(?:  |#).*\n)*?  tags:\n", text):
            return re.sub(rf"(?m)^(- id: {item_id}\n(?:(?:  |#).*\n)*?  tags:\n)", rf"\1  - tag-{mark}\n", text)
        return title.sub(lambda found: f"{found[0]}  tags:\n  - tag-{mark}\n", text) if title.search(text) else ""

    def save(self, path: Path, text: str) -> None:
        if self.dice.random() < 0.5:
            path.write_text(text)
        else:
            new = path.with_name("BACKLOG.yaml~")
            new.write_text(text)
            new.rename(path)

    def accept(self, item_id: str, kind: str, mark: str) -> None:
        if kind == "title":
            self.titles.setdefault(item_id, []).append((f"Title {mark}", False))
        elif kind == "comment":
            self.unseen.add(f"# comment {mark}.\n")
        if self.over.is_set():
            return
        kept = self.is_kept()
        code, out, _ = self.command("add", f"After edit {mark}", seconds=60)
        if code == 0:
            self.record_addition(out, f"After edit {mark}", kept)
        text = ""
        with suppress(OSError):
            text = (self.root / "BACKLOG.yaml").read_text(errors="replace")
        item = self.items(text).get(item_id)
        if code or item is None or f"After edit {mark}" not in text or not (kept and self.is_kept()):
            return  # not to be told: taken away before anybody looked, or the file is a wreck
        if kind == "title" and item["title"] == f"Title {mark}":
            self.titles[item_id][-1] = (f"Title {mark}", True)
        elif kind == "tags" and f"tag-{mark}" in (item.get("tags") or ()):
            self.tags.setdefault(item_id, set()).add(f"tag-{mark}")
        elif kind == "comment" and f"# comment {mark}.\n" in text:
            self.comments.add(f"# comment {mark}.\n")
            self.unseen.discard(f"# comment {mark}.\n")

    # ---- The judge ----

    def last_run(self) -> None:
        """Nobody else is at work, the agents are tame: this has to end well without any help."""
        self.be_tame(True)
        code, err = 1, ""
        self.switch_back()
        for _ in range(2):  # a first one may have to be helped for what an agent left
            code, _, err = self.command("run", "--allow-dirty", "--cap", "1000", seconds=600)
            # By an agent that was killed: said once.
            rewound = "took commits off the branch" in err or "switched from" in err
            self.helped["a start told of a rewound branch"] += rewound
            if code != 1 or not (rewound or self.mend()):
                break
        if code not in (0, 3):
            self.losses.append(f"the last run exited {code}:\n{err}")

    def judge(self) -> None:
        disk = (self.root / "BACKLOG.yaml").read_text(errors="replace")
        if self.git("show", "HEAD:BACKLOG.yaml", check=False) != disk:
            self.losses.append("HEAD does not hold what BACKLOG.yaml on disk holds")
        there = self.items(disk)
        history = self.completed()
        done = {item_id for item_id, phase in history if phase == LAST_PHASE}
        ended = done | self.perhaps_closed | self.told_of()
        for item_id in sorted(there.keys() & (self.closed.keys() | done)):
            self.losses.append(f"{item_id} is back: it was {'closed' if item_id in self.closed else 'finished'}")
        for item_id, title in self.added.items():
            if item_id not in there and item_id not in ended:
                self.losses.append(f"{item_id} is gone, which `add` made: {title!r}")
            elif item_id in there and item_id not in self.titles and there[item_id]["title"] != title:
                self.losses.append(f"{item_id} is another item: {there[item_id]['title']!r}, not {title!r}")
        self.judge_edits(there, disk)
        self.judge_costs(history)
        for name, text in DECOYS.items():
            if not (self.root / name).exists() or (self.root / name).read_text() != text:
                self.losses.append(f"{name} of the operator is lost")
        if left := list(self.survivors()):
            self.losses.append(f"processes are left: {left}")
        checked = subprocess.run(["git", "fsck", "--no-dangling", "--no-progress"], cwd=self.root, env=self.env, capture_output=True, text=True)
        if checked.returncode or re.search(r"missing|broken|error", checked.stdout + checked.stderr):
            self.losses.append(f"git fsck: {checked.stdout}{checked.stderr}")

    def judge_edits(self, there: dict[str, dict[str, Any]], text: str) -> None:
        for item_id, edits in self.titles.items():
            taken = [n for n, (_, was_taken) in enumerate(edits) if was_taken]
            if item_id not in there or not taken:
                continue
            # One that was not seen to be taken may have come late, out of a stash.
            allowed = {edits[taken[-1]][0], *(title for title, was_taken in edits if not was_taken)}
            if there[item_id]["title"] not in allowed:
                self.losses.append(f"{item_id}: the title is {there[item_id]['title']!r}, edited to {edits[taken[-1]][0]!r}")
        for item_id, tags in self.tags.items():
            if item_id in there and (lost := tags - set(there[item_id].get("tags") or ())):
                self.losses.append(f"{item_id}: tags are lost: {sorted(lost)}")
        if not any(comment in text for comment in self.unseen):
            self.losses += [f"lost: {comment.strip()}" for comment in sorted(self.comments) if comment not in text]

    def judge_costs(self, history: dict[tuple[str, str], float]) -> None:
        """Nothing is started again that a commit tells of; a commit has the time of its second."""
        for row in self.agents():
            committed = history.get((row["item"], row["phase"]))
            if row["what"] == "start" and committed is not None and row["at"] > committed + 1:
                self.losses.append(f"[{row['item']}][{row['phase']}] was paid for again {row['at'] - committed:.1f} s after its commit")

    def completed(self) -> dict[tuple[str, str], float]:
        """Item and phase of every commit of ours, also of those that agents rewound: when it was made."""
        found: dict[tuple[str, str], float] = {}
        for row in self.git("log", "--branches", "--reflog", "--format=%ct %s").splitlines():
            when, _, subject = row.partition(" ")
            for phase in COMPLETED.findall(subject):
                found[phase] = min(float(when), found.get(phase, float(when)))
        return found

    def told_of(self) -> set[str]:
        """Items that a worklog, on disk or in history, tells to have ended."""
        text = "".join(path.read_text() for path in (self.root / "_worklog").glob("*.md"))
        text += self.git("log", "--all", "--reflog", "-p", "--format=", "--", "_worklog")
        return set(re.findall(rf"(?m)^\+?## .*? — (\w+-\d+) .*\n\+?\n\+?- \*\*(?:Status:\*\* (?:Done|Closed)|Phase:\*\* {LAST_PHASE}\n\+?- \*\*Outcome:\*\* Complete)", text))

    # ---- All of it ----

    def work(self) -> None:
        workers = [threading.Thread(target=target) for target in (self.run_again_and_again, self.give_commands, self.edit_by_hand)]
        for worker in workers:
            worker.start()
        while time.monotonic() < self.end and all(worker.is_alive() for worker in workers):
            time.sleep(0.5)
        self.over.set()
        for worker in workers:
            worker.join()

    def report(self) -> str:
        acts = Counter(row["act"] for row in self.agents() if row["what"] == "act")
        starts = sum(row["what"] == "start" for row in self.agents())
        accepted = sum(taken for edits in self.titles.values() for _, taken in edits)
        lines = [
            f"{sum(self.endings.values())} runs {dict(self.endings)}, {starts} attempts, {sum(acts.values())} hostile acts",
            f"{len(self.added)} added, {len(self.closed)} closed, {accepted} titles,"
            f" {sum(map(len, self.tags.values()))} tags and {len(self.comments)} comments edited",
        ]
        lines += [f"helped {number} times: {why}" for why, number in self.helped.items() if number]
        lines += [f"LOST: {loss}" for loss in dict.fromkeys(self.losses)]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--keep", action="store_true", help="keep the folder also if nothing was lost")
    args = parser.parse_args()
    print(f"soak: seed {args.seed}, {args.seconds:g} seconds", flush=True)
    soak = Soak(args.seconds, args.seed)
    soak.prepare()
    try:
        soak.work()
        soak.last_run()
        soak.judge()
    finally:
        (soak.outside / "log.txt").write_text("\n".join(soak.log))
        for pid in soak.survivors():
            os.kill(pid, signal.SIGKILL)
    print(soak.report())
    if soak.losses or args.keep:
        print(f"the repository and the record: {soak.folder}")
    else:
        shutil.rmtree(soak.folder)
    return 1 if soak.losses else 0


if __name__ == "__main__":
    sys.exit(main())
