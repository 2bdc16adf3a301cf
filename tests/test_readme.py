"""README.md compared with the code: what it promises is what there is."""

import argparse
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from backlog import ITEM_TABLE, parse_filter, parse_yaml, read_item

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found is not None
    return found[1]


def between(mark: str) -> str:
    """The code block between two markers."""
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```\n<!-- /{mark} -->", README, re.S)
    assert found is not None
    return found[1]


def table(text: str) -> dict[str, list[str]]:
    """Rows of the first table by their first cell, the code marks taken off it."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows[1:]}


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {word for action in parser._actions for word in action.option_strings if word.startswith("--")} - {"--help"}


def paragraph_with(words: str) -> str:
    (found,) = (part for part in section("Commands").split("\n\n") if words in part)
    return found


PARSER = orchestrator.build_parser()
(SUB,) = (action for action in PARSER._actions if isinstance(action, argparse._SubParsersAction))
PARSERS: dict[str, argparse.ArgumentParser] = dict(SUB.choices)
GLOBAL = options(PARSER) - {"--version"}
EDITING = {name for name, parser in PARSERS.items() if "--commit" in options(parser)}


DOCUMENTED = {row.split()[0]: row for row in table(section("Commands"))}


def test_every_command_with_its_options_and_arguments_is_documented_and_the_other_way_round() -> None:
    assert list(DOCUMENTED) == list(PARSERS) == list(orchestrator.COMMANDS)
    assert "same options and shutdown as `run`" in table(section("Commands"))["triage"][0]
    assert options(PARSERS["triage"]) == options(PARSERS["run"])
    for name, parser in PARSERS.items():
        assert parser.format_help().startswith(f"usage: {PARSER.prog} {name} ")
        shown = set(re.findall(r"--[a-z][a-z-]*", DOCUMENTED[name]))
        if name in EDITING:  # said below the table, once for all
            shown.add("--commit")
        assert name == "triage" or shown == options(parser) - GLOBAL
        for action in parser._actions:
            if not action.option_strings:
                word = "|".join(action.choices) if action.choices else str(action.metavar or action.dest).upper()
                word = word.replace("|", "\\|")
                assert (f"[{word}]" if action.nargs == "?" else word) in DOCUMENTED[name]


@pytest.mark.parametrize("name", ["status", "run", "log"])
def test_the_keys_of_json_are_those_of_its_form(name: str) -> None:
    said = re.search(rf"^\* `{name}`: (.*?)(?=^\* |^$)", section("Commands"), re.M | re.S)
    assert said
    named = set(re.findall(r"`([a-z_]+)`", said[1]))
    assert named
    assert named <= set(re.findall(r"\w+", orchestrator.JSON_FORMS[name]))


def test_every_global_option_and_who_can_commit_is_documented() -> None:
    paragraph = paragraph_with("before or after the command")
    assert set(re.findall(r"--[a-z][a-z-]*", paragraph)) - {"--commit", "--version"} == GLOBAL
    for name, parser in PARSERS.items():
        assert options(parser) >= GLOBAL, f"{name} does not take all of them after it"
    said = paragraph_with("take `--commit`").replace("\n", " ").partition("take `--commit`")[0].rpartition(". ")[2]
    assert set(re.findall(r"`([a-z]+)`", said)) == EDITING


def test_the_keys_of_filters_are_those_that_filters_have() -> None:
    keys = re.findall(r"`([a-z_]+)`", paragraph_with("matches items by"))
    assert len(keys) == 10
    values = {"status": "new", "size": "small", "priority": "1"}
    for key in keys:
        parse_filter(f"{key}={values.get(key, 'low')}")
    with pytest.raises(orchestrator.BacklogError) as caught:
        parse_filter("nonsense=1")
    assert set(re.findall(r"[a-z_]+", str(caught.value).partition("Supported: ")[2])) == set(keys)


def test_the_reasons_and_exit_codes_are_those_of_the_code() -> None:
    rows = table(section("Why a run ends, and its exit code"))
    assert list(rows) == [*(str(reason) for reason in orchestrator.HaltReason), "an error", "usage"]
    code = orchestrator.exit_code
    for reason in orchestrator.HaltReason:
        said = [int(number) for number in re.findall(r"\b\d+\b", rows[str(reason)][1])]
        possible = {
            code(reason, signal, completed, blocked)
            for signal in ((2, 15, 1, None) if reason == "ShutdownRequested" else (None,))
            for completed in ((), ("WRK-001",))
            for blocked in ((), ("WRK-002",))
        }
        assert set(said) == possible, reason
    assert code(None, None, (), ()) == orchestrator.EXIT_ERROR == int(rows["an error"][1])
    assert int(rows["usage"][1]) == orchestrator.EXIT_USAGE


def test_the_config_block_is_what_init_writes_with_every_key_at_its_default() -> None:
    text = between("config")
    assert text == orchestrator.config_template("WRK", "claude")
    base = Path("/nowhere")
    assert orchestrator.parse_config(text.encode(), "x", base) == orchestrator.default_config(base)._replace(source="x")
    for name, keys in orchestrator.CONFIG_KEYS.items():
        part = text.partition("may also have\n" if name == "phase" else f"[{name}]\n")[2]
        part = re.split(r"\n\n|\n\[", part)[0]
        shown = re.findall(r"^(?:#   |# )?([a-z_]+) = ", part, re.M)
        assert shown == [key.name or field for field, key in keys.items()], name
    assert set(tomllib.loads(text)) == {"project", "guardrails", "execution", "agent", "commits", "notify", "pipelines"}


def test_the_test_command_is_what_ci_runs() -> None:
    command = between("test").strip()
    ci = (HERE / ".ci" / "run").read_text()
    assert "\n" not in command
    assert "<!-- test -->" in ci
    assert 'eval "$command"' in ci
    assert command not in ci  # it is read from the README, not repeated
    assert "pytest" in command
    assert '".[test]"' in command


def blocks(*languages: str) -> str:
    return "\n".join(re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", README, re.M | re.S))


def test_the_commands_to_copy_exist() -> None:
    """Every line of a block that calls the tool names a real command with real options."""
    calls = re.findall(r"orchestrator\.py (.+?)(?: (?:>|\|\||&&).*)?$", blocks("sh", "text", "ini"), re.M)
    names = {PARSER.parse_args(shlex.split(call)).command for call in calls}
    assert names >= {"demo", "init", "add", "run", "vendor"}
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S):  # and all are plain sh
        done = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_agents_of_recipes_are_valid_config() -> None:
    for block in re.findall(r"^```toml\n(.*?)^```", section("Recipes"), re.M | re.S):
        assert orchestrator.parse_config(block.encode(), "x", Path("/nowhere")).agent.command


def test_symptoms_are_quoted_as_they_are_printed() -> None:
    code = "".join((HERE / f"{name}.py").read_text() for name in ("gitutil", "backlog", "orchestrator"))
    code = re.sub(r'"\s+f?"', "", code)
    quoted = re.findall(r"^\| `([^`]+)`", section("Trouble"), re.M)
    assert len(quoted) > 5
    for symptom in set(quoted) - {"BACKLOG.yaml:12:3: …"}:
        for part in symptom.split("…"):
            assert part in code


def test_every_link_within_the_page_leads_somewhere() -> None:
    titles = re.findall(r"^##+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_names_are_the_real_ones() -> None:
    text = section("Files")
    assert {orchestrator.CONFIG_NAME, "BACKLOG.yaml"} <= set(table(text))
    for folder in (orchestrator.WORK_DIR, orchestrator.CHANGES_DIR, orchestrator.IDEAS_DIR, orchestrator.WORKLOG_DIR):
        assert f"`{folder}/" in text
    (entry,) = parse_yaml((HERE / ".pre-commit-hooks.yaml").read_bytes())  # type: ignore[misc]
    assert f"`{entry['id']}`" in section("The git hook")
    assert "[orchestrator] Save backlog state on halt (CapReached)" in README


def test_versions_agree() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    assert project["version"] == orchestrator.__version__
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11+" in README
    assert f"## {orchestrator.__version__}" in (HERE / "CHANGELOG.md").read_text()


def test_the_sample_item_has_every_key_that_a_person_may_set() -> None:
    (sample,) = re.findall(r"^```yaml\n(.*?)^```", section("Items"), re.M | re.S)
    rows: Any = parse_yaml(f"items:\n{sample}".encode())
    item, problems = read_item(rows["items"][0])
    assert {key for key, _ in problems} == {"id", "status", "created", "updated"}  # a run completes them
    assert item.keys() == {key for key, row in ITEM_TABLE.items() if row.owner == "person"}
