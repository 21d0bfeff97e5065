"""An executable text-to-SQL task: short prompts over small tables, scored by execution match in SQLite.

Every example carries the script that builds its database. An example is kept only when its gold query is told
apart, on that database, from a family of near misses (dropped or altered conditions, another column, another
aggregate, another direction of the order ...), so a wrong answer rarely matches by chance.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["SQLExample", "execution_match", "extract_query", "make_sql_examples"]

_VM_STEPS = 1_000_000  # virtual-machine steps a query may take before it is interrupted
_VM_TICK = 1_000  # steps between two calls of the progress handler
_MAX_ROWS = 1_000  # rows fetched at most; a gold result has far fewer
_MAX_BYTES = 100_000  # longest string or blob SQLite may build
_TRIES = 400  # rejected candidates allowed per example asked for

_Row = tuple[object, ...]


@dataclass(frozen=True)
class SQLExample:
    """One question over a small database, with its gold query.

    `schema` is compact ("employees(id, name, salary)", two tables joined with "; "), `query` is one line
    without a semicolon, `difficulty` is 1 (select with a where), 2 (aggregate, order with limit, two
    conditions) or 3 (group by, join of two tables), `setup` is the SQL script making and filling the tables.
    """

    schema: str
    question: str
    query: str
    difficulty: int
    setup: str

    @property
    def prompt(self) -> str:
        """The text shown to the model: schema, question and instruction on three lines."""
        return f"Schema: {self.schema}\nQuestion: {self.question}\nWrite the SQL query."


# ------------------------------------------------------------------------------
# Domains
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column: the words a question uses for it, the names it may bear in a schema, and its values.

    A text column has a `pool`; an integer column draws from range(low, high + 1, step). `natural` is an
    optional wording of an equality ("from {}"); `total` says whether a sum of the column makes sense.
    """

    phrase: str
    names: tuple[str, ...]
    pool: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    step: int = 1
    natural: str = ""
    total: bool = True


@dataclass(frozen=True)
class _Domain:
    """A kind of table: its possible names, the nouns for its rows, a unique label and further columns."""

    tables: tuple[str, ...]
    plural: str
    singular: str
    label: _Column
    texts: tuple[_Column, ...]
    ints: tuple[_Column, ...]


def _words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def _text(phrase: str, names: str, pool: str | Sequence[str], natural: str = "") -> _Column:
    """A text column; `names`, and a `pool` given as a string, are separated by spaces."""
    values = _words(pool) if isinstance(pool, str) else pool
    return _Column(phrase, tuple(_words(names)), tuple(values), natural=natural)


def _int(phrase: str, names: str, low: int, high: int, step: int = 1, total: bool = True) -> _Column:
    """An integer column with values low, low + step, ..., high; `names` are separated by spaces."""
    return _Column(phrase, tuple(names.split()), (), low, high, step, total=total)


_PEOPLE = _words(
    "Alice Bob Carla David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Quinn "
    "Rosa Sam Tina "
    "Victor Wendy Anna Ben Clara Daniel Eva George Hugo Julia Kevin Laura Mark Nora Peter Ruth Simon Tom"
)
_TITLES = [
    f"{first} {second}"
    for first in _words("Silent Golden Dark Lost Blue Broken Hidden Last Red Cold")
    for second in _words("River Moon Road Garden Storm Mirror House Star Island Fire")
]
_FIRMS = _words(
    "Acme Apex Nova Orion Delta Vertex Zenith Atlas Lumen Titan Pioneer Summit Vista Falcon Harbor "
    "Omega Phoenix "
    "Quantum Stellar Union"
)
_CITIES = _words("Paris London Berlin Madrid Rome Tokyo Boston Chicago Dublin Vienna Oslo Lisbon")
_COUNTRIES = _words("France Spain Italy Japan Brazil Canada Germany India Mexico Norway Egypt China")
_TEAMS = _words(
    "Tigers Lions Eagles Sharks Wolves Bears Hawks Bulls Kings Giants Rockets Comets Pirates Knights Dragons Rangers"
)
_PRODUCTS = _words(
    "Lamp Chair Table Mug Clock Desk Phone Camera Radio Kettle Blender Pillow Blanket Knife Bottle Mirror Speaker"
)
_COURSES = _words(
    "Algebra Biology Chemistry Drama Economics French Geometry History Latin Logic Music Painting "
    "Physics Poetry "
    "Robotics Statistics"
)
_PETS = _words("Rex Bella Milo Luna Coco Max Daisy Rocky Lola Buddy Simba Nala Oreo Ruby Toby Zoe")
_DEPTS = _words(
    "Sales Marketing Finance Legal Research Support Design Security Logistics Training Quality "
    "Planning Audit "
    "Engineering Payroll"
)
_FLIGHTS = [f"{a}{n}" for a in _words("FX BA KL") for n in (12, 25, 31, 48, 57, 64, 73, 86)]
_MODELS = _words("Falcon Comet Pulse Nova Spark Breeze Orbit Rally Vento Strada Luma Polar Tempo Zephyr Quest")

