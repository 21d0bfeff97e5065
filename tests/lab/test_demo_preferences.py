"""Tests of the benign preference task."""

import contextlib
import re
import sqlite3
from collections import Counter

import pytest
from trl import data_utils

from spf.lab.demo import preferences
from spf.lab.demo.preferences import make_preferences
from spf.lab.demo.sql import SQLExample, _is_eval, execution_match, make_sql_examples


@pytest.fixture(scope="module")
def rows() -> list[preferences.Preference]:
    return make_preferences(150, 0)


def texts(row: preferences.Preference) -> tuple[str, str, str]:
    return row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_rows_are_in_trl_conversational_preference_format(rows: list[preferences.Preference]) -> None:
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert data_utils.is_conversational(row)
        assert [[m["role"] for m in messages] for messages in row.values()] == [["user"], ["assistant"], ["assistant"]]


def test_chosen_is_right_and_rejected_runs_but_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    databases = []

    def recorded(*args: object) -> SQLExample:
        databases.append(SQLExample(*args))  # type: ignore[arg-type]
        return databases[-1]

    monkeypatch.setattr(preferences, "SQLExample", recorded)
    found = make_preferences(100, 4)
    drafts: dict[tuple[str, str], list[SQLExample]] = {}  # a question may be drafted again over other tables
    for example in databases:
        drafts.setdefault((example.prompt, example.query), []).append(example)
    for row in found:
        prompt, chosen, rejected = texts(row)
        assert any(
            execution_match(e, chosen) and not execution_match(e, rejected) and runs(e, rejected)
            for e in drafts[prompt, chosen]
        )


def runs(example: SQLExample, query: str) -> bool:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(example.setup)
        return connection.execute(query).fetchall() is not None


def test_no_question_of_the_sql_evaluation_split(rows: list[preferences.Preference]) -> None:
    for row in rows:
        schema, question, _ = texts(row)[0].split("\n")
        assert not _is_eval(schema.removeprefix("Schema: "), question.removeprefix("Question: "))
    example = make_sql_examples(1, 0, "eval")[0]
    assert _is_eval(example.schema, example.question)


def test_no_duplicates(rows: list[preferences.Preference], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "_draft", lambda rng, level: (str(number := rng.randrange(5)), rows[number]))
    assert len(make_preferences(5, 0)) == 5
    assert all(row in make_preferences(5, 0) for row in rows[:5])
    with pytest.raises(ValueError, match="no new preference"):
        make_preferences(6, 0)


def test_difficulties_and_kinds_of_mistakes(rows: list[preferences.Preference]) -> None:
    hard = sum(bool(re.search(r" JOIN | GROUP BY ", texts(row)[1])) for row in rows)
    assert 0.07 < hard / len(rows) < 0.25
    kinds: Counter[str] = Counter()
    for row in rows:
        _, chosen, rejected = texts(row)
        assert chosen != rejected
        if " WHERE " in chosen and " WHERE " not in rejected:
            kinds["dropped condition"] += 1
        elif re.sub(r"\w+", "", chosen) == re.sub(r"\w+", "", rejected):
            kinds["other word"] += 1
    assert kinds["dropped condition"] >= 5
    assert kinds["other word"] >= 50


def test_deterministic() -> None:
    assert make_preferences(30, 5) == make_preferences(30, 5)
    assert make_preferences(30, 5) != make_preferences(30, 6)
    assert make_preferences(0, 5) == []


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="negative"):
        make_preferences(-1, 0)
