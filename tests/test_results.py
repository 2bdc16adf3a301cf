"""Reading what agents report: strict about whose result it is, lenient about everything else."""

import json
from typing import Any

import pytest

import orchestrator
from orchestrator import AgentOutcome, FollowUp, PhaseResult, ResultError, parse_result

MINIMAL = {"item_id": "WRK-001", "phase": "prd", "result": "phase_complete", "summary": "Wrote the PRD."}


def parse(changes: dict[str, Any] | None = None, *, without: str = "") -> PhaseResult:
    row = {key: value for key, value in {**MINIMAL, **(changes or {})}.items() if key != without}
    return parse_result(json.dumps(row).encode(), "WRK-001", "prd")


def test_d59_null_counts_as_absent_in_every_optional_field() -> None:
    assert parse() == PhaseResult("WRK-001", "prd", "phase_complete", "Wrote the PRD.")
    optional = (
        "context", "updated_assessments", "follow_ups", "pipeline_type", "commit_summary", "duplicates",
        "description", "requires_human_review", "block_type",
    )  # fmt: skip
    assert parse(dict.fromkeys(optional)) == parse()


def test_d18_a_full_result_is_taken_over_completely() -> None:
    description = {"context": "now", "problem": "bad", "solution": "good", "impact": "all", "sizing_rationale": "1 file"}
    ratings = {"size": "large", "complexity": "high", "risk": "low", "impact": "medium"}
    follow_up = {"title": "Tidy up", "context": "see a.py", "suggested_size": "small", "suggested_risk": "low"}
    same: dict[str, Any] = {
        "result": "blocked", "context": "Which database?", "block_type": "decision", "pipeline_type": "feature",
        "commit_summary": "Add the PRD", "description": description, "requires_human_review": True,
    }  # fmt: skip
    more = {"updated_assessments": ratings, "follow_ups": [follow_up], "duplicates": ["WRK-007"], "unknown": {"kept": "out"}}
    assert parse({**same, **more}) == parse()._replace(
        **same, ratings=ratings, follow_ups=(FollowUp("Tidy up", "see a.py", "small", "low"),), duplicates=("WRK-007",)
    )
    for code in ("phase_complete", "subphase_complete", "failed"):
        assert parse({"result": code}).result == code
    assert parse({"block_type": "clarification"}).block_type == "clarification"


def minimal(**changes: object) -> bytes:
    return json.dumps({**MINIMAL, **changes}).encode()


BELONGS = "the result file says"
CODES = 'expected "phase_complete" or "subphase_complete" or "failed" or "blocked"'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the result file is empty"),
        (b" \n\t", "the result file is empty"),
        (b"[1]", "the result file must hold one JSON object, not [1]"),
        (b"null", "the result file must hold one JSON object, not null"),
        (b'"text"', 'the result file must hold one JSON object, not "text"'),
        (b"[" * 200_000, "the result file is not valid JSON: maximum recursion"),
        (b'{"item_id": ' + b'{"a":' * 200_000, "the result file is not valid JSON: maximum recursion"),
        (b'{"item_id": "WRK-001",\n  oops}', "the result file is not valid JSON: Expecting property name enclosed in double quotes: line 2 column 3 (char 25)"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "the result file is not valid JSON: Exceeds the limit"),
        (minimal(item_id="WRK-002", phase="build"), f'{BELONGS} item_id "WRK-002", expected "WRK-001"'),
        (minimal(item_id=None), f'{BELONGS} item_id null, expected "WRK-001"'),
        (minimal(phase="build"), f'{BELONGS} phase "build", expected "prd"'),
        (minimal(result="done"), f'the result file says result "done", {CODES}'),
        (minimal(result=None), f"the result file says result null, {CODES}"),
        (minimal(result=True), f"the result file says result true, {CODES}"),
        (minimal(result=["failed"]), f'the result file says result ["failed"], {CODES}'),
    ],
    ids=["empty", "blank", "list", "null", "text", "lists", "objects", "broken", "digits", "d15", "no item", "other phase", "word", "no word", "true", "listed"],
)  # fmt: skip
def test_d15_what_is_no_result_of_this_phase_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ResultError) as caught:
        parse_result(data, "WRK-001", "prd")
    assert str(caught.value).startswith(says)