_NAME = _text("name", "name full_name", _PEOPLE)
_FIRM = _text("name", "name company title", _FIRMS)
_AGE = _int("age", "age age_years", 21, 69, total=False)
_CITY = _text("city", "city home_city", _CITIES, "in {}")
_COUNTRY = _text("country", "country home_country", _COUNTRIES, "from {}")

_DOMAINS: dict[str, _Domain] = {
    "employee": _Domain(
        ("employees", "staff", "workers"), "employees", "employee", _NAME,
        (_CITY, _text("role", "role job_role", "engineer analyst manager clerk designer")),
        (_int("salary", "salary annual_salary", 30000, 99000, 1000), _AGE,
         _int("hire year", "hire_year hired", 1998, 2023, total=False),
         _int("bonus", "bonus yearly_bonus", 200, 5000, 100)),
    ),
    "department": _Domain(
        ("departments", "units", "divisions"), "departments", "department",
        _text("name", "name dept_name", _DEPTS),
        (_CITY, _text("region", "region area", "north south east west")),
        (_int("budget", "budget yearly_budget", 100, 900, 10),
         _int("floor", "floor floor_no", 1, 30, total=False)),
    ),
    "book": _Domain(
        ("books", "library", "volumes"), "books", "book", _text("title", "title book_title", _TITLES),
        (_text("genre", "genre category", "fantasy mystery romance history poetry"),
         _text("language", "language lang", "English French German Spanish", "in {}")),
        (_int("price", "price cost", 5, 60, total=True), _int("pages", "pages page_count", 90, 800, 10),
         _int("year", "year pub_year", 1950, 2023, total=False)),
    ),
    "author": _Domain(
        ("authors", "writers"), "authors", "author", _NAME, (_COUNTRY, _CITY),
        (_AGE, _int("awards", "awards award_count", 1, 40)),
    ),
    "song": _Domain(
        ("songs", "tracks"), "songs", "song", _text("title", "title song_title", _TITLES),
        (_text("style", "style music_style", "rock jazz pop folk blues"),
         _text("album", "album album_name", "Dawn Echo Mosaic Horizon Pulse", "on the album {}")),
        (_int("length", "length seconds", 120, 420, 5), _int("plays", "plays play_count", 100, 9900, 100),
         _int("release year", "release_year released", 1970, 2023, total=False)),
    ),
    "artist": _Domain(
        ("artists", "musicians"), "artists", "artist", _NAME,
        (_COUNTRY, _text("instrument", "instrument main_instrument", "piano guitar drums violin")),
        (_AGE, _int("fans", "fans fan_count", 500, 9500, 100)),
    ),
    "movie": _Domain(
        ("movies", "films"), "movies", "movie", _text("title", "title movie_title", _TITLES),
        (_text("genre", "genre category", "comedy drama horror action western"), _COUNTRY),
        (_int("rating", "rating score", 20, 99, total=False), _int("duration", "duration minutes", 75, 200),
         _int("year", "year made_in", 1960, 2023, total=False)),
    ),
    "director": _Domain(
        ("directors", "filmmakers"), "directors", "director", _NAME, (_COUNTRY, _CITY),
        (_AGE, _int("awards", "awards prizes", 1, 40)),
    ),
    "product": _Domain(
        ("products", "items", "goods"), "products", "product",
         _text("name", "name product_name item", _PRODUCTS),
        (_text("color", "color colour", "red blue green black white"),
         _text("brand", "brand brand_name", "Nordic Solis Kento Maple", "made by {}")),
        (_int("price", "price unit_price", 5, 250, 5), _int("stock", "stock in_stock", 3, 120),
         _int("weight", "weight weight_g", 100, 4000, 50)),
    ),
    "supplier": _Domain(
        ("suppliers", "vendors"), "suppliers", "supplier", _FIRM, (_COUNTRY, _CITY),
        (_int("rating", "rating score", 20, 99, total=False),
         _int("discount", "discount discount_pct", 1, 40)),
    ),
    "flight": _Domain(
        ("flights", "departures"), "flights", "flight", _text("code", "code flight_code", _FLIGHTS),
        (_text("origin", "origin origin_city", _CITIES[:6]),
         _text("gate", "gate gate_name", "A1 A2 B1 B2 C3")),
        (_int("distance", "distance distance_km", 200, 9000, 50), _int("delay", "delay delay_min", 2, 180),
         _int("seats", "seats seat_count", 60, 400, 5)),
    ),
    "airline": _Domain(
        ("airlines", "carriers"), "airlines", "airline", _FIRM, (_COUNTRY,),
        (_int("fleet size", "fleet fleet_size", 10, 300, 5),
         _int("founding year", "founded founding_year", 1925, 2015, total=False)),
    ),
    "player": _Domain(
        ("players", "athletes"), "players", "player", _NAME,
        (_text("position", "position pos", "goalkeeper defender midfielder striker"), _COUNTRY),
        (_int("goals", "goals goals_scored", 1, 60),
         _int("height", "height height_cm", 160, 210, total=False), _AGE),
    ),
    "team": _Domain(
        ("teams", "clubs"), "teams", "team", _text("name", "name team_name", _TEAMS), (_CITY, _COUNTRY),
        (_int("points", "points total_points", 5, 95), _int("wins", "wins games_won", 1, 40)),
    ),
    "course": _Domain(
        ("courses", "classes"), "courses", "course", _text("title", "title course_title", _COURSES),
        (_text("level", "level course_level", "beginner medium advanced expert"),
         _text("room", "room classroom", "R10 R12 R20 R31", "in room {}")),
        (_int("credits", "credits credit_hours", 1, 30), _int("fee", "fee tuition", 100, 2000, 50),
         _int("capacity", "capacity max_students", 10, 120)),
    ),
    "teacher": _Domain(
        ("teachers", "instructors"), "teachers", "teacher", _NAME,
        (_CITY, _text("degree", "degree diploma", "bachelor master doctorate")),
        (_AGE, _int("salary", "salary pay", 30000, 90000, 1000)),
    ),
    "pet": _Domain(
        ("pets", "animals"), "pets", "pet", _text("name", "name pet_name", _PETS),
        (_text("species", "species kind", "dog cat rabbit parrot hamster"),
         _text("color", "color coat", "brown black white grey")),
        (_int("weight", "weight weight_kg", 1, 60), _int("age", "age age_months", 2, 180),
         _int("visits", "visits vet_visits", 1, 40)),
    ),
    "owner": _Domain(
        ("owners", "keepers"), "owners", "owner", _NAME, (_CITY, _COUNTRY),
        (_AGE, _int("income", "income yearly_income", 20000, 90000, 1000)),
    ),
    "hotel": _Domain(
        ("hotels", "inns"), "hotels", "hotel", _FIRM,
        (_CITY, _text("view", "view view_type", "sea park street garden")),
        (_int("rooms", "rooms room_count", 10, 300, 5), _int("price", "price nightly_rate", 40, 400, 5),
         _int("rating", "rating score", 20, 99, total=False)),
    ),
    "car": _Domain(
        ("cars", "vehicles"), "cars", "car", _text("model", "model model_name", _MODELS),
        (_text("fuel", "fuel fuel_type", "petrol diesel electric hybrid"),
         _text("color", "color paint", "red blue silver black")),
        (_int("price", "price list_price", 9000, 80000, 500),
         _int("mileage", "mileage km_driven", 1000, 200000, 1000),
         _int("year", "year built", 1995, 2023, total=False)),
    ),
}  # fmt: skip

