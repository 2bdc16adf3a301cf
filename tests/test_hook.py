"""The optional pre-commit hook: it warns when BACKLOG.yaml is left dirty, never blocks, and its
installation touches nobody's hook. Real repositories and real commits."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from backlog import parse_yaml
from tests.conftest import sh

HERE = Path(__file__).resolve().parent.parent
HOOK = HERE / "hooks" / "pre-commit"
OURS = orchestrator.HOOK_TEXT.encode()
WARNING = (
    "warning: BACKLOG.yaml has changes that are not in this commit.\n"
    "         To commit them as well: git add ':/BACKLOG.yaml' && git commit --amend --no-edit\n"
)
RECORD = '#!/bin/sh\n{ echo "$# $1"; cat; } > "$(git rev-parse --show-toplevel)/../ran"\n'


def commit(root: Path, *argv: str) -> str:
    """Make a commit; what the hook said."""
    done = subprocess.run(["git", "commit", "-q", "-m", "Mine", *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def put(path: Path, text: str | bytes, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


@pytest.fixture
def root(make_repo: Callable[..., Path]) -> Path:
    """A repository whose backlog is clean; something else is staged."""
    root = make_repo()
    (root / "BACKLOG.yaml").write_text("schema_version: 3\nitems: []\n")
    sh(root, "git", "add", "-A")
    sh(root, "git", "commit", "-q", "-m", "Backlog")
    (root / "README.md").write_text("edited\n")
    sh(root, "git", "add", "README.md")
    return root


@pytest.fixture
def copied(root: Path) -> Path:
    """The same, with the hook copied by hand."""
    put(root / ".git/hooks/pre-commit", HOOK.read_bytes())
    return root


@pytest.fixture
def dirty(root: Path) -> Path:
    """The same, with a backlog that was edited, and no hook."""
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


EDIT = "echo two > BACKLOG.yaml"
STAGE = f"{EDIT}; git add BACKLOG.yaml"
CASES = [
    ("", (), False), (STAGE, (), False), (EDIT, (), True), (f"{STAGE}; echo three > BACKLOG.yaml", (), True),
    ("git rm -q --cached BACKLOG.yaml", (), True), ("rm BACKLOG.yaml", (), True),
    (EDIT, ("-a",), False), (EDIT, ("BACKLOG.yaml",), False), (EDIT, ("README.md",), True), (STAGE, ("README.md",), True),
]  # fmt: skip


def test_it_warns_when_the_backlog_has_changes_that_are_not_in_the_commit(copied: Path) -> None:
    start = sh(copied, "git", "rev-parse", "HEAD").strip()
    for change, argv, warns in CASES:
        sh(copied, "sh", "-ec", f"git reset -q --hard {start}; echo edited > README.md; git add README.md; {change}")
        assert commit(copied, *argv) == (WARNING if warns else ""), (change, argv)
        assert sh(copied, "git", "rev-parse", "HEAD").strip() != start


def test_it_looks_at_the_work_tree_of_the_commit_but_not_in_a_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "sub").mkdir()
    (copied / "BACKLOG.yaml").write_text("two\n")
    assert commit(copied / "sub") == WARNING
    linked = copied.parent / "linked"
    sh(copied, "git", "worktree", "add", "-q", "-b", "other", str(linked))
    assert commit(linked, "--allow-empty") == ""
    (linked / "BACKLOG.yaml").write_text("two\n")
    assert commit(linked, "--allow-empty") == WARNING
    with monkeypatch.context() as patch:
        patch.setenv("ORCHESTRATOR_RUN_ID", "20260101T000000-abc")
        assert commit(linked, "--allow-empty") == ""
    sh(linked, "git", "rm", "-q", "-f", "BACKLOG.yaml")
    assert commit(linked) == ""


@pytest.mark.parametrize("damage", ["none", "index", "no git"])
def test_it_never_blocks_and_changes_nothing(dirty: Path, damage: str) -> None:
    if damage == "index":
        (dirty / ".git" / "index").write_text("nonsense")
    index = (dirty / ".git" / "index").read_bytes()
    path = str(dirty / "empty") if damage == "no git" else "/usr/bin:/bin"
    done = subprocess.run(["/bin/sh", str(HOOK)], cwd=dirty, env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert damage != "none" or done.stderr == WARNING
    assert (dirty / ".git" / "index").read_bytes() == index


def test_the_file_is_plain_sh_and_that_of_the_program() -> None:
    assert HOOK.read_text() == orchestrator.HOOK_TEXT
    assert subprocess.run(["sh", "-n", str(HOOK)], capture_output=True).returncode == 0
    assert HOOK.stat().st_mode & 0o111 == 0o111


def test_as_an_entry_of_pre_commit_it_sees_what_that_hides(dirty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The framework stashes unstaged changes into a patch named for its process, then starts the entry."""
    (entry,) = parse_yaml((HERE / ".pre-commit-hooks.yaml").read_bytes())  # type: ignore[misc]
    assert (entry["language"], entry["pass_filenames"], entry["verbose"]) == ("script", False, True)
    patch = sh(dirty, "git", "diff", "--binary")
    sh(dirty, "git", "checkout", "-q", "BACKLOG.yaml")
    store = dirty.parent / "store"
    store.mkdir()
    monkeypatch.setenv("PRE_COMMIT", "1")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(store))
    for process, said in ((os.getpid() + 1, ""), (os.getpid(), WARNING)):
        (store / f"patch1700000000-{process}").write_text(patch)
        done = subprocess.run([HERE / entry["entry"]], cwd=dirty, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, said)