def test_a_missing_summary_gets_a_text_so_that_no_reason_is_ever_empty() -> None:
    result = parse(without="summary")
    assert (result.summary, result.warnings) == ("(the agent gave no summary)", ("summary is missing",))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"updated_assessments": {"size": "huge", "complexity": "", "impact": None}}, 'updated_assessments.size must be one of small, medium, large, not "huge"'),
        ({"context": 5}, "context must be text, not 5 (in quotes it is text: '5')"),
        ({"context": ["a", "b\u202e"]}, 'context must be text, not ["a", "b\\u202e"]'),
        ({"updated_assessments": "large"}, 'updated_assessments must be a mapping of keys to values, not "large"'),
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
def test_d59_a_field_that_does_not_fit_is_dropped_with_a_warning(changes: dict[str, Any], warning: str) -> None:
    told = f"{warning} dropped" if warning.endswith("is") else f"{warning}; dropped"
    result = parse({**changes, "commit_summary": "Kept"})
    assert result == parse({"commit_summary": "Kept"})._replace(warnings=(told,))


def test_d35_follow_ups_may_be_titles_or_objects_and_a_bad_one_does_not_cost_the_others() -> None:
    result = parse({"follow_ups": [
        "Just a title",
        {"title": "Rated", "context": "why", "suggested_size": "gigantic", "suggested_risk": "high"},
        {"title": "Short keys", "size": "small", "risk": "low"},
        {"context": "no title"}, "  ", 12, {"title": "<one line>"},
        {"title": "Two\nlines"},
        {"title": "word " * 100, "context": "because"},
    ]})  # fmt: skip
    *whole, cut = result.follow_ups
    assert whole == [
        FollowUp("Just a title"),
        FollowUp("Rated", "why", None, "high"),
        FollowUp("Short keys", None, "small", "low"),
        FollowUp("Two lines"),
    ]
    assert len(cut.title) <= 200
    assert cut.title.endswith("…")
    assert cut.context == f"{('word ' * 100).strip()}\n\nbecause"
    missing = "title is missing; the entry is dropped"
    assert result.warnings == (
        "follow_ups[5] must be a mapping of keys to values, not 12; dropped",
        'follow_ups[1].suggested_size must be one of small, medium, large, not "gigantic"; dropped',
        *(f"follow_ups[{n}].{missing}" for n in (3, 4, 5)),
        "follow_ups[6].title still holds the placeholder <one line>; dropped",
        f"follow_ups[6].{missing}",
    )


@pytest.mark.parametrize(
    ("key", "given", "read"),
    [
        ("description", "plain text", {"context": "plain text"}),
        ("description", {}, {}),
        ("duplicates", ["WRK-2", " WRK-2 ", "WRK-3"], ("WRK-2", "WRK-3")),
        ("updated_assessments", {"complexity": "High ", "risk": ""}, {"complexity": "high"}),
        ("description", {"problem": "x", "context": "", "other": "y"}, {"problem": "x"}),
        *(("requires_human_review", given, read) for given, read in (("true", True), ("Yes", True), ("no", False))),  # d17
    ],
)
def test_a_field_may_be_partial_or_said_in_other_words(key: str, given: object, read: Any) -> None:
    name = "ratings" if key == "updated_assessments" else key
    assert parse({key: given}) == parse()._replace(**{name: read})


@pytest.mark.parametrize(
    "wrapped",
    ["\ufeff%s", "```json\n%s\n```", "```\n%s\n```\n", "\n\n  %s\n"],
    ids=["byte order mark", "json fence", "plain fence", "white space"],
)
def test_what_agents_like_to_wrap_around_json_does_not_matter(wrapped: str) -> None:
    data = (wrapped % json.dumps(MINIMAL)).encode()
    assert parse_result(data, "WRK-001", "prd") == parse()
    no_utf8 = data.replace(b"Wrote", b"Wr\xe9te")  # does not cost the result
    assert parse_result(no_utf8, "WRK-001", "prd").summary == "Wr\ufffdte the PRD."


def test_an_enormous_text_is_cut_with_a_warning() -> None:
    result = parse({"summary": "x" * 30_000})
    assert result.summary == "x" * 20_000 + "…"
    assert result.warnings == ("summary is cut to 20000 characters",)


def test_d57_the_failure_text_holds_the_summary_and_the_explanation_once() -> None:
    def text(summary: str, context: str) -> str:
        failed = parse({"result": "failed", "summary": summary, "context": context})
        return orchestrator.failure_text(AgentOutcome("result", failed))

    assert [text("No luck.", "Gone."), text("Broken.", "Broken.")] == ["No luck.\n\nGone.", "Broken."]
    assert orchestrator.failure_text(AgentOutcome("failed", detail="no output for 15 min")) == "no output for 15 min"
    assert orchestrator.failure_text(AgentOutcome("failed")) == "the attempt failed without saying why"