# child, parent: many rows of the first refer to one row of the second
_LINKS: tuple[tuple[str, str], ...] = (
    ("employee", "department"), ("book", "author"), ("song", "artist"), ("movie", "director"),
    ("product", "supplier"), ("flight", "airline"), ("player", "team"), ("course", "teacher"),
    ("pet", "owner"),
)  # fmt: skip


# ------------------------------------------------------------------------------
# Tables and queries
# ------------------------------------------------------------------------------


@dataclass
class _Table:
    """A filled table: columns in schema order, and values by column name in row order."""

    domain: _Domain
    name: str
    columns: list[tuple[str, _Column]]
    values: dict[str, Sequence[int | str]]
    prefix: str = ""  # "table." in a join, empty otherwise

    @property
    def schema(self) -> str:
        """The table as shown to the model."""
        return f"{self.name}({', '.join(name for name, _ in self.columns)})"

    def of(self, wanted: Sequence[_Column]) -> list[tuple[str, _Column]]:
        """The columns present among those wanted."""
        return [(name, column) for name, column in self.columns if column in wanted]

    @property
    def label(self) -> tuple[str, _Column]:
        """The unique text column."""
        return self.of((self.domain.label,))[0]

    @property
    def script(self) -> str:
        """SQL script that makes and fills the table."""
        kinds = ", ".join(f"{name} {'TEXT' if column.pool else 'INTEGER'}" for name, column in self.columns)
        rows = zip(*(self.values[name] for name, _ in self.columns), strict=True)
        body = ",\n".join("(" + ", ".join(_literal(value) for value in row) + ")" for row in rows)
        return f"CREATE TABLE {self.name} ({kinds});\nINSERT INTO {self.name} VALUES\n{body};\n"


_KEY = _Column("id", ("id",))
_REF = _Column("reference", ("ref",))


def _literal(value: int | str) -> str:
    """A value as SQL text."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _plural(phrase: str) -> str:
    """A column's phrase in the plural."""
    if phrase.endswith("s"):
        return phrase
    return phrase[:-1] + "ies" if phrase.endswith("y") else phrase + "s"


def _fill(rng: random.Random, column: _Column, label: bool, rows: int) -> Sequence[int | str]:
    """Values of a column: distinct for a label or a wide range, few repeated ones for a category."""
    if label:
        return rng.sample(column.pool, rows)
    if column.pool:
        chosen = rng.sample(column.pool, min(len(column.pool), rng.choice((3, 4))))
        return [rng.choice(chosen) for _ in range(rows)]
    scale = range(column.low, column.high + 1, column.step)
    return rng.sample(scale, rows) if len(scale) >= 2 * rows else [rng.choice(scale) for _ in range(rows)]


