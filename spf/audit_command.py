"""`spf audit`: what a training data set attacks, before anything is trained."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console

from spf.arguments import AuditArguments
from spf.audit import CACHE_FILE, LIST_FILE, audit_data
from spf.conflicts import REFUSES_NONE, REFUSES_NONE_REMEDY, TOLD_BY, Audit, distinct
from spf.data import SafetyDataError, SafetyRow, ask_refusals, in_turn, load_safety_rows
from spf.data.examples import may_be_kto
from spf.data.training import load_training_data
from spf.errors import RunFailedError, keeping, working
from spf.files import atomic_path, check_output_file, directory_lock
from spf.leaving_out import is_packed, without
from spf.models import load_model, machine_device
from spf.text.chat import parse_options
from spf.text.generation import context_length

FORMS = "see the forms of data that are read in docs/how_it_works.md, or leave these rows out"

OWN_REFUSALS = 64
"""As many refusals of the model's own are asked for, to see how it refuses."""


def run_audit(args: AuditArguments) -> None:
    """Audit, write the list, print the counts.

    Raises:
        ValueError: a mistake in the arguments or in what they name, or no row could be read.
        RunFailedError: more than `fail_over` of the rows have a conflict, or could not be audited.
    """
    if args.clean:
        _check_clean(Path(args.clean), Path(args.output))
    for option, place in (("output", args.output), ("clean", args.clean)):
        if place and Path(args.data).resolve() in (Path(place).resolve(), *Path(place).resolve().parents):
            raise ValueError(f"--{option} {place}: is of the data that are audited, or would be; name another")
    output, options = Path(args.output), parse_options(args.chat_template_kwargs)
    rows, data = _of_both_kinds(load_safety_rows(args.safety_data)), load_training_data(args.data)
    if args.split not in data:
        raise ValueError(f"--split: {args.data} has no split {args.split!r}; it has {', '.join(data)}")
    whole = data[args.split]
    dataset = _labels_as_said(whole, args)
    with directory_lock(output):
        model, tokenizer = load_model(args.model)
        model = model.to(machine_device())  # type: ignore[arg-type]
        with keeping(lambda: _kept(output)):
            own = ask_refusals(rows, model, tokenizer, wanted=OWN_REFUSALS, options=options).rows
            limit = context_length(model, tokenizer)
            with working():
                found = audit_data(dataset, model, tokenizer, own, max_length=limit, options=options, directory=output)
            if found.unread == found.rows:
                raise SafetyDataError(f"{args.data}: none of {found.rows} rows could be audited ({found.why}); {FORMS}")
            if args.clean:
                if not found.refuses:
                    raise SafetyDataError(f"{REFUSES_NONE}, so --clean cannot tell what is; {REFUSES_NONE_REMEDY}")
                with working():
                    _write_clean(whole, found, Path(args.clean))
    _tell(found, args, tokenizer)
    if args.fail_over is not None and not found.refuses:
        raise RunFailedError(f"{REFUSES_NONE}, so --fail_over cannot say that there are few; {REFUSES_NONE_REMEDY}")
    if args.fail_over is not None and found.unread > args.fail_over * found.rows:
        raise RunFailedError(
            f"{found.unread} of {found.rows} rows could not be audited ({found.why}), more than --fail_over "
            f"{args.fail_over:g}, so nothing can be said of them; {FORMS}"
        )
    if args.fail_over is not None and found.share > args.fail_over:
        raise RunFailedError(
            f"{found.share:.2%} of the rows answer prompts that the model refuses, more than --fail_over "
            f"{args.fail_over:g}"
        )


def _labels_as_said(dataset: Dataset, args: AuditArguments) -> Dataset:
    """Without the column `label` if it is none of KTO's.

    Raises:
        ValueError: it may be one, by which answers are taken for undesirable, and --fail_over would go by that; or
            --label is given, and there is none.
    """
    may_be = may_be_kto(dataset.column_names)
    if not may_be and args.label != "unknown":
        raise ValueError(f"--label {args.label}: {args.data} has no column label beside completion")
    if may_be and args.label == "unknown" and args.fail_over is not None:
        raise ValueError(
            f"{args.data} has a column label, by which KTO takes answers for undesirable, so that they are no "
            "conflicts: for --fail_over say --label kto if it is that, or --label none"
        )
    return dataset.remove_columns("label") if may_be and args.label == "none" else dataset


def _check_clean(path: Path, output: Path) -> None:
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise ValueError(f"--clean {path}: is written as JSON Lines; name a .jsonl file")
    if path.resolve() in [(output / name).resolve() for name in (LIST_FILE, CACHE_FILE)]:
        raise ValueError(f"--clean {path}: the audit writes a file of its own there; name another")
    check_output_file(path)


def _of_both_kinds(rows: list[SafetyRow]) -> list[SafetyRow]:
    """The rows without a refusal, and those with one in any order, in turn, so that both are among the first."""
    bare = [row for row in rows if row.refusal is None]
    given = in_turn([row for row in rows if row.refusal is not None], 0)
    return [row for pair in zip_longest(bare, given) for row in pair if row is not None]


def _kept(output: Path) -> str:
    if (output / CACHE_FILE).is_file():
        return f"what was asked is kept in {output / CACHE_FILE}; the same command goes on"
    return "nothing was written"


def _write_clean(dataset: Dataset, found: Audit, path: Path) -> None:
    with atomic_path(path) as temporary:
        without(dataset, found.pressing, is_packed(dataset)).to_json(temporary)


def _tell(found: Audit, args: AuditArguments, tokenizer: Any) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(found.counts())
    if found.undesired:
        console.print(found.labelled())
    if found.unread:
        console.print(f"{found.unread} rows could not be audited ({found.why})")
    if found.refusing:
        console.print(
            f"{found.refusing} training answers to refused prompts begin as refusals do, and are taken for such: how "
            "they go on is not read"
        )
    console.print(TOLD_BY if found.refuses else REFUSES_NONE)
    if found.unlike:
        console.print(found.other_scripts())
    kinds = {"conflict": found.conflicts, "might be refused": found.leaning, "over-refusal": found.over_refusals}
    if (Path(args.output) / CACHE_FILE).is_file():
        console.print(
            f"A run takes it with SafetyCallback(audited={args.output!r}), or spf train --safety_audited {args.output}"
        )
    if any(kinds.values()):
        console.print(
            f"List: {Path(args.output) / LIST_FILE} (row, document of a packed one, hash of the prompt, probability of "
            "a refusal, refused, over-refusal, unclear)"
        )
    for kind, conflicts in kinds.items() if args.show else ():
        for conflict in conflicts:
            text = tokenizer.decode(list(conflict.prompt_ids), skip_special_tokens=True)
            row = f"{conflict.row}, document {conflict.document}" if found.packed else conflict.row
            console.print(f"{row}\t{conflict.probability:.2f}\t{kind}\t{' '.join(str(text).split())}")
    if args.clean:
        more = len(found.pressing) - distinct(found.conflicts)
        might = f", and without {more} more that it might refuse" if more else ""
        unread = f"; WITH {found.unread} that could not be audited" if found.unread else ""
        console.print(f"Without the {found.unit} that answer them{might}{unread}: {args.clean}")
