"""docs/support_matrix.md says what is so: rows are made anew and looked for in it."""

import pytest

from tests.support_matrix import FAMILIES, PAGE, TUNINGS, attempt, refusals, row

QUICK = ("llama", "gpt2")


def check(family):
    results = {tuning: attempt(family, tuning) for tuning in TUNINGS}
    line = row(family, results)
    assert line in PAGE.read_text("utf-8").splitlines(), f"python -m tests.support_matrix --write; {line}"
    for result in results.values():
        if result["outcome"] == "held":
            assert result["error"] <= 1e-6


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind in QUICK], ids=lambda f: f.kind)
def test_the_page_is_true(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.kind not in QUICK], ids=lambda f: f.kind)
def test_the_rest_of_the_page_is_true(family):
    check(family)


def test_every_family_and_refusal_is_on_the_page():
    text = PAGE.read_text("utf-8")
    assert len(FAMILIES) >= 40
    assert all(f"| `{family.kind}` |" in text for family in FAMILIES)
    said = refusals()
    assert len(said) == 5
    assert all(f"| {what} | {sentence} |" in text for what, sentence in said.items())
