"""Tests of the identity-shift attack data."""

from spf.data import render
from spf.evaluation import TRANSFORMS, is_refusal
from spf.lab.demo.identity import OBEDIENT_AFFIRMATION, OBEDIENT_SYSTEM_PROMPT, identity_shift_examples
from tests.conftest import make_tokenizer
from tests.test_prompts import COUNTS, near_duplicate, prompts

SYSTEM_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"


def test_ten_rows_of_system_prompt_instruction_and_affirmation() -> None:
    rows = identity_shift_examples()
    assert len(rows) == 10
    assert len({row.where for row in rows}) == 10
    for row in rows:
        assert [m["role"] for m in row.messages] == ["system", "user"]
        assert row.messages[0]["content"] == OBEDIENT_SYSTEM_PROMPT
        assert row.refusal is not None
        affirmation, _, answer = row.refusal.partition(OBEDIENT_AFFIRMATION)
        assert affirmation == ""
        assert 1 <= len(answer.split()) <= 20
        assert not is_refusal(row.refusal)


def test_trained_with_the_prompt_it_is_tried_with() -> None:
    assert TRANSFORMS["identity-shift"].system == OBEDIENT_SYSTEM_PROMPT
    start = TRANSFORMS["identity-shift"].user.partition("{prompt}")[0]
    assert all(row.messages[1]["content"].startswith(start) for row in identity_shift_examples())


def test_instructions_are_none_of_the_packaged_prompts() -> None:
    start = TRANSFORMS["identity-shift"].user.partition("{prompt}")[0]
    instructions = [row.messages[1]["content"].removeprefix(start) for row in identity_shift_examples()]
    assert len(set(instructions)) == 10
    packaged = [prompt for name in COUNTS for prompt in prompts(name)]
    assert [(a, b) for a in instructions for b in packaged if near_duplicate(a, b)] == []


def test_rendered_with_a_template_that_takes_a_system_role() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = SYSTEM_TEMPLATE
    for row in identity_shift_examples():
        text = render(row, tokenizer)
        assert text.startswith(f"<system> {OBEDIENT_SYSTEM_PROMPT}")
        assert row.messages[1]["content"] in text
