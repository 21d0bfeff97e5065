"""A rule from outside the package: one file and one import, and every part of spf knows it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from spf import CorrectionError, SafetyCallback
from spf.arguments import SafetyArguments
from spf.named import make_callback
from spf.rules import RULES, Rule
from tests.conftest import make_model
from tests.test_callback import make_trainer, safety_data

RULE = '''
"""Clip the norm of what the gradient has in the safety subspace."""

from dataclasses import dataclass, field

from spf.config import Count, Positive
from spf.linalg import exact_matmul
from spf.rules import Correction, Given, Rule


@dataclass(frozen=True)
class ClipSafety(Rule):
    """|G V| <= most, V the leading right singular vectors of the safety gradient."""

    most: Positive = field(default=0.01, metadata={"help": "largest norm inside the subspace"})
    rank: Count = field(default=4, metadata={"help": "singular vectors per matrix"})

    name = "clip-safety"

    def prepare(self, run, given: Given):
        return Clipping(run, self)


class Clipping(Correction):
    def __init__(self, run, rule):
        super().__init__(run)
        self.rule = rule

    def before_step(self, gradients, here):
        removed = whole = 0.0
        if self.run.result is None:
            return
        for name, gradient in gradients.items():
            _, _, V = self.run.result.factors[name].svd(self.rule.rank)
            for block in self.run.blocks(name, gradient):
                inside = exact_matmul(block.tensor, V)
                excess = 1 - min(1.0, self.rule.most / max(float(inside.norm()), 1e-12))
                block.tensor.sub_(excess * exact_matmul(inside, V.T))
                removed += float((excess * inside).square().sum())
                whole += float(block.tensor.square().sum())
        self.run.removed(removed, whole)

    def proven(self):
        return f"the gradient's norm in the safety subspace was at most {self.rule.most}"
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The package of somebody else, with a rule in it."""
    (tmp_path / "their_rules.py").write_text(RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("their_rules")
    yield module
    RULES.pop("clip-safety", None)
    sys.modules.pop("their_rules", None)


def test_a_rule_of_ones_own_is_one_file_and_one_import(outside, tmp_path, tokenizer, rows, caplog):
    assert RULES["clip-safety"] is outside.ClipSafety
    assert issubclass(outside.ClipSafety, Rule)
    callback = SafetyCallback(safety_data(rows), "clip-safety")
    make_trainer(tmp_path, tokenizer, callback).train()
    assert callback.attachment.corrected == 4
    assert "at most 0.01" in caplog.records[-1].getMessage()
    # the command knows it, too
    assert make_callback(SafetyArguments(safety_rule="clip-safety")).rule == outside.ClipSafety()
    with pytest.raises(ValueError, match="clip-safety: most must be positive, not -1"):
        outside.ClipSafety(most=-1)


def test_its_checkpoints_go_on(outside, tmp_path, tokenizer, rows):
    def run(resume=None):
        callback = SafetyCallback(safety_data(rows), outside.ClipSafety(most=0.02))
        save = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path, tokenizer, callback, make_model(), **save)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole, resumed = run(), run(str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_hooks_of_a_rule_of_ones_own_are_followed(outside, tmp_path, tokenizer, rows):
    callback = SafetyCallback(safety_data(rows), outside.ClipSafety())
    trainer = make_trainer(tmp_path, tokenizer, callback)
    begin = callback.on_step_begin

    def take_off(args, state, control, **kwargs):
        begin(args, state, control, **kwargs)
        if state.global_step == 2:
            callback.attachment.optimizer._optimizer_step_pre_hooks.clear()
            callback.attachment.optimizer._optimizer_step_post_hooks.clear()

    callback.on_step_begin = take_off
    with pytest.raises(CorrectionError, match="without calling its step hooks"):
        trainer.train()


def test_no_rule_is_asked_for_by_type_outside_the_rules():
    """Adding one must not mean looking for places that name the others."""
    root = Path(__file__).parent.parent / "spf"
    names = {rule.__name__ for rule in RULES.values()}
    for path in root.rglob("*.py"):
        if "lab" in path.parts or "rules" in path.parts:
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if "isinstance(" in line:
                assert not any(f" {name}" in line or f", {name}" in line for name in names), f"{path}:{number}: {line}"