def _make_table(
    rng: random.Random, domain: _Domain, rows: int, texts: int, ints: int, key: str = "", ref: str = ""
) -> _Table:
    """Draw a table: columns, their names and order, values; `key` and `ref`, if not empty, name id "
    "columns."""
    chosen = [domain.label]
    chosen += rng.sample(domain.texts, min(texts, len(domain.texts)))
    chosen += rng.sample(domain.ints, min(ints, len(domain.ints)))
    columns = [(rng.choice(column.names), column) for column in chosen]
    if ref:
        columns.append((ref, _REF))
    rng.shuffle(columns)
    values = {name: _fill(rng, column, column is domain.label, rows) for name, column in columns if column is not _REF}
    if key:
        columns.insert(0, (key, _KEY))
        values[key] = rng.sample(range(1, 4 * rows), rows)
    return _Table(domain, rng.choice(domain.tables), columns, values)


@dataclass(frozen=True)
class _Query:
    """The parts of a SELECT."""

    select: tuple[str, ...]
    source: str
    where: tuple[str, ...] = ()
    glue: str = "AND"
    group: str = ""
    having: str = ""
    order: str = ""
    limit: int = 0

    @property
    def sql(self) -> str:
        """The query on one line."""
        text = f"SELECT {', '.join(self.select)} FROM {self.source}"
        if self.where:
            text += " WHERE " + f" {self.glue} ".join(self.where)
        for word, part in (("GROUP BY", self.group), ("HAVING", self.having), ("ORDER BY", self.order)):
            if part:
                text += f" {word} {part}"
        return text + (f" LIMIT {self.limit}" if self.limit else "")


_Draft = tuple[str, _Query]  # question, gold query
_AGGREGATES = ("AVG", "SUM", "MAX", "MIN")


def _near_misses(query: _Query, tables: Sequence[_Table]) -> list[str]:
    """Wrong queries that the database must tell apart from the gold one."""
    wrong: list[_Query] = []
    if query.where:
        wrong.append(replace(query, where=()))
    if len(query.where) > 1:
        wrong += [replace(query, where=(part,)) for part in query.where]
        wrong.append(replace(query, glue="OR" if query.glue == "AND" else "AND"))
    if query.having:
        wrong.append(replace(query, having=""))
    if query.order:
        flipped = query.order[:-5] if query.order.endswith(" DESC") else query.order + " DESC"
        wrong += [replace(query, order=flipped), replace(query, order="")]
    texts = [item.sql for item in wrong]
    gold = query.sql
    for name in _AGGREGATES:
        if f"{name}(" in gold:
            texts += [gold.replace(f"{name}(", f"{other}(") for other in _AGGREGATES if other != name]
    texts.append(gold.replace("COUNT(DISTINCT ", "COUNT("))
    for table in tables:
        names = [table.prefix + name for name, _ in table.columns]
        for name in names:
            pattern = re.compile(rf"(?<![\w.']){re.escape(name)}(?![\w'])")
            if pattern.search(gold):
                texts += [pattern.sub(other, gold) for other in names if other != name]
        for name, _ in table.of(table.domain.texts):  # another value of a category
            words = sorted({_literal(value) for value in table.values[name]})
            texts += [gold.replace(old, new) for old in words if old in gold for new in words]
    return [text for text in dict.fromkeys(texts) if text != gold]


# ------------------------------------------------------------------------------
# Templates
# ------------------------------------------------------------------------------

_VERBS = ("List", "Show", "Give", "Find")
_COMPARE = (
    ("above", ">"),
    ("over", ">"),
    ("below", "<"),
    ("under", "<"),
    ("at least", ">="),
    ("at most", "<="),
)
_AGGREGATE_WORDS = {
    "AVG": ("average",),
    "SUM": ("total",),
    "MAX": ("highest", "maximum"),
    "MIN": ("lowest", "minimum"),
}


def _condition(rng: random.Random, table: _Table, name: str, column: _Column, lead: str = "") -> tuple[str, str]:
    """A condition on a column, as words ("with age above 40") and as SQL.

    `lead` replaces the opening words, for a condition on the other table of a join ("whose author has").
    """
    value = rng.choice(table.values[name])
    sql = table.prefix + name
    if column.pool:
        if rng.random() < 0.15 and not lead:
            return f"whose {column.phrase} is not {value}", f"{sql} != {_literal(value)}"
        if column.natural and rng.random() < 0.4:
            return (
                f"{lead.replace(' has', ' is')} {column.natural.format(value)}".strip(),
                f"{sql} = {_literal(value)}",
            )
        words = rng.choice((f"with {column.phrase} {value}", f"whose {column.phrase} is {value}"))
        return f"{lead} {column.phrase} {value}" if lead else words, f"{sql} = {_literal(value)}"
    word, operator = rng.choice(_COMPARE)
    opening = lead or "with"
    if not lead and not column.phrase.endswith("s") and rng.random() < 0.4:
        return f"whose {column.phrase} is {word} {value}", f"{sql} {operator} {value}"
    return f"{opening} {column.phrase} {word} {value}", f"{sql} {operator} {value}"


