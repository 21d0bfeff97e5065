"""Tests of the text-to-SQL task."""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter

import pytest

from spf.lab.demo.sql import SQLExample, execution_match, extract_query, make_sql_examples


@pytest.fixture(scope="module")
def train() -> list[SQLExample]:
    return make_sql_examples(200, 0, "train")


@pytest.fixture(scope="module")
def evaluation() -> list[SQLExample]:
    return make_sql_examples(100, 0, "eval")


def _rate(pairs: list[tuple[SQLExample, str]]) -> float:
    """Share of the wrong answers that match; each must differ from the gold text."""
    assert len(pairs) > 20
    assert all(example.query != answer for example, answer in pairs)
    return sum(execution_match(example, answer) for example, answer in pairs) / len(pairs)


def test_gold_matches_itself(train: list[SQLExample], evaluation: list[SQLExample]) -> None:
    for example in train + evaluation:
        assert execution_match(example, example.query)
        assert execution_match(example, f"```sql\n{example.query};\n```\nDone.")
        assert not re.search(r"\n|;|  ", example.query)
        assert example.prompt == f"Schema: {example.schema}\nQuestion: {example.question}\nWrite the SQL query."


def test_databases(train: list[SQLExample]) -> None:
    tables = set()
    for example in train:
        connection = sqlite3.connect(":memory:")
        connection.executescript(example.setup)
        shown = []
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]
            assert len(set(columns)) == len(columns)
            shown.append(f"{name}({', '.join(columns)})")
            tables.add(name)
            assert 8 <= connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] <= 15
        assert example.schema == "; ".join(shown)
        assert connection.execute(example.query).fetchall()
        connection.close()
    assert len(tables) >= 12


def test_splits_are_disjoint_across_seeds(train: list[SQLExample], evaluation: list[SQLExample]) -> None:
    def keys(examples: list[SQLExample]) -> set[tuple[str, str]]:
        return {(example.schema, example.question) for example in examples}

    more_train, more_eval = make_sql_examples(100, 7, "train"), make_sql_examples(100, 3, "eval")
    assert not keys(train + more_train) & keys(evaluation + more_eval)
    assert len(keys(train)) == len(train)
    assert len(keys(evaluation)) == len(evaluation)


def test_deterministic(train: list[SQLExample]) -> None:
    assert make_sql_examples(60, 5, "train") == make_sql_examples(60, 5, "train")
    assert make_sql_examples(60, 5, "train") != make_sql_examples(60, 6, "train")
    assert make_sql_examples(0, 5, "train") == []


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="negative"):
        make_sql_examples(-1, 0, "train")
    with pytest.raises(ValueError, match="split"):
        make_sql_examples(1, 0, "test")  # type: ignore[arg-type]


def test_difficulties(train: list[SQLExample]) -> None:
    counts = Counter(example.difficulty for example in train)
    assert counts == {1: 100, 2: 70, 3: 30}
    for example in train:
        if example.difficulty == 1:
            assert " WHERE " in example.query
            assert not re.search(r" JOIN | GROUP | ORDER |COUNT|AVG", example.query)
        assert (example.difficulty == 3) == (" JOIN " in example.query or " GROUP BY " in example.query)
    assert any(" JOIN " in example.query for example in train)
    assert any(" HAVING " in example.query for example in train)


def test_dropped_where_does_not_match(train: list[SQLExample], evaluation: list[SQLExample]) -> None:
    pairs = [
        (example, re.sub(r" WHERE .*?(?= GROUP BY | ORDER BY |$)", "", example.query))
        for example in train + evaluation
        if " WHERE " in example.query
    ]
    assert _rate(pairs) < 0.05


def test_wrong_literal_does_not_match(train: list[SQLExample], evaluation: list[SQLExample]) -> None:
    pairs = []
    for example in train + evaluation:
        answer = re.sub(r"'[^']*'", "'Nowhere'", example.query)
        answer = re.sub(r"([<>]=?) (\d+)", lambda found: f"{found[1]} {int(found[2]) * 3 + 1}", answer)
        if answer != example.query:
            pairs.append((example, answer))
    assert _rate(pairs) < 0.05


