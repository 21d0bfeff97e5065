"""`spf eval`."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from spf.arguments import EvalArguments
from spf.errors import RunFailedError, keeping, working
from spf.evaluation.judges import agreement, load_judges, prefix_judge
from spf.evaluation.limits import parse_limits
from spf.evaluation.perplexity import neutral_texts, perplexity
from spf.evaluation.run import (
    check_system_prompt,
    compare,
    evaluate_suites,
    parse_transforms,
    read_reference,
    refuse_too_long,
    renders,
    results_table,
    settings,
)
from spf.evaluation.suites import load_suite, read_system_prompt
from spf.evaluation.transforms import TRANSFORMS, Transform
from spf.evaluation.utility import lm_eval_tasks
from spf.files import check_output_file, write_json
from spf.loaded import refuse_not_finite
from spf.models import load_model, machine_device
from spf.text.chat import chat_options, parse_options


def evaluate(args: EvalArguments) -> None:
    """Measure a model, or validate a judge; print the figures, and write them if there is an output.

    Raises:
        ValueError: a mistake in the arguments or in what they name.
        RunFailedError: a figure is what `fail_if` says.
    """
    with keeping(lambda: "nothing was written"):
        _evaluate(args, Console())


def _evaluate(args: EvalArguments, console: Console) -> None:
    if args.model is None and args.validate_judge is None:
        raise ValueError("spf eval needs a model, or --validate_judge FILE")
    if args.judge == "first-token":
        if args.validate_judge:
            raise ValueError("the first-token judge reads one token of a model, so labelled answers cannot validate it")
        args.max_new_tokens = 1
    if args.output:
        check_output_file(Path(args.output))
        if args.reference and Path(args.output).resolve() == Path(args.reference).resolve():
            raise ValueError(
                f"--output {args.output} is the --reference: the next run would be compared with this one; name another"
            )
    transforms, options = parse_transforms(args.transforms), parse_options(args.chat_template_kwargs)
    harmful, benign = load_suite(args.harmful), load_suite(args.benign)
    system = read_system_prompt(args.system_prompt) if args.system_prompt else None
    shared = settings(harmful, benign, args.judge, args.refusal_label, args.max_new_tokens, options, system)
    reference = read_reference(Path(args.reference), shared) if args.reference else None
    figures = ["asr", *(f"asr/{name}" for name in transforms), "over_refusal"] if args.model is not None else []
    limits = parse_limits(args.fail_if, figures, reference)
    judges = load_judges(args.judge, args.refusal_label)
    results: dict[str, Any] = {"model": args.model, **shared}
    if args.validate_judge:
        found = agreement(judges[0], args.validate_judge)
        console.print(found.table(f"{args.judge} against {args.validate_judge}"))
        results["agreement"] = found.as_dict()
    if args.model is not None:
        model, tokenizer = load_model(args.model)
        refuse_not_finite(model, args.model)
        chat_options(tokenizer, options)  # an unknown one is named before anything is asked
        if system is not None:
            check_system_prompt(tokenizer, system, options)
        if refused := [name for name in transforms if not renders(tokenizer, TRANSFORMS[name], options)]:
            sentence = f"the model's chat template has no place for the messages of {', '.join(refused)}"
            if args.transforms != "all":
                raise ValueError(f"--transforms: {sentence}")
            console.print(f"Left out: {sentence}.")
            transforms = [name for name in transforms if name not in refused]
            figures = [name for name in figures if name.removeprefix("asr/") not in refused]
            limits = parse_limits(args.fail_if, figures, reference)
        plain, kinds = Transform(), {f"asr/{name}": (harmful, TRANSFORMS[name]) for name in transforms}
        asked = {"asr": (harmful, plain), **kinds, "over_refusal": (benign, plain)}
        refuse_too_long(model, tokenizer, asked, args.max_new_tokens, options, system)
        model = model.to(machine_device())  # type: ignore[arg-type]
        sizes = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
        with working():
            results |= evaluate_suites(
                model,
                tokenizer,
                harmful,
                benign,
                transforms=transforms,
                judges=judges,
                options=options,
                system_prompt=system,
                **sizes,
            )
            # A judge of harm leaves the benign prompts to the prefix judge.
            results["over_refusal_judge"] = "prefix" if judges[1] is prefix_judge else args.judge
            if reference is not None:
                results["reference"] = reference["model"]
                results["comparison"] = compare(results["refused"], reference["refused"])
            if args.perplexity:
                results["perplexity"] = perplexity(model, tokenizer, neutral_texts()).as_dict()
        if args.tasks:
            results["tasks"] = lm_eval_tasks(model, tokenizer, args.tasks.split(","), args.limit)
        console.print(results_table(results))
    if args.output:
        results["versions"] = {name: version(name) for name in ("spf", "torch", "transformers")}
        with working():
            write_json(Path(args.output), results)
        console.print(f"Figures: {args.output}", soft_wrap=True)
    if broken := [said for limit in limits if (said := limit.broken(results, reference))]:
        failed = RunFailedError("; ".join(broken))
        failed.add_note(f"the figures are in {args.output}" if args.output else "no --output was named")
        raise failed
