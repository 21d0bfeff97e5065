"""A task that the model refuses itself lies beside what is held: fewer directions are held to begin with."""

import pytest

import spf.audit
import spf.conflicts
from spf import NullSpace, SafetyCallback
from tests.test_audit import PAIRS, refusing, rows, run, tokenizer  # noqa: F401
from tests.test_callback import assert_holds, safety_data

HALF = "input directions a matrix to begin with (half as many as by default: the model refuses much of the task itself)"


@pytest.mark.parametrize(
    ("harmless", "options", "rule", "share"),
    [
        (3, {}, {}, 6),  # of 24 rows, a tenth or more
        (2, {}, {}, 3),
        (3, {"conflicts": "hold-all"}, {}, 3),
        (3, {}, {"task_rows": 4}, 3),
        (3, {}, {"rank": 10}, None),
        # what is missing could not be added
        (3, {"on_leak": "warn"}, {}, 3),
        (3, {}, {"reserve": 0}, 3),
    ],
)
def test_beside_a_task_that_the_model_refuses_fewer_directions_are_held(
    harmless,
    options,
    rule,
    share,
    tmp_path,
    tokenizer,  # noqa: F811
    refusing,  # noqa: F811
    rows,  # noqa: F811
    monkeypatch,
    caplog,
):
    assert spf.conflicts.TASK_ROWS == 8
    rule = dict(rule)
    monkeypatch.setattr(spf.conflicts, "TASK_ROWS", rule.pop("task_rows", 3))
    kinds = ["harmless"] * harmless + ["harmful"] * 12
    monkeypatch.setattr(spf.audit, "looks", lambda model, tokenizer, prompts, *_, **__: kinds[: len(prompts)])
    callback = SafetyCallback(safety_data(rows[:9]), NullSpace(**rule), **options)
    trainer, _ = run(tmp_path, tokenizer, refusing, rows[:9], PAIRS, given=callback, max_steps=2)
    trainer.train()
    found, subspace = callback.audit, callback.attachment.subspace
    assert len(found.over_refusals) == (0 if options.get("conflicts") else harmless)
    widths = {V.shape[1] if share is None else len(V) // V.shape[1] for V in subspace.right.values()}
    assert widths == {share or 10}
    assert (HALF in caplog.text) == (share == 6)
    if share == 6:
        # the next ones are at hand: what is held by default comes first
        assert all(subspace.reserve[name].shape[1] >= V.shape[1] for name, V in subspace.right.items())
    assert_holds(callback.attachment)
