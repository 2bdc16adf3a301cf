"""`hook install|uninstall` on real repositories: nobody's hook is touched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from backlog import parse_yaml
from orchestrator import render_hook

HERE = Path(__file__).resolve().parent.parent
OURS = render_hook("BACKLOG.yaml")
WARNING = "warning: BACKLOG.yaml has changes that are not in this commit.\n"
RECORD = '#!/bin/sh\n{ echo "$# $1"; cat; } > "$(git rev-parse --show-toplevel)/../ran"\n'


def git(root: Path, *argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["git", *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def root(make_repo: Callable[..., Path]) -> Path:
    root = make_repo()
    (root / "BACKLOG.yaml").write_text("schema_version: 3\nitems: []\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Backlog")
    (root / "BACKLOG.yaml").write_text("schema_version: 3\nitems: []\n# edited\n")
    return root


@pytest.fixture
def hook(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `hook ACTION` and return what it says."""

    def call(*argv: str, code: int = 0, root: Path = root) -> str:
        assert orchestrator.main(["--root", str(root), "hook", *argv]) == code
        out, err = capsys.readouterr()
        assert bool(err) == bool(code)
        return out + err

    return call


def photograph(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Names, modes and contents of a folder of hooks; a link as what it points to."""
    return {
        path.name: (path.lstat().st_mode, os.readlink(path) if path.is_symlink() else path.read_bytes())
        for path in folder.glob("*")
        if not path.name.endswith(".sample")
    }


def put(path: Path, text: str | bytes, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def commit(root: Path, code: int = 0) -> str:
    return git(root, "commit", "-q", "--allow-empty", "-m", "Mine", code=code).stderr


# ---- Alone ---------------------------------------------------------------------------------------


def test_install_and_uninstall_and_both_again(root: Path, hook: Callable[..., str]) -> None:
    folder = root / ".git/hooks"
    path = folder / "pre-commit"
    before = photograph(folder)
    assert hook("uninstall") == f"nothing to do: {path} is not installed by us\n"
    assert hook("install") == f"installed {path}\n"
    assert photograph(folder) == {**before, "pre-commit": (0o100755, OURS)}
    assert commit(root).startswith(WARNING)
    assert hook("install") == f"nothing to do: {path} is installed\n"
    assert hook("uninstall") == f"removed {path}\n"
    assert photograph(folder) == before
    assert git(root, "status", "--porcelain").stdout == " M BACKLOG.yaml\n"


def test_init_installs_it_when_asked(make_repo: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = make_repo()
    assert orchestrator.main(["--root", str(root), "init", "--hook"]) == 0
    assert f"installed {root}/.git/hooks/pre-commit\n" in capsys.readouterr().out
    assert photograph(root / ".git/hooks")["pre-commit"] == (0o100755, OURS)


def test_the_backlog_of_a_project_below_the_top(root: Path, hook: Callable[..., str]) -> None:
    sub = root / "it's [sub]"
    sub.mkdir()
    git(root, "mv", "-k", "BACKLOG.yaml", str(sub))
    git(root, "commit", "-q", "-a", "-m", "Move")
    hook("install", root=sub)
    assert commit(root) == ""
    (sub / "BACKLOG.yaml").write_text("items: []\n")
    assert commit(root).startswith("warning: it's [sub]/BACKLOG.yaml has changes that are not in this commit.\n")


# ---- With a hook that is there already -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["script", "link", "dangling link", "ours, changed by hand"])
def test_another_hook_stays_and_the_line_to_add_is_printed(root: Path, hook: Callable[..., str], kind: str) -> None:
    folder = root / ".git/hooks"
    path = folder / "pre-commit"
    if "link" in kind:
        path.symlink_to("../shared")
        if kind == "link":
            put(root / ".git/shared", RECORD)
    else:
        put(path, RECORD if kind == "script" else OURS.replace(b"exit 0", b"exit 1"))
    before = photograph(folder)
    said = hook("install", code=1)
    assert said.startswith(f"orchestrator: {path} is another hook, or ours changed by hand, and stays as it is. Add this line to it:\n")
    uninstalled = hook("uninstall", code=1 if kind == "ours, changed by hand" else 0)
    assert ("changed by hand, so it is left alone" if "changed" in kind else "is not installed by us") in uninstalled
    assert photograph(folder) == before
    path.unlink()
    put(path, "#!/bin/sh\n" + said.splitlines()[1] + "\n")
    assert commit(root) == "BACKLOG.yaml has changes that are not in this commit\n"


def test_a_hook_that_cannot_be_written_is_an_error(root: Path, hook: Callable[..., str]) -> None:
    (root / ".git/hooks/.pre-commit.tmp").mkdir()  # where it would be written first
    assert "Is a directory" in hook("install", code=1)
    assert not (root / ".git/hooks/pre-commit").exists()


# ---- Our own, of other versions ------------------------------------------------------------------


def sealed(text: str) -> bytes:
    return orchestrator._seal_hook(text.encode())


@pytest.mark.parametrize(
    "older",
    [sealed("#!/bin/sh\n# orchestrator-hook: 1\nexit 0\n"), sealed("#!/bin/sh\n# orchestrator-hook: 99\n"), (HERE / "hooks/pre-commit").read_bytes()],
    ids=["older", "newer", "copied by hand"],
)
def test_another_version_of_ours_is_updated(root: Path, hook: Callable[..., str], older: bytes) -> None:
    path = put(root / ".git/hooks/pre-commit", older, 0o644)
    assert hook("install") == f"updated {path}\n"
    assert photograph(root / ".git/hooks") == {"pre-commit": (0o100755, OURS)}
    path.chmod(0o644)  # a mode that was lost
    assert hook("install") == f"updated {path}\n"
    assert commit(root).startswith(WARNING)
    put(path, older)
    assert hook("uninstall") == f"removed {path}\n"


@pytest.mark.parametrize("change", [(b"exit 0", b"exit 1"), (b"# orchestrator-hook: 3 ", b"# orchestrator-hook: 4 0"), (b"BACKLOG.yaml #", b"OTHER.yaml #")])
def test_ours_but_changed_by_hand_is_left_alone(root: Path, hook: Callable[..., str], change: tuple[bytes, bytes]) -> None:
    path = put(root / ".git/hooks/pre-commit", OURS.replace(*change, 1))
    before = photograph(root / ".git/hooks")
    assert before["pre-commit"][1] != OURS
    assert "is another hook, or ours changed by hand" in hook("install", code=1)
    assert hook("uninstall", code=1) == f"orchestrator: {path} is our hook, changed by hand, so it is left alone.\n"
    assert photograph(root / ".git/hooks") == before


def test_without_a_folder_of_hooks(root: Path, hook: Callable[..., str]) -> None:
    (root / ".git/hooks").rename(root / ".git/no-hooks")
    hook("install")
    assert commit(root).startswith(WARNING)


# ---- Where hooks are -----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global", "elsewhere"])
def test_core_hooks_path_is_heeded(
    root: Path, hook: Callable[..., str], scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    where, value = {
        "local": (root / "tools/hooks", "tools/hooks"),
        "global": (tmp_path / "hooks", "~/hooks"),
        "elsewhere": (tmp_path / "hooks", "../hooks"),
    }[scope]
    git(root, "config", "--global" if scope == "global" else "--local", "core.hooksPath", value)
    assert hook("install") == f"installed {where.resolve()}/pre-commit\n"
    assert photograph(where) == {"pre-commit": (0o100755, OURS)}
    assert [path for path in (root / ".git/hooks").iterdir() if path.suffix != ".sample"] == []
    assert commit(root).startswith(WARNING)
    hook("uninstall")
    assert photograph(where) == {}


def test_hooks_that_are_switched_off(root: Path, hook: Callable[..., str]) -> None:
    git(root, "config", "core.hooksPath", "/dev/null")
    assert hook("install", code=1) == "orchestrator: /dev/null is no folder: core.hooksPath switches hooks off\n"


def test_linked_work_trees_share_one_hook(root: Path, hook: Callable[..., str]) -> None:
    linked = root.parent / "linked"
    git(root, "worktree", "add", "-q", "-b", "other", str(linked))
    path = root / ".git/hooks/pre-commit"
    assert hook("install", root=linked) == f"installed {path}\n"
    assert commit(root).startswith(WARNING)
    assert commit(linked) == ""
    (linked / "BACKLOG.yaml").write_text("items: []\n")
    assert commit(linked).startswith(WARNING)
    assert hook("uninstall", root=linked) == f"removed {path}\n"


# ---- The pre-commit framework --------------------------------------------------------------------


def test_as_an_entry_of_pre_commit_it_sees_what_that_hides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stashes unstaged changes into a patch named for its process, then starts the entry."""
    (entry,) = parse_yaml((HERE / ".pre-commit-hooks.yaml").read_bytes())  # type: ignore[misc]
    assert (entry["language"], entry["pass_filenames"], entry["verbose"]) == ("script", False, True)
    patch = git(root, "diff", "--binary").stdout
    git(root, "checkout", "-q", "BACKLOG.yaml")
    store = root.parent / "store"
    store.mkdir()
    monkeypatch.setenv("PRE_COMMIT", "1")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(store))
    for process, said in ((os.getpid() + 1, ""), (os.getpid(), WARNING)):
        (store / f"patch1700000000-{process}").write_text(patch)
        done = subprocess.run([HERE / entry["entry"]], cwd=root, capture_output=True, text=True)
        assert (done.returncode, done.stderr.partition("         ")[0]) == (0, said)