def test_install_and_uninstall_and_both_again(dirty: Path, hook: Callable[..., str]) -> None:
    folder = dirty / ".git/hooks"
    path = folder / "pre-commit"
    before = photograph(folder)
    assert hook("uninstall") == f"{path} is not this version's, and stays\n"
    assert hook("install") == f"installed {path}\n"
    assert photograph(folder) == {**before, "pre-commit": (0o100755, OURS)}
    assert commit(dirty) == WARNING
    path.chmod(0o644)  # a mode that was lost
    assert hook("install") == f"installed {path}\n"
    assert photograph(folder) == {**before, "pre-commit": (0o100755, OURS)}
    assert hook("uninstall") == f"removed {path}\n"
    assert photograph(folder) == before
    folder.rename(dirty / ".git/no-hooks")
    assert orchestrator.main(["--root", str(dirty), "init", "--no-commit", "--hook"]) == 0
    assert photograph(folder) == {"pre-commit": (0o100755, OURS)}


def test_the_backlog_of_a_project_below_the_top(root: Path, hook: Callable[..., str]) -> None:
    sub = root / "it's [sub]"
    sub.mkdir()
    sh(root, "git", "mv", "-k", "BACKLOG.yaml", str(sub))
    sh(root, "git", "commit", "-q", "-a", "-m", "Move")
    hook("install", root=sub)
    assert commit(root, "--allow-empty") == ""
    (sub / "BACKLOG.yaml").write_text("items: []\n")
    warning = "warning: it's [sub]/BACKLOG.yaml has changes that are not in this commit.\n"
    assert commit(root, "--allow-empty").startswith(warning)
    assert hook("uninstall", root=sub).startswith("removed ")


@pytest.mark.parametrize("kind", ["script", "link", "dangling link", "changed by hand", "of another version"])
def test_another_hook_stays_and_the_line_to_add_is_printed(dirty: Path, hook: Callable[..., str], kind: str) -> None:
    folder = dirty / ".git/hooks"
    path = folder / "pre-commit"
    texts = {
        "script": RECORD.encode(),
        "changed by hand": OURS.replace(b"exit 0", b"exit 1"),
        "of another version": b"#!/bin/sh\n# orchestrator-hook: 1\nexit 0\n",
    }
    if kind in texts:
        put(path, texts[kind])
    else:
        path.symlink_to("../shared")
    if kind == "link":
        put(dirty / ".git/shared", RECORD)
    before = photograph(folder)
    said = hook("install", code=1)
    assert said.startswith(f"orchestrator: {path} is another hook, or ours of another version, and stays as it is. Remove it, or add this line to it:\n")
    assert hook("uninstall") == f"{path} is not this version's, and stays\n"
    assert photograph(folder) == before
    path.unlink()
    put(path, "#!/bin/sh\n" + said.splitlines()[1] + "\n")
    assert commit(dirty) == "BACKLOG.yaml has changes that are not in this commit\n"


def test_where_it_cannot_be_installed(dirty: Path, hook: Callable[..., str]) -> None:
    (dirty / ".git/hooks/.pre-commit.tmp").mkdir()  # where it would be written first
    assert "Is a directory" in hook("install", code=1)
    assert not (dirty / ".git/hooks/pre-commit").exists()
    sh(dirty, "git", "config", "core.hooksPath", "/dev/null")
    assert hook("install", code=1) == "orchestrator: /dev/null is no folder: core.hooksPath switches hooks off\n"


@pytest.mark.parametrize("scope", ["local", "global"])
def test_core_hooks_path_is_heeded(dirty: Path, hook: Callable[..., str], scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("HOME", str(tmp_path))
    where, value = {"local": (dirty / "tools/hooks", "tools/hooks"), "global": (tmp_path / "hooks", "~/hooks")}[scope]
    sh(dirty, "git", "config", f"--{scope}", "core.hooksPath", value)
    assert hook("install") == f"installed {where.resolve()}/pre-commit\n"
    assert photograph(where) == {"pre-commit": (0o100755, OURS)}
    assert commit(dirty) == WARNING
    hook("uninstall")
    assert photograph(where) == {}
