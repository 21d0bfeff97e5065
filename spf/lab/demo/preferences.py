"""A benign preference task for DPO: the right SQL query against a near miss that gives another answer."""

import random

from spf.lab.demo.sql import SQLExample, _draft_join, _draft_single, _is_eval, _near_misses, _open, _sound

_TRIES = 400  # drafts per row

Preference = dict[str, list[dict[str, str]]]


def make_preferences(count: int, seed: int) -> list[Preference]:
    """Rows in TRL's conversational preference format: `prompt`, `chosen` and `rejected`, each a list of messages.

    The prompt is a text-to-SQL question, `chosen` its gold query, `rejected` a random near miss (a dropped or altered
    condition, another column, another aggregate ...) that gives another result on the question's database.
    Difficulties as in `make_sql_examples`: 1, 2, 3 with chances .5, .35, .15. Deterministic for (count, seed), without
    duplicates, and with no question of the evaluation split of `make_sql_examples`.

    Raises:
        ValueError: a negative count, or the space of questions is exhausted.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rng = random.Random(f"preferences-{seed}")
    rows: dict[str, Preference] = {}
    for _ in range(count):
        level = rng.choices((1, 2, 3), (0.5, 0.35, 0.15))[0]
        for _ in range(_TRIES):
            prompt, row = _draft(rng, level)
            if row is not None and prompt not in rows:
                rows[prompt] = row
                break
        else:
            raise ValueError(f"no new preference of difficulty {level} after {_TRIES} tries")
    return list(rows.values())


def _draft(rng: random.Random, level: int) -> tuple[str, Preference | None]:
    """A prompt of the training split and its row; None for the row if the draft cannot be used."""
    join = level == 3 and rng.random() < 0.6
    tables, (question, query) = _draft_join(rng) if join else _draft_single(rng, level)
    schema = "; ".join(table.schema for table in tables)
    example = SQLExample(schema, question, query.sql, level, "".join(table.script for table in tables))
    wrong = _near_misses(query, tables)
    if not wrong or _is_eval(schema, question):
        return example.prompt, None
    connection = _open(example.setup)
    sound = _sound(connection, query, tables)  # every near miss gives another result than the gold query
    connection.close()
    if not sound:
        return example.prompt, None
    return example.prompt, preference(example.prompt, query.sql, rng.choice(wrong))


def preference(prompt: str, chosen: str, rejected: str) -> Preference:
    """A row of TRL's conversational preference format."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
