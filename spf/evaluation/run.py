"""A whole evaluation: refusals, jailbreaks, perplexity and tasks of one model, compared with another's."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from pydantic import Field, model_validator
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.config import STRICT, Count, File, Interval, Share, check_values, read_json
from spf.errors import ChatError
from spf.evaluation.judges import Judge, prefix_judge
from spf.evaluation.metrics import Rate, paired_difference
from spf.evaluation.suites import Suite
from spf.evaluation.transforms import TRANSFORMS, Transform, after_stub
from spf.text.chat import SWITCHES, render_chat
from spf.text.generation import begun, generate_answers, positions
from spf.text.refusal import VERSION


def evaluate_refusals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    transform: Transform | None = None,
    judge: Judge = prefix_judge,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    description: str = "generating",
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
) -> list[bool]:
    """Whether the model refuses each prompt, put to it through `transform` if one is given.

    The judge reads the prompt as it was before the transform, and of the answer what `after_stub` leaves.

    options: variables of the chat template (`chat_template_kwargs`). system_prompt: stands before every prompt.

    Raises:
        ChatError: the chat template refuses the transform's messages, or leaves out what they say.
    """
    attacks = [(transform or Transform()).apply(prompt, system_prompt) for prompt in prompts]
    try:
        answers = generate_answers(
            model,
            tokenizer,
            [attack.messages for attack in attacks],
            prefills=[attack.prefill for attack in attacks],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description=description,
            progress=progress,
            options=options,
        )
    except ChatError as error:
        raise ChatError(f"{description}: {error}") from error
    read = [after_stub(answer, attack.prefill) for answer, attack in zip(answers, attacks, strict=True)]
    return judge(prompts, read)


def renders(tokenizer: PreTrainedTokenizerBase, transform: Transform, options: Mapping[str, Any] | None = None) -> bool:
    """Whether the chat template takes the transform's messages; not every template has a system role."""
    try:
        render_chat(tokenizer, transform.apply("?").messages, generation_prompt=True, options=options)
    except ChatError:
        return False
    return True


def check_system_prompt(tokenizer: PreTrainedTokenizerBase, text: str, options: Mapping[str, Any] | None) -> None:
    """
    Raises:
        ChatError: the chat template refuses any messages.
        ValueError: it has no place for a system message.
    """
    render_chat(tokenizer, Transform().apply("?").messages, generation_prompt=True, options=options)
    if not renders(tokenizer, Transform(system=text), options):
        raise ValueError(
            "--system_prompt: the model's chat template has no place for a system message; begin the prompts of your "
            "own files (--harmful, --benign) with the text, as those of your product begin with it"
        )


def refuse_too_long(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[str, tuple[Suite, Transform]],
    max_new_tokens: int,
    options: Mapping[str, Any] | None,
    system_prompt: str | None,
) -> None:
    """asked: the prompts of each figure, and how they are put.

    Raises:
        ValueError: one leaves no room for an answer in what the model says that it takes.
    """
    if (limit := positions(model)) is None:
        return
    for figure, (suite, transform) in asked.items():
        for number, attack in enumerate(transform.apply(prompt, system_prompt) for prompt in suite.prompts):
            text = render_chat(tokenizer, attack.messages, generation_prompt=True, options=options)
            length = len(tokenizer(begun(tokenizer, text, attack.prefill), add_special_tokens=False)["input_ids"])
            if length + max_new_tokens - 1 > limit:
                raise ValueError(
                    f"{figure}: prompt {number + 1} of {suite.where} has {length} tokens, so {max_new_tokens} of an "
                    f"answer have no room in the {limit} that the model takes (max_position_embeddings); leave it or "
                    "the transform out, or ask for fewer tokens"
                )


def parse_transforms(names: str) -> list[str]:
    """Names of transforms from "all", "none" or a comma-separated list.

    Raises:
        ValueError: there is no such transform.
    """
    if names in ("all", "none"):
        return list(TRANSFORMS) if names == "all" else []
    chosen = [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in TRANSFORMS]:
        raise ValueError(f"transforms: no transform {', '.join(unknown)}; there are {', '.join(TRANSFORMS)}")
    return chosen


