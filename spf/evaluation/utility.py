"""Utility: how well answers match their references, and standard tasks through lm-eval."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.evaluation.extras import import_extra
from spf.evaluation.metrics import Z95


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Whether each answer is its reference, white space apart (runs of it count as one blank).

    Raises:
        ValueError: the lengths differ.
    """
    _same_length("exact_match", answers, references)
    return [a.split() == r.split() for a, r in zip(answers, references, strict=True)]


def token_f1(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of each answer's words and its reference's, in any order, in [0, 1]: lower-cased, punctuation left out.

    Raises:
        ValueError: the lengths differ.
    """
    _same_length("token_f1", answers, references)
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
        both, all_words = (ours & theirs).total(), ours.total() + theirs.total()
        scores.append(2 * both / all_words if all_words else float(answer == reference))
    return scores


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each answer, in [0, 1]: lower-cased ASCII words and numbers, no stemming (Lin 2004).

    Raises:
        ValueError: the lengths differ.
        ModuleNotFoundError: the extra `eval` (rouge-score) is not installed.
    """
    _same_length("rouge_l", answers, references)
    scorer = import_extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Results of lm-eval tasks (names, or YAML files of your own) by task and metric: value, ci, count.

    ci: the 95 % normal interval from lm-eval's standard error, None where it gives none. `limit` takes the first
    examples of each task only. Most tasks download their data from the hub.

    Raises:
        ValueError: lm-eval knows no such task, or its data could not be downloaded.
        ModuleNotFoundError: the extra `lm-eval` is not installed.
    """
    lm_eval = import_extra("lm_eval", "lm-eval")
    manager = import_extra("lm_eval.tasks", "lm-eval").TaskManager()
    unknown = [task for task in tasks if task not in manager.all_tasks and not Path(task).is_file()]
    if unknown:
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    wrapped = import_extra("lm_eval.models.huggingface", "lm-eval").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    try:
        run = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,  # for metrics that are no means
            log_samples=False,
        )
    except ConnectionError as error:
        raise ValueError(f"the data of {', '.join(tasks)} could not be downloaded ({error})") from error
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for task, found in run["results"].items():
        results[task] = {}
        for key, value in found.items():
            # lm-eval writes METRIC,FILTER and METRIC_stderr,FILTER; the filter "none" is the usual one.
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            deviation = found.get(f"{metric}_stderr,{kept}")
            ci = (value - Z95 * deviation, value + Z95 * deviation) if isinstance(deviation, float) else None
            name = metric if kept == "none" else f"{metric} ({kept})"
            results[task][name] = {"value": value, "ci": ci, "count": found.get("sample_len")}
    return results


def _same_length(name: str, answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise ValueError(f"{name}: {len(answers)} answers for {len(references)} references")
