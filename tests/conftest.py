"""Hermetic surroundings for every test: own HOME, no global git configuration, no GIT_* variables."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

IDENTITY = {
    "GIT_AUTHOR_NAME": "Operator",
    "GIT_AUTHOR_EMAIL": "operator@example.invalid",
    "GIT_COMMITTER_NAME": "Operator",
    "GIT_COMMITTER_EMAIL": "operator@example.invalid",
}


@pytest.fixture(autouse=True)
def hermetic(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private HOME and a clean environment; returns the HOME."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("GIT_", "ORCHESTRATOR_", "CLAUDE")) and name != "ORCHESTRATOR_CORPUS":
            monkeypatch.delenv(name)
    for name, value in {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), **IDENTITY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("TZ", "UTC")
    return home


@pytest.fixture
def corpus() -> Path:
    """The folder of real backlog files and YAML cases, if this machine has it."""
    where = os.environ.get("ORCHESTRATOR_CORPUS")
    if not where:
        pytest.skip("ORCHESTRATOR_CORPUS is not set")
    return Path(where)


def sh(cwd: Path, *argv: str, check: bool = True) -> str:
    """Run a command of the test's own (mostly git) and return its standard output."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, errors="surrogateescape")
    if check and done.returncode:
        raise AssertionError(f"{argv} exited {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


@pytest.fixture
def make_repo(tmp_path: Path) -> Callable[..., Path]:
    """Make a git repository with one commit holding README.md; returns its path."""

    def make(name: str = "repo") -> Path:
        where = tmp_path / name
        where.mkdir(parents=True)
        sh(where, "git", "init", "-q", "-b", "main")
        (where / "README.md").write_text("A project\n")
        sh(where, "git", "add", "README.md")
        sh(where, "git", "commit", "-q", "-m", "Start")
        return where

    return make
