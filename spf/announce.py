"""What a run says of itself: what is held and what it costs when training begins, and whether refusals are lost."""

from collections.abc import Mapping, Sequence

from spf.audit import LIST_FILE
from spf.conflicts import REFUSES_NONE, TAKE_OUT, distinct
from spf.data import SafetyRow
from spf.optimizer import Attachment, kept_fixed
from spf.rules import Rule
from spf.text.refusal import is_refusal
from spf.training_data import TrainingData, remaining, remedy

MOMENT = 0.05
"""Seconds; what takes less is not said."""

FEW = " (so few that a fall is not seen: give refusals that begin as the model's own do, or none: it is asked for them)"


def first_lines(
    running: Attachment, rows: Sequence[SafetyRow], at_hand: int, answered: int, took: Mapping[str, float]
) -> list[str]:
    """What is held, what is kept fixed, and what it costs, a line each.

    rows: the safety samples used, of `at_hand` that there were. answered: those left out because the model answers
    them. took: seconds that parts of the set-up took.
    """
    lines = [_samples(running, rows, at_hand, answered)]
    lines += kept_fixed(running)
    before = running.monitor.before
    parts = [f"{name} {seconds:.1f} s" for name, seconds in took.items() if seconds >= MOMENT or name == "bases"]
    lines.append(
        f"{before.refused:.0%} of {len(before.kept) or len(running.run.watched)} watched prompts refused by first "
        f"token{FEW * (before.refused < 0.5)}; safety loss {before.loss:.3f}"
        + (f"; learning rate x {running.lr_scale:.2f}" if running.lr_scale != 1 else "")
        + f"; before the first step: {', '.join(parts)}"
    )
    return lines


EARLIER = "held to the directions of an earlier run: other samples and conflicts as far as these reach"
"""Of a run that goes on with trained weights."""

FEWER = " to begin with (half as many as by default: the model refuses much of the task itself)"

MOVED = (
    "rows are left out and the trainer chooses its rows by a {} of its own: behind those left out the others have "
    "other numbers than in your data, so weights or indices by row must be made from trainer.train_dataset as it is "
    "when it is called; or train on the data without them: `spf audit DATA --model MODEL --clean FILE` writes these"
)
"""Of a run whose sampler may have been made for all rows."""

SHORTER = (
    "with these left out {epochs:g} epochs make about {share:.0%} of the steps that they did, by which a task may be "
    "learned less: num_train_epochs={as_many:.3g} makes as many"
)
"""Of a run whose length is told in epochs."""

OTHER_BASE = (
    "the weights below the adapter are not those that its directions were taken from (another base model or "
    "adapter, or another precision), so what is held are not this model's answers"
)

INERT = (
    "no more directions can be held in this run if refusals are lost (on_leak), since its subspace has none in reserve "
    "(NullSpace(reserve=0), energy or contrast, or a run that began with on_leak='warn'): then it is only said, or "
    "with 'stop' the run ended"
)
"""Of a run that is to hold more directions when prompts flip, and has none."""


PACKED = (
    " (its `row` is a packed row, `document` the example in it; `spf audit DATA --model MODEL` lists the rows of your "
    "file, with the same hashes as `prompt`)"
)
"""Of the list of a run whose rows are packed."""


def earlier_line(where: str) -> str:
    """Of a run that goes on with trained weights; `where` their subspace was found."""
    return f"going on with trained weights: what they are held to is that of {where}"