def test_wrong_column_does_not_match(train: list[SQLExample], evaluation: list[SQLExample]) -> None:
    pairs = []
    for example in train + evaluation:
        if ";" in example.schema:
            continue
        columns = re.findall(r"\w+", example.schema)[1:]
        used = [name for name in columns if re.search(rf"(?<!')\b{name}\b", example.query)]
        for name in used:
            other = columns[(columns.index(name) + 1) % len(columns)]
            pairs.append((example, re.sub(rf"(?<!')\b{name}\b", other, example.query)))
    assert _rate(pairs) < 0.05


_EXAMPLE = SQLExample(
    "t(name, size)",
    "List the names.",
    "SELECT name FROM t WHERE size > 1",
    1,
    "CREATE TABLE t (name TEXT, size INTEGER); INSERT INTO t VALUES ('a;b', 1), ('c', 2), ('d', 3);",
)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know",
        "SELECT",
        "SELECT nothing FROM t",
        "DROP TABLE t",
        "DELETE FROM t",
        "SELECT name FROM t",
        "SELECT name, size FROM t WHERE size > 1",
        "PRAGMA table_info(t)",
        "ATTACH ':memory:' AS other",
        "WITH x AS (SELECT 1) DELETE FROM t",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r",
        "SELECT hex(zeroblob(900000000))",
        "SELECT name FROM t WHERE size > 1 AND name = '\x00'",
        "SELECT name FROM t WHERE name = '\ud800'",
        "SELECT name FROM t WHERE size > ?",
        "SELECT load_extension('x')",
        "(" * 5000,
        "SELECT " + "(" * 5000,
    ],
)
def test_wrong_answers(answer: str) -> None:
    start = time.monotonic()
    assert not execution_match(_EXAMPLE, answer)
    assert time.monotonic() - start < 2


def test_comparison() -> None:
    assert execution_match(_EXAMPLE, "select name as x from t where size >= 2 order by size desc")
    assert execution_match(_EXAMPLE, "WITH u AS (SELECT * FROM t) SELECT name FROM u WHERE size > 1")
    ordered = SQLExample("", "", "SELECT name FROM t ORDER BY size", 2, _EXAMPLE.setup)
    assert execution_match(ordered, "SELECT name FROM t ORDER BY size ASC")
    assert not execution_match(ordered, "SELECT name FROM t ORDER BY size DESC")
    mean = SQLExample("", "", "SELECT AVG(size) FROM t", 2, _EXAMPLE.setup)
    assert execution_match(mean, "SELECT 2")
    assert execution_match(mean, "SELECT 2.0000000001")
    assert not execution_match(mean, "SELECT 2.001")
    assert not execution_match(mean, "SELECT '2'")
    twice = SQLExample("", "", "SELECT 1 UNION ALL SELECT 1 UNION ALL SELECT 2", 1, _EXAMPLE.setup)
    assert not execution_match(twice, "SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 2")
    broken = SQLExample("", "", "SELECT nothing FROM t", 1, _EXAMPLE.setup)
    with pytest.raises(sqlite3.Error):
        execution_match(broken, "SELECT 1")


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        ("  SELECT 1;\n", "SELECT 1"),
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```\nSELECT 1\n```\nThis gives one.", "SELECT 1"),
        ("Here it is:\n```SQL\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("SELECT 1\n```", "SELECT 1"),
        ("SQL: SELECT 1", "SELECT 1"),
        ("sql\nSELECT 1", "SELECT 1"),
        ("SQL query: SELECT 1; SELECT 2", "SELECT 1"),
        ("`SELECT 1`", "SELECT 1"),
        ("SELECT 1\n\nThis gives one.", "SELECT 1"),
        ("SELECT a\nFROM t", "SELECT a\nFROM t"),
        ("SELECT ';' AS a; DROP TABLE t", "SELECT ';' AS a"),
        ("SELECT 'it''s; x'; y", "SELECT 'it''s; x'"),
        ("sqlite_master", "sqlite_master"),
        ("", ""),
        (";", ""),
        ("```", ""),
    ],
)
def test_extract_query(answer: str, query: str) -> None:
    assert extract_query(answer) == query
