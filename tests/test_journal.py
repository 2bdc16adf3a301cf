"""The journal: each line is a whole state, and the last one that was written to its end counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """As a run has it that began with "0" parked and has noted "1" and "2" since."""
    journal = Journal(tmp_path / "run.json", "run-1", "refs/heads/main")
    for digest in "012":
        note(journal, digest)
    return journal


def note(journal: Journal, digest: str) -> None:
    journal.parked = digest
    journal.write()


def noted(journal: Journal) -> list[str]:
    """Every state in the file, the oldest first; the last is the one that is read."""
    states = [json.loads(line)["parked"] for line in journal.path.read_text().splitlines()]
    read = Journal.read(journal.path)
    assert read is not None
    assert read.parked == states[-1]
    return states


def test_a_state_is_added_and_the_last_one_counts(journal: Journal) -> None:
    assert noted(journal) == ["0", "1", "2"]
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.ended = True
    journal.write()
    assert noted(journal) == ["2"]


def test_a_new_run_replaces_what_the_last_one_noted(journal: Journal) -> None:
    Journal(journal.path, "run-2", None).write()
    assert noted(journal) == [""]


def test_a_line_that_was_cut_off_does_not_count(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for length in range(begin, len(whole)):
        journal.path.write_bytes(whole[:length])
        read = Journal.read(journal.path)
        assert read is not None
        assert (read.parked, read.run_id, read.branch) == ("1", "run-1", "refs/heads/main")


@pytest.mark.parametrize("trouble", ["part", "gone", "long"])
def test_a_file_that_cannot_be_added_to_is_replaced(journal: Journal, trouble: str, monkeypatch: Any) -> None:
    if trouble == "part":  # the disk is full in the middle of a line
        with monkeypatch.context() as full:
            write = os.write
            full.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
            with pytest.raises(OSError, match="No space left"):
                note(journal, "3")
        read = Journal.read(journal.path)
        assert read is not None
        assert read.parked == "2"
    elif trouble == "gone":
        journal.path.unlink()
    else:
        monkeypatch.setattr(Journal, "LONG", journal.path.stat().st_size)
    note(journal, "4")
    assert noted(journal) == ["4"]
    monkeypatch.undo()
    note(journal, "5")
    assert noted(journal) == ["4", "5"]


@pytest.mark.parametrize("flush", [True, False])
def test_what_must_outlast_a_power_cut_is_flushed(journal: Journal, flush: bool, monkeypatch: Any) -> None:
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(journal.path.read_bytes()))
    journal.write(flush=flush)
    assert flushed == [journal.path.read_bytes()] * flush
