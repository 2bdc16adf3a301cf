"""Reading what agents report: strict about whose result it is, lenient about everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest

import orchestrator
from orchestrator import AgentOutcome, FollowUp, PhaseResult, ResultError, parse_result

MINIMAL = {"item_id": "WRK-001", "phase": "prd", "result": "phase_complete", "summary": "Wrote the PRD."}


def parse(changes: dict[str, Any] | None = None, *, without: str = "") -> PhaseResult:
    row = {key: value for key, value in {**MINIMAL, **(changes or {})}.items() if key != without}
    return parse_result(json.dumps(row).encode(), "WRK-001", "prd")


def refusal(data: bytes) -> str:
    with pytest.raises(ResultError) as caught:
        parse_result(data, "WRK-001", "prd")
    return str(caught.value)


# -- whole results ---------------------------------------------------------------------------------


def test_a_minimal_result_has_every_other_field_at_its_default() -> None:
    assert parse() == PhaseResult("WRK-001", "prd", "phase_complete", "Wrote the PRD.")


def test_a_full_result_is_taken_over_completely() -> None:
    result = parse(
        {
            "result": "blocked",
            "context": "Which database?",
            "block_type": "decision",
            "updated_assessments": {"size": "large", "complexity": "high", "risk": "low", "impact": "medium"},
            "follow_ups": [{"title": "Tidy up", "context": "see a.py", "suggested_size": "small", "suggested_risk": "low"}],
            "pipeline_type": "feature",
            "commit_summary": "Add the PRD",
            "duplicates": ["WRK-007"],
            "description": {"context": "now", "problem": "bad", "solution": "good", "impact": "all", "sizing_rationale": "1 file"},
            "requires_human_review": True,
            "unknown": {"kept": "out"},
        }
    )
    assert result == PhaseResult(
        item_id="WRK-001",
        phase="prd",
        result="blocked",
        summary="Wrote the PRD.",
        context="Which database?",
        ratings={"size": "large", "complexity": "high", "risk": "low", "impact": "medium"},
        follow_ups=(FollowUp("Tidy up", "see a.py", "small", "low"),),
        pipeline_type="feature",
        commit_summary="Add the PRD",
        duplicates=("WRK-007",),
        description={"context": "now", "problem": "bad", "solution": "good", "impact": "all", "sizing_rationale": "1 file"},
        requires_human_review=True,
        block_type="decision",
    )


@pytest.mark.parametrize(
    "key",
    [
        "context", "updated_assessments", "follow_ups", "pipeline_type",
        "commit_summary", "duplicates", "description", "requires_human_review", "block_type",
    ],
)
def test_d59_null_counts_as_absent_in_every_optional_field(key: str) -> None:
    assert parse({key: None}) == parse()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the result file is empty"),
        (b" \n\t", "the result file is empty"),
        (b"[1]", "the result file must hold one JSON object, not [1]"),
        (b"null", "the result file must hold one JSON object, not null"),
        (b"17", "the result file must hold one JSON object, not 17"),
        (b'"text"', 'the result file must hold one JSON object, not "text"'),
        (b"[" * 200_000, "the result file is nested too deeply"),
        (b'{"item_id": ' + b'{"a":' * 200_000, "the result file is nested too deeply"),
    ],
    ids=["empty", "blank", "list", "null", "number", "text", "lists bomb", "objects bomb"],
)
def test_what_is_no_usable_json_object_is_refused(data: bytes, says: str) -> None:
    assert refusal(data) == says


def test_broken_json_is_refused_with_its_position() -> None:
    assert refusal(b'{"item_id": "WRK-001",\n  oops}') == (
        "the result file is not valid JSON: Expecting property name enclosed in double quotes:"
        " line 2 column 3 (char 25)"
    )


def test_d15_another_items_result_is_refused_with_both_values_in_one_message() -> None:
    data = json.dumps({**MINIMAL, "item_id": "WRK-002", "phase": "build"}).encode()
    assert refusal(data) == (
        'the result file belongs to something else: item_id is "WRK-002", expected "WRK-001";'
        ' phase is "build", expected "prd"'
    )


@pytest.mark.parametrize("missing", ["item_id", "phase"])
def test_a_result_without_identity_is_refused(missing: str) -> None:
    row = {key: value for key, value in MINIMAL.items() if key != missing}
    assert f"{missing} is null, expected" in refusal(json.dumps(row).encode())


@pytest.mark.parametrize(
    ("code", "shown"), [("done", '"done"'), (None, "null"), (True, "true"), (["failed"], '["failed"]')]
)
def test_an_unknown_result_code_is_refused(code: object, shown: str) -> None:
    assert refusal(json.dumps({**MINIMAL, "result": code}).encode()) == (
        f"the result file says result {shown}, expected one of"
        " phase_complete, subphase_complete, failed, blocked"
    )


# -- lenient fields --------------------------------------------------------------------------------


def test_a_missing_summary_gets_a_text_so_that_no_reason_is_ever_empty() -> None:
    result = parse(without="summary")
    assert (result.summary, result.warnings) == ("(the agent gave no summary)", ("summary is missing",))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"context": 5}, "context must be text, not 5 (in quotes it is text: '5')"),
        ({"context": ["a", "b\u202e"]}, 'context must be text, not ["a", "b\\u202e"]'),
        ({"updated_assessments": "large"}, 'updated_assessments must be a mapping of keys to values, not "large"'),
        ({"updated_assessments": {"size": "huge"}}, 'updated_assessments.size must be one of small, medium, large, not "huge"'),
        ({"updated_assessments": {"risk": 3}}, "updated_assessments.risk must be one of low, medium, high, not 3"),
        ({"follow_ups": "do it"}, 'follow_ups must be a list, not "do it"'),
        ({"duplicates": "WRK-2"}, 'duplicates must be a list, not "WRK-2"'),
        ({"duplicates": [{"id": 1}]}, "duplicates must hold ids of items; the rest is"),
        ({"description": 7}, "description must be a mapping of keys to values, not 7"),
        ({"requires_human_review": "perhaps"}, 'requires_human_review must be true or false, not "perhaps"'),
        ({"requires_human_review": 1}, "requires_human_review must be true or false, not 1"),
        ({"block_type": "other"}, 'block_type must be one of clarification, decision, not "other"'),
        ({"context": "<why>"}, "context still holds the placeholder <why>"),
    ],
)
def test_d59_a_field_that_does_not_fit_is_dropped_with_a_warning_and_the_rest_kept(
    changes: dict[str, Any], warning: str
) -> None:
    told = f"{warning} dropped" if warning.endswith("is") else f"{warning}; dropped"
    result = parse({**changes, "commit_summary": "Kept"})
    assert result == parse({"commit_summary": "Kept"})._replace(warnings=(told,))


def test_d35_follow_ups_may_be_titles_or_objects_and_a_bad_one_does_not_cost_the_others() -> None:
    result = parse(
        {
            "follow_ups": [
                "Just a title",
                {"title": "Rated", "context": "why", "suggested_size": "gigantic", "suggested_risk": "high"},
                {"title": "Short keys", "size": "small", "risk": "low"},
                {"context": "no title"},
                "  ",
                12,
                {"title": "<one line>"},
                {"title": "Two\nlines"},
            ]
        }
    )
    assert result.follow_ups == (
        FollowUp("Just a title"),
        FollowUp("Rated", "why", None, "high"),
        FollowUp("Short keys", None, "small", "low"),
        FollowUp("Two lines"),
    )
    assert result.warnings == (
        "follow_ups[5] must be a mapping of keys to values, not 12; dropped",
        'follow_ups[1].suggested_size must be one of small, medium, large, not "gigantic"; dropped',
        "follow_ups[3].title is missing; the entry is dropped",
        "follow_ups[4].title is missing; the entry is dropped",
        "follow_ups[5].title is missing; the entry is dropped",
        "follow_ups[6].title still holds the placeholder <one line>; dropped",
        "follow_ups[6].title is missing; the entry is dropped",
    )


def test_an_overlong_follow_up_title_is_cut_and_kept_whole_in_the_context() -> None:
    title = "word " * 100
    (follow_up,) = parse({"follow_ups": [{"title": title, "context": "because"}]}).follow_ups
    assert len(follow_up.title) <= 200
    assert follow_up.title.endswith("…")
    assert follow_up.context == f"{title.strip()}\n\nbecause"


@pytest.mark.parametrize(
    ("given", "read"),
    [("plain text", {"context": "plain text"}), ({}, {}), ({"problem": "x", "context": "", "other": "y"}, {"problem": "x"})],
)
def test_a_description_may_be_partial_or_plain_text(given: object, read: dict[str, str]) -> None:
    assert parse({"description": given}) == parse()._replace(description=read)


@pytest.mark.parametrize(("given", "read"), [("true", True), ("Yes", True), ("no", False), (False, False)])
def test_d17_the_wish_for_a_human_review_is_understood(given: object, read: bool) -> None:
    assert parse({"requires_human_review": given}) == parse()._replace(requires_human_review=read)


# -- bytes and characters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    ["\ufeff%s", "```json\n%s\n```", "```\n%s\n```\n", "\n\n  %s\n"],
    ids=["byte order mark", "json fence", "plain fence", "white space"],
)
def test_what_agents_like_to_wrap_around_json_does_not_matter(wrapped: str) -> None:
    data = (wrapped % json.dumps(MINIMAL)).encode()
    assert parse_result(data, "WRK-001", "prd") == parse()


def test_bytes_that_are_no_utf8_do_not_cost_the_result() -> None:
    data = json.dumps(MINIMAL).encode().replace(b"Wrote", b"Wr\xe9te")
    assert parse_result(data, "WRK-001", "prd").summary == "Wr\ufffdte the PRD."


def test_nothing_that_a_terminal_or_yaml_takes_for_more_than_text_gets_through() -> None:
    nasty = "\x1b[31mred\x1b[0m \x1b]0;title\x07 bell\x07 nul\x00 \u202ertl \x9b2J lone \ud800 a\r\nb\x85c\u2028d"
    result = parse({"summary": nasty, "commit_summary": nasty, "follow_ups": [{"title": nasty, "context": nasty}]})
    lines = "red  bell nul rtl  lone \ufffd a\nb\nc\nd"
    line = "red bell nul rtl lone \ufffd a b c d"
    assert (result.summary, result.commit_summary) == (lines, line)
    assert result.follow_ups == (FollowUp(line, lines),)
    result.summary.encode("utf-8")


def test_an_enormous_text_is_cut_with_a_warning() -> None:
    result = parse({"summary": "x" * 30_000})
    assert result.summary == "x" * 20_000 + "…"
    assert result.warnings == ("summary is cut to 20000 characters",)


# -- why an attempt failed -------------------------------------------------------------------------


def test_d57_the_failure_text_holds_the_summary_and_the_explanation() -> None:
    failed = parse({"result": "failed", "summary": "No luck.", "context": "The API is gone."})
    assert orchestrator.failure_text(AgentOutcome("result", failed)) == "No luck.\n\nThe API is gone."


def test_the_failure_text_says_a_thing_once_and_never_nothing() -> None:
    same = parse({"result": "failed", "summary": "Broken.", "context": "Broken."})
    assert orchestrator.failure_text(AgentOutcome("result", same)) == "Broken."
    assert orchestrator.failure_text(AgentOutcome("timeout", detail="no output for 15 min")) == "no output for 15 min"
    assert orchestrator.failure_text(AgentOutcome("failed")) == "the attempt failed without saying why"
