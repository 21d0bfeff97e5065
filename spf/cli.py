"""The `spf` command."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from yaml import YAMLError

from spf import arguments as given
from spf import words
from spf.errors import INPUT_ERRORS, CorrectionError, RunFailedError, UnsupportedSetupError, keeping
from spf.waiting import waiting

SOON = 0.1
"""Seconds after which an ignored interrupt is sent again."""

USAGE = """spf keeps an aligned language model's refusals while you fine-tune it.

  spf demo            fine-tune a small aligned model on text-to-SQL, with and without spf; draws the plot
  spf train CONFIG    fine-tuning with TRL (SFT, DPO, KTO, GRPO) and SafetyCallback (YAML or --flags; accelerate launch)
  spf audit DATA      which training examples answer prompts that --model refuses; an exit code for CI
  spf eval MODEL      attack success rate, over-refusal, jailbreaks; compared with another model if you name one
  spf bench CONFIG    safety-utility curves against every alternative: a grid of fine-tuning runs, resumable
  spf align MODEL     teach a chat model to refuse (how the demo model was made)
  spf lock COMMAND    SafetyLock: extract, apply, remove, inspect, tune (spf lock shows how)
  spf study COMMAND   the mechanistic study: run (a synthetic world), measure (any model before and after fine-tuning),
                      report (several seeds together)
  spf report RUN      redraw the plot and the HTML report of a run of spf demo from its results.json

  spf COMMAND --help  its options
  spf --version       of spf and what it stands on
  spf --print_completion bash|zsh|fish|tcsh
                      a script that completes commands and options with the tab key
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


LOCK_USAGE = """spf lock pushes any fine-tuned descendant of an aligned model back to refusing, without training.

  spf lock extract MODEL LOCK       make a lock file from the original aligned model
  spf lock apply MODEL LOCK OUTPUT  save a fine-tuned descendant with the lock in its biases
  spf lock remove LOCKED OUTPUT     undo that, bit by bit
  spf lock inspect LOCK             what a lock file holds; --model MODEL: whether it fits
  spf lock tune MODEL LOCK OUTPUT   sweep K and alpha on validation prompts; draws the curves, writes the tuned lock

  spf lock COMMAND --help           its options"""


TRAIN_USAGE = "spf train [CONFIG.yaml] [--option value ...]"

TRAIN_HELP = """\
--trainer sft (the default), dpo, kto or grpo (with --reward_funcs FILE.py:FUNCTION) says which of TRL's trainers runs.
The data set is a JSON, JSONL or CSV file, a directory of them, or a hub id, in any format that trainer takes.
Everything else is TRL's, as flags or in the YAML file: --model_name_or_path (or --model), --dataset_name (--data),
--output_dir (--output), --learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size (--batch_size),
--seed, --use_peft, --lora_r, --lora_target_modules, --load_in_4bit, --report_to, --resume_from_checkpoint.
spf train --help_all lists them all; that takes some seconds."""


@dataclass(frozen=True)
class Command:
    """arguments: its dataclass. run: module and function that is given them, imported when it runs."""

    arguments: Any
    run: str


COMMANDS = {
    "demo": Command(given.DemoArguments, "spf.lab.demo.run:run_demo"),
    "train": Command(given.SafetyArguments, "spf.train:main"),
    "audit": Command(given.AuditArguments, "spf.audit_command:run_audit"),
    "eval": Command(given.EvalArguments, "spf.evaluation.command:evaluate"),
    "align": Command(given.AlignArguments, "spf.lab.align:align"),
    "bench": Command(given.BenchArguments, "spf.lab.bench.grid:run_bench"),
    "lock extract": Command(given.ExtractArguments, "spf.safetylock.command:extract_lock"),
    "lock apply": Command(given.ApplyArguments, "spf.safetylock.command:apply_lock"),
    "lock remove": Command(given.RemoveArguments, "spf.safetylock.command:remove_lock"),
    "lock inspect": Command(given.InspectArguments, "spf.safetylock.command:inspect_lock"),
    "lock tune": Command(given.TuneArguments, "spf.safetylock.command:tune_lock"),
    "study run": Command(given.RunArguments, "spf.lab.study.run:run_study"),
    "study measure": Command(given.MeasureArguments, "spf.lab.study.measure:measure_checkpoints"),
    "study report": Command(given.SeedsArguments, "spf.lab.study.report:report_runs"),
    "report": Command(given.ReportArguments, "spf.cli:redraw"),
}

