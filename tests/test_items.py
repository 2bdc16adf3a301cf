"""Reading a backlog, the rules of its items, ids, follow-ups, worklog."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import product
from pathlib import Path

import pytest

from backlog import (
    LEGAL_TRANSITIONS,
    STATUS_WORDS,
    Backlog,
    BacklogError,
    Draft,
    FollowUp,
    Item,
    State,
    YamlError,
    add_follow_ups,
    advance,
    append_worklog,
    block,
    normalise_title,
    timestamp,
    transition,
    unblock,
    worklog_entry,
)

START = datetime(2026, 2, 10, tzinfo=UTC)
NOW = datetime(2026, 2, 13, 17, 41, 26, 593891, tzinfo=UTC)
NOW_TEXT = "2026-02-13T17:41:26.593891+00:00"


def item(item_id: str = "WRK-001", status: str = "new", **fields: object) -> Item:
    known = {"title": f"Title of {item_id}", "created": timestamp(START), "updated": timestamp(START)}
    return {"id": item_id, "status": status, **known, **fields}


def draft_of(*items: Item, counter: int = 0) -> Draft:
    return Draft(Backlog({i["id"]: i for i in items}, counter))


def load(text: str | bytes) -> Backlog:
    """Read a file as the commands do: all that is wrong with it is an error."""
    state = State.read(text.encode() if isinstance(text, str) else text, "BACKLOG.yaml")
    if complaints := state.complaints():
        raise BacklogError("\n".join(complaints))
    return state.backlog


def refusal(text: str | bytes) -> str:
    with pytest.raises(BacklogError) as caught:
        load(text)
    return str(caught.value)


def unchanged_after(draft: Draft, call: Callable[[], object]) -> str:
    """The message of a refused request, after which the draft is what it was."""
    before = draft.backlog()
    with pytest.raises(BacklogError) as caught:
        call()
    assert draft.backlog() == before
    return str(caught.value)


FULL: dict[str, object] = {
    "id": "WRK-001", "title": "A full item", "status": "blocked", "phase": "build", "size": "medium", "complexity": "low", "risk": "high",
    "impact": "medium", "requires_human_review": True, "origin": "WRK-000/build", "blocked_from_status": "in_progress",
    "blocked_reason": "Two lines:\nof reason", "blocked_type": "decision", "unblock_context": "try again", "tags": ["auth", "yes"],
    "dependencies": ["WRK-009"], "created": "2026-02-12T16:23:33.711239234+00:00", "updated": "2026-02-12T16:23:33+00:00",
    "pipeline_type": "feature", "phase_pool": "main", "last_phase_commit": "8957cea715e8f9607e0b6112ab5ef80c00756b1c",
    "guardrail_override": True, "priority": -3, "attempts": 2, "ticket": 42,
    "description": {"context": "c", "problem": "p", "solution": "s", "impact": "i", "sizing_rationale": "r"},
}  # fmt: skip
MINIMAL = """\
schema_version: 3
items:
- id: WRK-001
  title: Minimal
  status: new
  created: '2026-02-12T00:00:00+00:00'
  updated: '2026-02-12T00:00:00+00:00'