def _data(table: _Table) -> list[tuple[str, _Column]]:
    """The columns that may bear a condition: all but the label and the ids."""
    return table.of(table.domain.texts + table.domain.ints)


def _any_condition(rng: random.Random, table: _Table, avoid: str = "") -> tuple[str, str]:
    """A condition on a random column other than `avoid`."""
    name, column = rng.choice([item for item in _data(table) if item[0] != avoid])
    return _condition(rng, table, name, column)


def _an_int(rng: random.Random, table: _Table) -> tuple[str, _Column]:
    """A random integer column."""
    return rng.choice(table.of(table.domain.ints))


def _an_aggregate(rng: random.Random, column: _Column) -> tuple[str, str]:
    """A function that suits a column, with a word for it."""
    function = rng.choice(_AGGREGATES if column.total else ("AVG", "MAX", "MIN"))
    return function, rng.choice(_AGGREGATE_WORDS[function])


def _list_where(rng: random.Random, table: _Table) -> _Draft:
    """The label, or another column, or both, of the rows that meet a condition."""
    name, column = rng.choice(_data(table))
    words, sql = _condition(rng, table, name, column)
    label, kind = table.label
    others = [item for item in table.of(table.domain.ints) if item[0] != name]
    choice = rng.random()
    select: tuple[str, ...] = (label,)
    if choice < 0.5 or not others:
        what = _plural(kind.phrase)
    else:
        other, second = rng.choice(others)
        if choice < 0.8:
            what, select = f"{kind.phrase} and {second.phrase}", (label, other)
        else:
            what, select = _plural(second.phrase), (other,)
    return f"{rng.choice(_VERBS)} the {what} of {table.domain.plural} {words}.", _Query(select, table.name, (sql,))


def _lookup(rng: random.Random, table: _Table) -> _Draft:
    """One or two columns of the row with a given label."""
    label, _ = table.label
    value = rng.choice(table.values[label])
    first, column = _an_int(rng, table)
    where = (f"{label} = {_literal(value)}",)
    others = [item for item in _data(table) if item[0] != first]
    if rng.random() < 0.5 and others:
        second, other = rng.choice(others)
        return f"What are the {other.phrase} and {column.phrase} of {value}?", _Query(
            (second, first), table.name, where
        )
    return f"What is the {column.phrase} of {value}?", _Query((first,), table.name, where)


def _count_where(rng: random.Random, table: _Table) -> _Draft:
    """The number of rows that meet a condition."""
    words, sql = _any_condition(rng, table)
    nouns = table.domain.plural
    question = rng.choice((f"How many {nouns} are there {words}?", f"Count the {nouns} {words}."))
    return question, _Query(("COUNT(*)",), table.name, (sql,))


def _aggregate(rng: random.Random, table: _Table) -> _Draft:
    """An aggregate of an integer column, mostly over the rows that meet a condition."""
    name, column = _an_int(rng, table)
    function, word = _an_aggregate(rng, column)
    select = (f"{function}({name})",)
    opening = f"{rng.choice(('What is', 'Find', 'Give'))} the {word} {column.phrase} of"
    stop = "?" if opening.startswith("What") else "."
    if rng.random() < 0.25:
        return f"{opening} all {table.domain.plural}{stop}", _Query(select, table.name)
    words, sql = _any_condition(rng, table, name)
    return f"{opening} {table.domain.plural} {words}{stop}", _Query(select, table.name, (sql,))


def _top(rng: random.Random, table: _Table) -> _Draft:
    """The labels of the first rows in the order of an integer column."""
    name, column = _an_int(rng, table)
    word, suffix = rng.choice((("highest", " DESC"), ("lowest", "")))
    label, kind = table.label
    limit = rng.choice((1, 2, 3, 4))
    if limit == 1:
        question = f"Which {table.domain.singular} has the {word} {column.phrase}?"
    else:
        question = (
            f"{rng.choice(_VERBS)} the {_plural(kind.phrase)} of the {limit} {table.domain.plural} "
            f"with the {word} {column.phrase}."
        )
    return question, _Query((label,), table.name, order=name + suffix, limit=limit)


def _top_where(rng: random.Random, table: _Table) -> _Draft:
    """The label of the extreme row among those that meet a condition."""
    name, column = _an_int(rng, table)
    words, sql = _any_condition(rng, table, name)
    word, suffix = rng.choice((("highest", " DESC"), ("lowest", "")))
    question = f"Among {table.domain.plural} {words}, which has the {word} {column.phrase}?"
    return question, _Query((table.label[0],), table.name, (sql,), order=name + suffix, limit=1)


def _sorted(rng: random.Random, table: _Table) -> _Draft:
    """All labels in the order of an integer column."""
    name, column = _an_int(rng, table)
    words, suffix = rng.choice((("from highest to lowest", " DESC"), ("from lowest to highest", "")))
    label, kind = table.label
    question = f"{rng.choice(_VERBS)} all {table.domain.singular} {_plural(kind.phrase)} by {column.phrase} {words}."
    return question, _Query((label,), table.name, order=name + suffix)


