"""Prompt suites, jailbreak transforms, judges, utility, and rates with intervals."""

from spf.evaluation.judges import ClassifierJudge, LLMJudge, agreement, first_token_refusals, prefix_judge
from spf.evaluation.metrics import Mean, PairedDifference, Rate, mean_interval, paired_difference, wilson_interval
from spf.evaluation.perplexity import Perplexity, neutral_texts, perplexity
from spf.evaluation.run import evaluate_refusals
from spf.evaluation.suites import Suite, load_suite
from spf.evaluation.transforms import TRANSFORMS, Attack, Transform, after_stub, prefill_transform
from spf.evaluation.utility import exact_match, lm_eval_tasks, rouge_l, token_f1
from spf.text.generation import generate_answers
from spf.text.refusal import first_sentence, is_refusal

__all__ = [
    "TRANSFORMS",
    "Attack",
    "ClassifierJudge",
    "LLMJudge",
    "Mean",
    "PairedDifference",
    "Perplexity",
    "Rate",
    "Suite",
    "Transform",
    "after_stub",
    "agreement",
    "evaluate_refusals",
    "exact_match",
    "first_sentence",
    "first_token_refusals",
    "generate_answers",
    "is_refusal",
    "lm_eval_tasks",
    "load_suite",
    "mean_interval",
    "neutral_texts",
    "paired_difference",
    "perplexity",
    "prefill_transform",
    "prefix_judge",
    "rouge_l",
    "token_f1",
    "wilson_interval",
]