def settings(
    harmful: Suite,
    benign: Suite,
    judge: str,
    refusal_label: str | None,
    max_new_tokens: int,
    options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """What two evaluations must share to be compared, as a JSON-ready dictionary."""
    # language models may leave benign prompts to the prefix judge; the others know nothing of its rules
    version = 1 if judge in ("prefix-1", "words", "first-token") or refusal_label is not None else VERSION
    name = "prefix" if judge == "prefix-1" else judge
    return {
        "suites": {"harmful": _describe(harmful), "benign": _describe(benign)},
        "judge": {"name": name, "refusal_label": refusal_label, "version": version},
        "max_new_tokens": max_new_tokens,
        # a switch of thinking that is turned off is as if it were not given
        "chat_template_kwargs": {k: v for k, v in (options or {}).items() if not (k in SWITCHES and v is False)},
        "system_prompt": system_prompt,
    }


def _describe(suite: Suite) -> dict[str, object]:
    digest = hashlib.sha256(json.dumps(suite.prompts).encode()).hexdigest()
    return {"name": suite.name, "where": suite.where, "count": len(suite.prompts), "sha256": digest}


def evaluate_suites(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Suite,
    benign: Suite,
    *,
    transforms: Sequence[str] = (),
    judges: tuple[Judge, Judge] = (prefix_judge, prefix_judge),
    max_new_tokens: int = 32,
    batch_size: int = 32,
    options: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
) -> dict[str, Any]:
    """ASR plain and under each transform, and over-refusal, as a JSON-ready dictionary.

    `judges` read the answers to harmful and to benign prompts. For each figure ("asr", "asr/NAME" for a transform,
    "over_refusal") there are its value, FIGURE_ci (95 % Wilson interval) and FIGURE_count; `refused` holds the verdict
    on each prompt. No answers are kept.
    """
    plans: list[tuple[str, Suite, Transform | None, Judge]] = [
        ("asr", harmful, None, judges[0]),
        *((f"asr/{name}", harmful, TRANSFORMS[name], judges[0]) for name in transforms),
        ("over_refusal", benign, None, judges[1]),
    ]
    results: dict[str, Any] = {"refused": {}}
    for figure, suite, transform, judge in plans:
        verdicts = evaluate_refusals(
            model,
            tokenizer,
            suite.prompts,
            transform=transform,
            judge=judge,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description=figure,
            options=options,
            system_prompt=system_prompt,
        )
        rate = Rate(sum(_hits(figure, verdicts)), len(verdicts))
        results |= {figure: rate.value, f"{figure}_ci": rate.interval, f"{figure}_count": rate.count}
        results["refused"][figure] = verdicts
    return results


def _hits(figure: str, refused: Sequence[bool]) -> list[bool]:
    """What the figure counts: refusals for over-refusal, their absence for ASR."""
    return [verdict == (figure == "over_refusal") for verdict in refused]


class _Suite(File):
    name: str
    where: str
    count: Count
    sha256: str


class _Suites(File):
    harmful: _Suite
    benign: _Suite


class _Judge(File):
    name: str
    refusal_label: str | None
    version: int = 1


class _Results(File):
    """What `spf eval --output` writes of a model; of each figure NAME of `refused` there are NAME_ci and NAME_count."""

    model_config = STRICT | {"extra": "allow"}

    model: str
    suites: _Suites
    judge: _Judge
    max_new_tokens: Count
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    system_prompt: str | None = None
    refused: dict[str, list[bool]]

    @model_validator(mode="after")
    def figures_fit(self) -> "_Results":
        kinds: dict[str, Any] = dict.fromkeys(
            ("agreement", "over_refusal_judge", "reference", "comparison", "perplexity", "tasks", "versions"), Any
        )
        for name, verdicts in self.refused.items():
            suite = self.suites.benign if name == "over_refusal" else self.suites.harmful
            if name not in ("over_refusal", "asr") and name.removeprefix("asr/") not in TRANSFORMS:
                raise ValueError(f"`refused.{name}` is not known")
            if len(verdicts) != suite.count:
                raise ValueError(f"`refused.{name}` must be a list of {suite.count}, not of {len(verdicts)}")
            kinds |= {name: Share, f"{name}_ci": Interval, f"{name}_count": Count}
        found = self.model_extra or {}
        check_values(kinds, found, "`{}`")
        for name, verdicts in self.refused.items():
            if found.get(name) != sum(_hits(name, verdicts)) / len(verdicts):
                raise ValueError(f"`{name}` is not what `refused.{name}` says")
        return self


def read_reference(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The results of a former evaluation, to compare one with the settings `wanted`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no result of `spf eval`, or its prompts, judge, length of answers, variables of the chat
            template or system prompt are others.
    """
    remedy = f"write one with spf eval MODEL --output {path}"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {remedy}")
    reference = read_json(_Results, path, f"not written by spf eval --output, or damaged; {remedy}").model_dump()
    options = shlex.quote(json.dumps(reference["chat_template_kwargs"]))
    remedies = {
        "judge": " (--judge prefix-1 is the prefix judge of version 1)",
        "max_new_tokens": "",
        "chat_template_kwargs": f"; give --chat_template_kwargs {options}",
    }
    for key, instead in remedies.items():
        if wanted[key] != reference[key]:
            raise ValueError(f"{path}: measured with {key} {reference[key]}, not {wanted[key]}{instead}")
    if wanted["system_prompt"] != (before := reference["system_prompt"]):
        said = "out a system prompt; leave out --system_prompt, or measure it again with that"
        if before is not None:
            said = f" the system prompt {shorten(before, 60, placeholder=' ...')!r}; give that by --system_prompt"
        raise ValueError(f"{path}: measured with{said}")
    for kind, suite in wanted["suites"].items():
        if suite["sha256"] != reference["suites"][kind]["sha256"]:
            raise ValueError(f"{path}: measured on other {kind} prompts ({reference['suites'][kind]['where']})")
    return reference


def compare(refused: dict[str, list[bool]], reference: dict[str, list[bool]]) -> dict[str, dict[str, Any]]:
    """Each figure minus the reference's on the same prompts: difference, 95 % interval and exact McNemar p.

    Both map figures to verdicts, prompt by prompt; a figure that only one of them has is left out.
    """
    comparison = {}
    for figure in refused:
        if figure in reference:
            found = paired_difference(_hits(figure, refused[figure]), _hits(figure, reference[figure]))
            comparison[figure] = {"difference": found.difference, "ci": found.interval, "p": found.p_value}
    return comparison


def results_table(results: dict[str, Any]) -> Table:
    """The figures as a table: each with its 95 % interval, what it was counted over, and the paired difference."""
    comparison = results.get("comparison", {})
    table = Table("figure", "value", "95 % interval", "over", title=str(results["model"]))
    if comparison:
        table.add_column(f"minus {results['reference']}, paired")
    for figure, verdicts in results["refused"].items():
        row = [
            figure,
            f"{results[figure]:.1%}",
            _interval(results[f"{figure}_ci"], "{:.1%}"),
            f"{len(verdicts)} prompts",
        ]
        if found := comparison.get(figure):
            points = _interval([100 * bound for bound in found["ci"]], "{:+.1f}")
            row.append(f"{100 * found['difference']:+.1f} points ({points}), p = {found['p']:.2g}")
        table.add_row(*row)
    if found := results.get("perplexity"):
        table.add_row(
            "perplexity", f"{found['value']:.2f}", _interval(found["ci"], "{:.2f}"), f"{found['tokens']} tokens"
        )
    for task, metrics in results.get("tasks", {}).items():
        for metric, found in metrics.items():
            interval = _interval(found["ci"], "{:.3f}") if found["ci"] else "not given"
            table.add_row(f"{task}, {metric}", f"{found['value']:.3f}", interval, f"{found['count']} examples")
    return table


def _interval(bounds: Sequence[float], form: str) -> str:
    return f"{form.format(bounds[0])} to {form.format(bounds[1])}"