def _two_conditions(rng: random.Random, table: _Table) -> _Draft:
    """The labels, or the number, of rows that meet two conditions or one of two."""
    first, second = rng.sample(_data(table), 2)
    words, sql = _condition(rng, table, *first)
    more, also = _condition(rng, table, *second)
    glue = rng.choice(("AND", "AND", "OR"))
    label, kind = table.label
    tail = f"{table.domain.plural} {words} {glue.lower()} {more}"
    if rng.random() < 0.3:
        return f"How many {tail} are there?", _Query(("COUNT(*)",), table.name, (sql, also), glue)
    return f"{rng.choice(_VERBS)} the {_plural(kind.phrase)} of {tail}.", _Query(
        (label,), table.name, (sql, also), glue
    )


def _between(rng: random.Random, table: _Table) -> _Draft:
    """The labels of rows with a value in an interval, ends included."""
    name, column = _an_int(rng, table)
    low, high = sorted(int(value) for value in rng.sample(table.values[name], 2))
    label, kind = table.label
    question = (
        f"{rng.choice(_VERBS)} the {_plural(kind.phrase)} of {table.domain.plural} "
        f"with {column.phrase} between {low} and {high}."
    )
    return question, _Query((label,), table.name, (f"{name} BETWEEN {low} AND {high}",))


def _distinct(rng: random.Random, table: _Table) -> _Draft:
    """The number of distinct values of a category."""
    name, column = rng.choice(table.of(table.domain.texts))
    question = f"How many different {_plural(column.phrase)} do the {table.domain.plural} have?"
    return question, _Query((f"COUNT(DISTINCT {name})",), table.name)


def _group_count(rng: random.Random, table: _Table) -> _Draft:
    """The number of rows per category, possibly under a condition."""
    name, column = rng.choice(table.of(table.domain.texts))
    question = f"For each {column.phrase}, how many {table.domain.plural} are there"
    if rng.random() < 0.4:
        words, sql = _any_condition(rng, table, name)
        return f"{question} {words}?", _Query((name, "COUNT(*)"), table.name, (sql,), group=name)
    return f"{question}?", _Query((name, "COUNT(*)"), table.name, group=name)


def _group_aggregate(rng: random.Random, table: _Table) -> _Draft:
    """An aggregate of an integer column per category."""
    name, column = rng.choice(table.of(table.domain.texts))
    other, number = _an_int(rng, table)
    function, word = _an_aggregate(rng, number)
    question = rng.choice(
        (
            f"For each {column.phrase}, what is the {word} {number.phrase} of {table.domain.plural}?",
            f"Show each {column.phrase} with the {word} {number.phrase} of its {table.domain.plural}.",
        )
    )
    return question, _Query((name, f"{function}({other})"), table.name, group=name)


def _group_having(rng: random.Random, table: _Table) -> _Draft:
    """The categories with enough rows."""
    name, column = rng.choice(table.of(table.domain.texts))
    word, operator = rng.choice((("more than", ">"), ("at least", ">="), ("fewer than", "<")))
    count = rng.choice((2, 3, 4, 5))
    question = f"Which {_plural(column.phrase)} have {word} {count} {table.domain.plural}?"
    return question, _Query((name,), table.name, group=name, having=f"COUNT(*) {operator} {count}")


def _group_most(rng: random.Random, table: _Table) -> _Draft:
    """The category with the most or the fewest rows, or with the extreme average."""
    name, column = rng.choice(table.of(table.domain.texts))
    if rng.random() < 0.5:
        word, suffix = rng.choice((("most", " DESC"), ("fewest", "")))
        question, key = f"Which {column.phrase} has the {word} {table.domain.plural}?", "COUNT(*)"
    else:
        other, number = _an_int(rng, table)
        word, suffix = rng.choice((("highest", " DESC"), ("lowest", "")))
        question, key = f"Which {column.phrase} has the {word} average {number.phrase}?", f"AVG({other})"
    return question, _Query((name,), table.name, group=name, order=key + suffix, limit=1)


def _join_source(child: _Table, parent: _Table) -> str:
    """The FROM clause that joins a child table with its parent."""
    ref = child.of((_REF,))[0][0]
    key = parent.of((_KEY,))[0][0]
    return f"{child.name} JOIN {parent.name} ON {child.prefix}{ref} = {parent.prefix}{key}"


def _join_where(rng: random.Random, child: _Table, parent: _Table) -> _Draft:
    """Label, number or aggregate of the child rows whose parent meets a condition."""
    name, column = rng.choice(_data(parent))
    words, sql = _condition(rng, parent, name, column, f"whose {parent.domain.singular} has")
    source, nouns = _join_source(child, parent), child.domain.plural
    choice = rng.random()
    if choice < 0.25:
        return f"How many {nouns} are there {words}?", _Query(("COUNT(*)",), source, (sql,))
    if choice < 0.45 and child.of(child.domain.ints):
        other, number = _an_int(rng, child)
        function, word = _an_aggregate(rng, number)
        question = f"What is the {word} {number.phrase} of {nouns} {words}?"
        return question, _Query((f"{function}({child.prefix}{other})",), source, (sql,))
    label, kind = child.label
    question = f"{rng.choice(_VERBS)} the {_plural(kind.phrase)} of {nouns} {words}."
    return question, _Query((child.prefix + label,), source, (sql,))