next_item_id: 1
"""


def test_what_is_read() -> None:
    rows = "\n  ".join(f"{key}: {json.dumps(value)}" for key, value in FULL.items() if key != "description")
    texts = "".join(f"\n    {key}: {value}" for key, value in FULL["description"].items())  # type: ignore[attr-defined]
    found = load(f"schema_version: 3\nitems:\n- {rows}\n  description:{texts}\nnext_item_id: 17\n")
    assert found == Backlog({"WRK-001": FULL}, 17)  # type: ignore[dict-item]
    assert load("schema_version: 3\nitems: []\nnext_item_id: 15\n") == Backlog({}, 15)
    nulls = "  origin: null\n  tags: ~\n  description:\n    context:\n    problem: p\n"
    read = load(MINIMAL.replace("  status: new\n", f"  status: new\n{nulls}")).items["WRK-001"]
    assert not {"origin", "tags"} & set(read)
    assert read["description"] == {"context": "", "problem": "p"}


def test_d63_an_empty_or_truncated_file_is_no_empty_backlog() -> None:
    for text in ("", "\n \n", "# only a comment\n", "  # a\n\n# b", "schema_version: 3\n", "schema_version: 3\nitems:\n"):
        with pytest.raises((BacklogError, YamlError), match=r"^BACKLOG\.yaml:(?s:.*)items: \[\]") as caught:
            load(text)
        assert "git" in str(caught.value)
    assert len(load(MINIMAL[:-1]).items) == 1
    for length in range(len(MINIMAL) - 1):
        with pytest.raises((BacklogError, YamlError)):
            load(MINIMAL[:length])


@pytest.mark.parametrize(("version", "found"), [("2", "is 2"), ("'3'", 'is "3"'), ("true", "is true"), (None, "is missing")])
def test_another_schema_is_refused_by_name(version: str | None, found: str) -> None:
    line = f"schema_version: {version}\n" if version else ""
    assert refusal(MINIMAL.replace("schema_version: 3\n", line)) == (
        f"BACKLOG.yaml: schema_version {found}, and only 3 can be read; use the program that wrote"
        " the file, or bring its items to schema 3 and write 'schema_version: 3'"
    )


def test_all_problems_are_listed_at_once_with_their_lines() -> None:
    text = """\
# mine
schema_version: 3
items:
  # first
  - title: |
      id: WRK-009
      - not an item
    id: WRK-001
    status: open
    created: 2026-02-12T00:00:00+00:00
  - just a text
  - id: WRK-001
    title: 5
    status: new
    created: 2026-02-12T00:00:00+00:00
    updated: 2026-02-12T00:00:00+00:00
  - id: ../x
    title: T
    status: new
    created: 2026-02-12T00:00:00+00:00
    updated: 2026-02-12T00:00:00+00:00
