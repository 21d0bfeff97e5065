"""Prompt suites, judges and rates."""

from spf.evaluation.generate import generate_answers
from spf.evaluation.judge import first_sentence, is_refusal
from spf.evaluation.metrics import Rate, wilson_interval

__all__ = ["Rate", "first_sentence", "generate_answers", "is_refusal", "wilson_interval"]