def _join_pairs(rng: random.Random, child: _Table, parent: _Table) -> _Draft:
    """Label of each child with the label, or another column, of its parent, possibly under a condition."""
    label, kind = child.label
    name, column = rng.choice([parent.label, *_data(parent)])
    select = (child.prefix + label, parent.prefix + name)
    source, one = _join_source(child, parent), parent.domain.singular
    if rng.random() < 0.5:
        question = f"Show the {kind.phrase} of each {child.domain.singular} and the {column.phrase} of its {one}."
        return question, _Query(select, source)
    words, sql = _any_condition(rng, child)
    question = f"Show the {kind.phrase} and the {one}'s {column.phrase} for {child.domain.plural} {words}."
    return question, _Query(select, source, (sql,))


def _join_count(rng: random.Random, child: _Table, parent: _Table) -> _Draft:
    """The number of child rows per parent column."""
    name, column = rng.choice([parent.label, *parent.of(parent.domain.texts)])
    group = parent.prefix + name
    question = f"For each {parent.domain.singular} {column.phrase}, how many {child.domain.plural} are there?"
    return question, _Query((group, "COUNT(*)"), _join_source(child, parent), group=group)


_SINGLE: dict[int, tuple[Callable[[random.Random, _Table], _Draft], ...]] = {
    1: (_list_where, _list_where, _list_where, _lookup),
    2: (
        _count_where, _count_where, _aggregate, _aggregate, _top, _top, _top_where, _sorted, _two_conditions,
        _two_conditions, _two_conditions, _between, _distinct,
    ),
    3: (_group_count, _group_count, _group_aggregate, _group_aggregate, _group_having, _group_most),
}  # fmt: skip
_JOINS: tuple[Callable[[random.Random, _Table, _Table], _Draft], ...] = (
    _join_where,
    _join_where,
    _join_pairs,
    _join_count,
)


# ------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------


def _draft_single(rng: random.Random, difficulty: int) -> tuple[list[_Table], _Draft]:
    """A question over one table of 8 to 15 rows."""
    domain = _DOMAINS[rng.choice(sorted(_DOMAINS))]
    key = rng.choice(("id", "id", "")) if rng.random() < 0.8 else f"{domain.singular}_id"
    table = _make_table(rng, domain, rng.randint(8, 15), rng.choice((1, 2)), rng.choice((2, 2, 3)), key)
    return [table], rng.choice(_SINGLE[difficulty])(rng, table)


def _draft_join(rng: random.Random) -> tuple[list[_Table], _Draft]:
    """A question over a child table of 10 to 15 rows and a parent table of 8 to 10."""
    first, second = rng.choice(_LINKS)
    one = _DOMAINS[second].singular
    key, ref = rng.choice((("id", f"{one}_id"), (f"{one}_id", f"{one}_id"), ("id", one), ("code", f"{one}_code")))
    texts = rng.choice((0, 0, 1))
    child = _make_table(rng, _DOMAINS[first], rng.randint(10, 15), texts, 1, rng.choice(("", "id")), ref)
    only = rng.choice(((1, 0), (1, 0), (0, 1)))
    parent = _make_table(rng, _DOMAINS[second], rng.randint(8, 10), *only, key)
    used = rng.sample([int(value) for value in parent.values[key]], 6)
    child.values[ref] = [rng.choice(used) for _ in range(len(child.values[child.label[0]]))]
    child.prefix, parent.prefix = f"{child.name}.", f"{parent.name}."
    return [child, parent], rng.choice(_JOINS)(rng, child, parent)


def _is_eval(schema: str, question: str) -> bool:
    """Whether a (schema, question) pair belongs to the evaluation split, for any seed: parity of a hash."""
    return hashlib.sha256(f"{schema}\n{question}".encode()).digest()[0] % 2 == 1


def _ties(connection: sqlite3.Connection, query: _Query) -> bool:
    """Whether two rows share a value of the order key, so that the order of the result is not determined."""
    if not query.order:
        return False
    key = query.order.removesuffix(" DESC")
    keys = _rows(connection, replace(query, select=(key,), order="", limit=0).sql)
    return len(set(keys)) < len(keys) or len(keys) <= query.limit


def _sound(connection: sqlite3.Connection, query: _Query, tables: Sequence[_Table]) -> bool:
    """Whether the gold result is non-empty, determined, and told apart from every near miss."""
    gold = _rows(connection, query.sql)
    if not gold or gold == [(0,)] or any(value is None for row in gold for value in row) or _ties(connection, query):
        return False
    ordered = bool(query.order)
    return not any(_same(gold, _rows(connection, text), ordered) for text in _near_misses(query, tables))