GROUPS = {"lock": LOCK_USAGE, "study": STUDY_USAGE}
"""Commands that have commands, and what they say when they are given none."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. A mistake in the input ends in one sentence, not in a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    first = arguments[0] if arguments else ""
    if first in ("", "-h", "--help"):
        print(USAGE if arguments else FIRST)
        return 0
    if first == "--version":
        print(", ".join(f"{name} {version(name)}" for name in ("spf", "torch", "transformers", "trl", "peft")))
        return 0
    former, forget = _raise_on_signals(), sys.unraisablehook
    sys.unraisablehook = _again
    try:
        if first == "--print_completion":
            print(_completion(arguments[1:]))
        elif first in GROUPS:
            _run_group(first, words.expanded(arguments[1:]))
        elif first in COMMANDS:
            _run(first, words.expanded(arguments[1:]))
        else:
            raise ValueError(f"no command {first!r}; spf --help lists them")
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback:
            traceback.print_exc()
        code, sentence = _verdict(error)
        _end_bars()
        # of several processes that are interrupted together, one speaks
        if not _interrupt_in(error) or os.environ.get("RANK", "0") == "0":
            print(f"spf: {sentence}", file=sys.stderr)
        return code
    except SystemExit as error:  # argparse, after it printed a help text
        return int(error.code or 0)
    finally:
        sys.unraisablehook = forget
        for number, handler in former.items():
            signal.signal(number, handler)
    return 0


def _run_group(group: str, arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(GROUPS[group])
        return
    name = f"{group} {arguments[0]}"
    if name not in COMMANDS:
        there = [command.removeprefix(f"{group} ") for command in COMMANDS if command.startswith(f"{group} ")]
        raise ValueError(f"no command {name!r}; there are {', '.join(there)}")
    _run(name, arguments[1:])


def _run(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    parsed: Any = arguments
    if name != "train":
        parsed = words.parse(command.arguments, name, arguments)
    elif {"-h", "--help"} & set(arguments):
        parser = words.parser_of(command.arguments, name, epilog=TRAIN_HELP)
        parser.usage = TRAIN_USAGE
        parser.print_help()
        return
    module, function = command.run.split(":")
    # the first import of torch takes seconds, of TRL on a slow machine half a minute
    with keeping(lambda: "nothing was written"), waiting("loading torch, transformers and TRL"):
        run: Callable[[Any], None] = getattr(_loaded(module, name), function)
    run(parsed)


def _loaded(module: str, name: str) -> ModuleType:
    """
    Raises:
        UnsupportedSetupError: TRL is one that this command cannot use, as frameworks pin that spf's callback works in.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # of its trainers TRL turns the one into the other
        if "trl" not in str(error):
            raise
        raise UnsupportedSetupError(
            f"spf {name} cannot use the installed TRL {version('trl')} ({str(error).splitlines()[-1]}): pip install -U "
            "trl, or use SafetyCallback, which needs no TRL, in your own script"
        ) from error


def _completion(arguments: list[str]) -> str:
    """The script that a shell reads to complete `spf`."""
    import argparse

    import shtab

    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"--print_completion needs the name of a shell: {', '.join(shtab.SUPPORTED_SHELLS)}")
    root = argparse.ArgumentParser(prog="spf", add_help=False)
    for flag in ("--help", "--version", "--print_completion", "--traceback"):
        root.add_argument(flag)
    commands = root.add_subparsers()
    groups = {name: commands.add_parser(name, help=GROUPS[name].splitlines()[0]).add_subparsers() for name in GROUPS}
    for name, command in COMMANDS.items():
        *group, last = name.split()
        made = words.parser_of(command.arguments, name, add_help=False)
        if name == "train":
            made.add_argument("config", nargs="?")
            for flag in ("help_all", "trainer", "reward_funcs", *given.TRAIN_NAMES, *given.TRAIN_NAMES.values()):
                made.add_argument(f"--{flag}")
        for action in made._actions:
            if action.type in (None, str) and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        (groups[group[0]] if group else commands).add_parser(last, parents=[made], help=made.description)
    return str(shtab.complete(root, arguments[0]))


def _end_bars() -> None:
    """What broke off left its progress bars open: the sentence stands on a line of its own, and is the last one."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            with suppress(AttributeError):  # of one that was being made when the interrupt came
                bar.close()


def _again(ignored: "sys.UnraisableHookArgs") -> None:
    """Send an interrupt once more that Python has ignored: raised while an object was taken down, it ends nothing."""
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        number = _number_of(ignored.exc_value)
        # not from here, where it would be ignored again
        timer = threading.Timer(SOON, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(ignored)


class _Signalled(KeyboardInterrupt):
    """SIGTERM unwinds like Ctrl-C, so that temporary files and locks are cleaned up.

    Ctrl-C has this class too: where it breaks off an `exec` of text, as dataclasses make their methods, Python ends
    `python -m spf` by the signal, whatever `main` returns, but only for KeyboardInterrupt itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _raise_on_signals() -> dict[int, Any]:
    """The handlers that were there; one that is not Python's own for Ctrl-C (or that ignores it) is left."""

    def stop(number: int, frame: Any) -> None:
        raise _Signalled(number)

    # Python sets handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    return {number: signal.signal(number, stop) for number in numbers}


def _interrupt_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """What was being ended when this failed: what breaks off in its middle is not always ended without an error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _number_of(error: KeyboardInterrupt) -> int:
    return error.number if isinstance(error, _Signalled) else signal.SIGINT


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence: 2 for input, 1 for a run that failed, 130 and 143 for an interrupt."""
    # What was kept is said by the command that knows it, as a note on the exception.
    kept = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        return 128 + _number_of(error), f"interrupted{kept}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentence, code = (lines[0] if lines else type(error).__name__), 1
    if isinstance(error, YAMLError):
        sentence = " ".join(lines)  # its first line does not say where
    if isinstance(error, CorrectionError | RunFailedError):
        sentence += kept
    elif isinstance(error, (ModuleNotFoundError, OSError, ValueError, YAMLError, *INPUT_ERRORS)):
        code = 2
    else:
        sentence = f"{type(error).__name__}: {sentence} (--traceback shows where)"
    if interrupt := _interrupt_in(error):
        return 128 + _number_of(interrupt), f"interrupted, and ending it failed: {sentence}"
    return code, sentence


def redraw(args: given.ReportArguments) -> None:
    """`spf report`."""
    from rich.console import Console

    from spf.files import check_output_directory
    from spf.lab.demo.report import demo_table, load_results, plot_demo, write_report

    path = Path(args.run) / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; name the directory of a run")
    check_output_directory(path.parent)
    results = load_results(path)
    Console().print(demo_table(results))
    print(f"Plot:   {plot_demo(results, Path(args.run) / 'safety_utility.png')}")
    print(f"Report: {write_report(results, Path(args.run))}")


if __name__ == "__main__":
    sys.exit(main())