next_item_id: 9
"""
    assert [line[:70] for line in refusal(text).splitlines()] == [
        "BACKLOG.yaml:9: WRK-001: status must be one of new, scoping, ready, in",
        "BACKLOG.yaml:11: item number 2: must be a mapping that begins with 'id",
        "BACKLOG.yaml:13: item number 3: title must be text, not 5 (in quotes i",
        "BACKLOG.yaml:12: item number 3: the id WRK-001 is used twice; give one",
        "BACKLOG.yaml:17: item number 4: id must be up to 100 letters, digits, ",
    ]


@pytest.mark.parametrize("bad", ["''", "a/b", "'..'", "'a b'", ".hidden", "'-x'", "x" * 101, '"a\\nb"'])
def test_d45_an_id_that_cannot_be_a_file_name_is_refused(bad: str) -> None:
    assert "id must be up to 100 letters" in refusal(MINIMAL.replace("WRK-001", bad))


def test_a_draft_takes_changes_and_leaves_its_backlog_alone() -> None:
    started = item(phase="prd", size="small")
    backlog = Backlog({"WRK-001": started}, 1)
    draft = Draft(backlog)
    assert draft.update("WRK-001", NOW, size="small", priority=None) is draft.items["WRK-001"] == started
    changed = draft.update("WRK-001", NOW, phase=None, size="large")
    assert changed == {**item(size="large"), "updated": NOW_TEXT}
    assert draft.items["WRK-001"] is changed
    added = draft.add("WRK", "  Say\n hello\x1b[31m ", NOW, size="small", risk=None, tags=["x"])
    assert added == {
        "id": "WRK-002", "title": "Say hello[31m", "status": "new", "size": "small", "requires_human_review": False,
        "tags": ["x"], "created": NOW_TEXT, "updated": NOW_TEXT,
    }  # fmt: skip
    assert draft.backlog() == Backlog({"WRK-001": changed, "WRK-002": added}, 2)
    assert backlog == Backlog({"WRK-001": item(phase="prd", size="small")}, 1)


PHASES = ("prd", "design", "build", "review")
NO_PHASE = "name one with --to: prd, design, build, review"
REFUSED: list[tuple[Callable[[Draft], object], str]] = [
    (lambda d: d.update("WRK-001", NOW, phase="prd", size="huge"), 'WRK-001: size must be one of small, medium, large, not "huge"'),
    (lambda d: d.update("WRK-001", NOW, title=None), "WRK-001: title cannot be removed"),
    (lambda d: d.item("WRK-01"), 'item WRK-01 not found in the backlog (did you mean "WRK-001"?)'),
    (lambda d: d.add("WRK", " \n", NOW), "a new item needs a title; this one is blank"),
    (lambda d: d.add("WRK", "T", NOW, size="xl"), 'the new item: size must be one of small, medium, large, not "xl"'),
    (lambda d: block(d, "WRK-001", "r", NOW, "other"), 'WRK-001: blocked_type must be one of clarification, decision, not "other"'),
    (lambda d: advance(d, "WRK-004", PHASES, None, NOW), f"WRK-004: it is in no phase; {NO_PHASE}"),
    (lambda d: advance(d, "WRK-005", PHASES, None, NOW), f"WRK-005: it is in research, which is no main phase; {NO_PHASE}"),
]


def test_d18_what_is_refused_changes_nothing_and_takes_no_id() -> None:
    draft = draft_of(item(), item("WRK-004", "in_progress"), item("WRK-005", "in_progress", phase="research"), counter=9)
    for act, message in REFUSED:
        assert unchanged_after(draft, lambda act=act: act(draft)) == message  # type: ignore[misc]


@pytest.mark.parametrize(
    ("ids", "counter", "expected"),
    [
        ([], 0, "WRK-001"), (["WRK-001", "WRK-007"], 0, "WRK-008"), (["OTHER-040", "WRK-2"], 0, "WRK-003"), (["WRK-009"], 5, "WRK-010"),
        (["WRK-001"], 2, "WRK-003"), (["WRK-abc", "WRK-²", "WRK-", "WRK-1x"], 0, "WRK-001"), (["WRK-999"], 0, "WRK-1000"), (["WRK-99999999999999999999"], 0, "WRK-001"),
    ],
)  # fmt: skip
def test_the_next_id(ids: list[str], counter: int, expected: str) -> None:
    draft = draft_of(*map(item, ids), counter=counter)
    added = draft.add("WRK", "T", NOW)
    assert added["id"] == expected
    assert draft.next_item_id == int(expected[4:])


def test_transitions() -> None:
    legal = {
        ("new", "scoping"), ("scoping", "ready"), ("ready", "in_progress"), ("in_progress", "done"),
        *product(("new", "scoping", "ready", "in_progress"), ("blocked",)),
        *product(("blocked",), ("new", "scoping", "ready", "in_progress")),
    }  # fmt: skip
    for old, new in product(STATUS_WORDS, STATUS_WORDS):
        draft = draft_of(item(status=old, phase="prd", phase_pool="pre"))
        if (old, new) in legal:
            fields = {"blocked_from_status": old} if new == "blocked" else {}
            expected = item(status=new, phase="prd", phase_pool="pre", **fields)
            assert transition(draft, "WRK-001", new, NOW) == {**expected, "updated": NOW_TEXT}
        else:
            said = unchanged_after(draft, lambda d=draft, to=new: transition(d, "WRK-001", to, NOW))  # type: ignore[misc]
            assert said.startswith(f"WRK-001: it is {old} and cannot become {new}; possible is ")
            assert new not in LEGAL_TRANSITIONS[old]


@pytest.mark.parametrize("status", ["new", "scoping", "ready", "in_progress"])
def test_d18_block_and_unblock_lead_back(status: str) -> None:
    started = item(status=status, phase="prd", phase_pool="main")
    draft = draft_of(started)
    blocked = block(draft, "WRK-001", "Why:\nbecause", NOW, "decision")
    assert blocked == {
        **started, "updated": blocked["updated"], "status": "blocked", "blocked_from_status": status,
        "blocked_reason": "Why:\nbecause", "blocked_type": "decision",
    }  # fmt: skip
    assert "cannot become blocked" in unchanged_after(draft, lambda: block(draft, "WRK-001", "r", NOW))
    draft.update("WRK-001", NOW, attempts=3, unblock_context="old notes")
    back = unblock(draft, "WRK-001", NOW, notes=" use sqlite\n", override=True)
    assert back == {**started, "updated": back["updated"], "unblock_context": "use sqlite", "guardrail_override": True}
    assert NOW_TEXT <= blocked["updated"] < back["updated"]  # each act has a time of its own
    assert "blocked_type" not in block(draft, "WRK-001", "r", NOW)


@pytest.mark.parametrize("origin", [None, "done", "blocked"])
def test_unblock_without_a_usable_origin_starts_anew(origin: str | None) -> None:
    fields = {"blocked_from_status": origin} if origin else {}
    draft = draft_of(item(status="blocked", **fields))
    assert unblock(draft, "WRK-001", NOW, notes="  ") == {**item(), "updated": NOW_TEXT}


@pytest.mark.parametrize(
    ("phase", "to", "expected"),
    [("prd", None, "design"), ("prd", "review", "review"), ("review", "prd", "prd"), (None, "build", "build")],
)
def test_d53_advance_sets_phase_and_pool(phase: str | None, to: str | None, expected: str) -> None:
    fields = {"phase": phase} if phase else {}
    draft = draft_of(item(status="in_progress", phase_pool="pre", attempts=2, **fields))
    moved = item(status="in_progress", phase=expected, phase_pool="main")
    assert advance(draft, "WRK-001", PHASES, to, NOW) == {**moved, "updated": NOW_TEXT}


def test_d35_d59_follow_ups_become_items_once_and_bad_ones_are_left_out() -> None:
    draft = draft_of(item("WRK-006", title="Add `--json` to status!"), item("WRK-007", "done", title="Two"), counter=3)
    follow_ups = [
        FollowUp("One", " why \n", "small", "low"), FollowUp("Two", "  "), FollowUp("add --JSON to  Status"),
        FollowUp("two."), FollowUp(" "), FollowUp("Bad", size="gigantic"), FollowUp("Good"),
    ]  # fmt: skip
    added = add_follow_ups(draft, "WRK", "WRK-007/build", follow_ups, NOW)
    texts = {"context": "why", "problem": "", "solution": "", "impact": "", "sizing_rationale": ""}
    given = {"status": "new", "requires_human_review": False, "origin": "WRK-007/build", "created": NOW_TEXT, "updated": NOW_TEXT}
    assert added == [
        {"id": "WRK-008", "title": "One", "size": "small", "risk": "low", **given, "description": texts},
        {"id": "WRK-009", "title": "Two", **given},
        {"id": "WRK-010", "title": "Good", **given},
    ]
    assert list(draft.items) == ["WRK-006", "WRK-007", "WRK-008", "WRK-009", "WRK-010"]
    assert draft.next_item_id == 10
    assert draft.warnings == [
        "follow-up 'add --JSON to  Status' is already there as WRK-006",
        "follow-up 'two.' is already there as WRK-009",
        "follow-up ' ' is left out: a new item needs a title; this one is blank",
        "follow-up 'Bad' is left out: the new item: size must be one of small, medium, large, not \"gigantic\"",
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Fix: the bug.", "fix the  BUG", True), ("Straße", "STRASSE", True), ("Fix bug 1", "Fix bug 2", False),
        ("!!!", "???", False), ("!!!", " !!! ", True), ("修复", "修复", True),
    ],
)  # fmt: skip
def test_normalised_titles(one: str, other: str, same: bool) -> None:
    assert (normalise_title(one) == normalise_title(other)) is same


def test_the_worklog_is_appended_by_month_of_utc_and_each_entry_once(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "_worklog"
    append_worklog(directory, NOW, "")
    assert list(tmp_path.iterdir()) == []
    late = datetime(2026, 2, 28, 23, 30, tzinfo=timezone(timedelta(hours=-2)))
    assert append_worklog(directory, NOW, "torn") == directory / "2026-02.md"
    append_worklog(directory, NOW, "second\n")  # the line that was torn off is closed first
    assert append_worklog(directory, late, "third\n") == directory / "2026-03.md"
    assert (directory / "2026-02.md").read_text() == "torn\nsecond\n"
    assert (directory / "2026-03.md").read_text() == "third\n"

    text = worklog_entry(NOW, "WRK-001", "T", "build", "Complete", "s")
    for now in (NOW, NOW, NOW + timedelta(days=20)):  # also over the end of a month
        append_worklog(tmp_path, now, text)
    assert [path.name for path in tmp_path.glob("*.md")] == ["2026-02.md"]
    assert (tmp_path / "2026-02.md").read_text() == text