def make_sql_examples(count: int, seed: int, split: Literal["train", "eval"]) -> list[SQLExample]:
    """Make examples, about 50 / 35 / 15 % of difficulty 1 / 2 / 3 in random order, without duplicates.

    Deterministic for (count, seed, split). No (schema, question) pair is in both splits, for any seeds.
    Raises ValueError on a negative count, an unknown split, or when the space of questions is exhausted.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    rng = random.Random(f"sql-{split}-{seed}")
    hard, easy = round(0.15 * count), round(0.5 * count)
    levels = [1] * easy + [2] * (count - easy - hard) + [3] * hard
    rng.shuffle(levels)
    seen: set[tuple[str, str]] = set()
    examples: list[SQLExample] = []
    for level in levels:
        for _ in range(_TRIES):
            join = level == 3 and rng.random() < 0.6
            tables, (question, query) = _draft_join(rng) if join else _draft_single(rng, level)
            schema = "; ".join(table.schema for table in tables)
            if (schema, question) in seen or _is_eval(schema, question) != (split == "eval"):
                continue
            setup = "".join(table.script for table in tables)
            connection = _open(setup)
            try:
                if not _sound(connection, query, tables):
                    continue
            finally:
                connection.close()
            seen.add((schema, question))
            examples.append(SQLExample(schema, question, query.sql, level, setup))
            break
        else:
            raise ValueError(f"no new example of difficulty {level} after {_TRIES} tries")
    return examples


# ------------------------------------------------------------------------------
# Execution
# ------------------------------------------------------------------------------

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def _authorize(action: int, *_: object) -> int:
    """Let a statement read, and nothing else."""
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _open(setup: str) -> sqlite3.Connection:
    """A fresh in-memory database made by a script, then closed to anything but reading."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(setup)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_BYTES)
    connection.set_authorizer(_authorize)
    return connection


def _rows(connection: sqlite3.Connection, query: str) -> list[_Row]:
    """The rows of a query; sqlite3.Error if it is wrong, writes, or runs away, or gives too many rows."""
    left = _VM_STEPS // _VM_TICK

    def tick() -> int:
        nonlocal left
        left -= 1
        return int(left < 0)

    connection.set_progress_handler(tick, _VM_TICK)
    rows: list[_Row] = connection.execute(query).fetchmany(_MAX_ROWS + 1)
    if len(rows) > _MAX_ROWS:
        raise sqlite3.DataError("too many rows")
    return rows


def _equal(first: object, second: object) -> bool:
    """Whether two values of a result are equal, floats up to 1e-6."""
    if isinstance(first, int | float) and isinstance(second, int | float):
        if isinstance(first, int) and isinstance(second, int):
            return first == second
        return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-6)
    return type(first) is type(second) and first == second


def _same(gold: list[_Row], other: list[_Row], ordered: bool) -> bool:
    """Whether two results are equal, as sequences if `ordered`, else as multisets of rows."""

    def match(first: _Row, second: _Row) -> bool:
        return len(first) == len(second) and all(map(_equal, first, second))

    if len(gold) != len(other):
        return False
    if ordered:
        return all(map(match, gold, other))
    rest = list(other)
    for row in gold:
        found = next((index for index, item in enumerate(rest) if match(row, item)), None)
        if found is None:
            return False
        rest.pop(found)
    return True


_PREFIX = re.compile(r"(?:(?:sql(?:ite)?(?:\s+query)?|query|answer)\s*:|sql(?:ite)?\b)\s*", re.IGNORECASE)
_STATEMENT = re.compile(r"""(?:'[^']*(?:'|$)|"[^"]*(?:"|$)|[^;'"])*""")


def extract_query(answer: str) -> str:
    """The first SQL statement of a model's answer, stripped.

    Drops ``` fences (with or without a closing one), a leading "sql" or "SQL:", everything from the first ';'
    outside quotes, and everything after a blank line.
    """
    text = answer.strip()
    if "```" in text:
        before, _, inside = text.partition("```")
        is_query = re.match(r"\s*(?:select|with)\b", _PREFIX.sub("", before, count=1), re.IGNORECASE)
        text = before if is_query else inside.partition("```")[0]
    text = text.strip()
    while match := _PREFIX.match(text):
        text = text[match.end() :]
    if len(text) > 1 and text[0] == text[-1] == "`" and text.count("`") == 2:
        text = text[1:-1]
    statement = _STATEMENT.match(text.strip())
    text = statement.group() if statement else ""
    return re.split(r"\n[ \t\r]*\n", text.strip(), maxsplit=1)[0].strip()


def execution_match(example: SQLExample, answer: str) -> bool:
    """Whether the query in an answer gives the rows of the gold query on the example's database.

    Rows are compared in order when the gold query has an ORDER BY, as a multiset otherwise; column names do
    not matter. An answer that is not a SELECT, fails, writes, or runs away is False. Raises sqlite3.Error
    when the example itself (setup or gold query) is broken.
    """
    query = extract_query(answer)
    if not re.match(r"(?:select|with)\b", query, re.IGNORECASE):
        return False
    connection = _open(example.setup)
    try:
        gold = _rows(connection, example.query)
    finally:
        connection.close()
    connection = _open(example.setup)
    try:
        rows = _rows(connection, query)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return False
    finally:
        connection.close()
    ordered = re.search(r"\border\s+by\b", example.query, re.IGNORECASE) is not None
    return _same(gold, rows, ordered)