def audit_lines(data: TrainingData, rule: Rule, earlier: bool = False) -> list[str]:
    """What the training data attack, and what was done about it; earlier: only what an earlier run held can be."""
    found = data.found
    assert found is not None, "the data were not audited"
    conflicts, counts, where = data.conflicts, found.counts(), found.source or "the output directory"
    if found.conflicts or found.leaning:
        done = "allowed, so these refusals may be lost"
        if not rule.holds:
            done = f"the rule {rule.name} does not hold them; null-space does"
        elif conflicts != "allow":
            more = distinct(found.leaning)
            leaning = f", {more} more {found.unit} that it might refuse counted in," if more else ""
            done = (
                f"{len(data.held)} prompts held{leaning} with the model's own refusals ({len(data.watched)} watched "
                f"instead), {'as far as the earlier directions reach' if earlier else 'so they stay refused'}"
                if data.held
                else "no prompt held"
            )
        counts += f": {done}{_left_out(data)}; list in {LIST_FILE} of {where}"
        if found.packed and not found.source:
            counts += PACKED
    lines = [counts]
    unclear = len(found.unclear(data.left_out))
    if (found.over_refusals or unclear) and conflicts != "allow" and rule.holds:
        same = f"; {unclear} that may be of the same task are left out, and not held either" if unclear else ""
        lines.append(
            f"{distinct(found.over_refusals)} {found.unit} answer what the model refuses although it "
            f"looks harmless to itself, as ordinary tasks do: these refusals are not held, so they may be lost{same}; "
            "say conflicts='hold-all' to keep them, too"
        )
    if found.pressing and conflicts in ("hold", "hold-all") and rule.holds:
        share = len(found.pressing) / len(found.answers)
        which = "are left out" if data.left_out else "press against what is held"
        then = f"{TAKE_OUT}, which trains on every row that is there, so that refusals of its kind may be lost"
        lines.append(
            f"the model refuses or might refuse {share:.0%} of the training prompts: if that is your task, it "
            f"cannot be learned while these refusals are held; {then}"
            if share > 1 / 2
            else f"if the {found.unit} that {which} are your task and no attack: {then}"
        )
    if found.other_weights:
        lines.append(
            f"the audit in {found.source} was made with other weights than these, of the model before it was quantised "
            "or of another one: what it found may not hold"
        )
    if found.stream:
        lines.append(
            f"the training data are a stream: only the {found.rows} rows that one pass gives first were audited; what "
            "stands behind them, and what other passes or worker processes read, was not"
        )
    if not found.refuses:
        lines.append(REFUSES_NONE)
    elif found.unlike:
        lines.append(found.other_scripts())
    if found.undesired:
        lines.append(found.labelled())
    if found.why:
        which = f"{found.unread} training rows" if found.rows else "the training data"
        lines.append(f"{which} could not be audited, so what they attack is not held ({found.why})")
    return lines


def _left_out(data: TrainingData) -> str:
    """Which of the rows are not trained on, and why the others are."""
    assert data.found is not None, "the data were not audited"
    words, rows = "", data.found.unit
    if data.left_out:
        words += f"; {len(data.left_out)} {rows} are left out of training, {remaining(data)}"
    on = len(data.found.pressing) - len(data.left_out)
    if data.leaves_out and on:
        why = data.obstacle or "they teach other things, too"
        # the command tells over-refusals apart
        words += f"; {on} {rows} are trained on and press against what is held ({why})"
        words += f"; {remedy(data.obstacle)}" * (data.conflicts != "hold-all")
    return words


def _samples(running: Attachment, rows: Sequence[SafetyRow], at_hand: int, answered: int) -> str:
    """The rule, and how many safety samples it has and holds."""
    rule = running.rule
    line = f"rule {rule.name} on {len(running.matrices)} matrices; {len(rows)} safety samples"
    if at_hand != len(rows):
        line += f" of {at_hand}"
    unread = sum(row.refusal is not None and not row.own and not is_refusal(row.refusal) for row in rows)
    if unread:
        line += f" ({unread} of the given refusals do not read as one)"
    if answered:
        line += f" ({answered} left out: the model answers them instead of refusing)"
    if rule.holds:
        ranks = sorted({V.shape[1] for V in running.subspace.right.values()})
        directions = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        line += f", {rule.basis_samples(len(rows))} of them held in {directions} input directions a matrix"
        line += FEWER * ("fewer" in running.subspace.metadata)
    return line
