"""`spf eval --fail_if`: figures that end the command with exit code 1."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

FORM = re.compile(r"(?P<figure>[\w/-]+)\s*(?P<side>[<>])\s*(?P<bound>[+-]?\d+(\.\d+)?)")


@dataclass(frozen=True)
class Limit:
    """One condition. bound: percent, or with `relative` points more (or less) than the reference has."""

    text: str
    figure: str
    above: bool
    bound: float
    relative: bool

    def broken(self, results: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str | None:
        """What is wrong with the figures, in words; None if nothing is."""
        share = results[self.figure]
        found, what = 100 * share, f"{self.figure} is {share:.1%}"
        if self.relative:
            assert reference is not None
            found -= 100 * reference[self.figure]
            what += f", {found:+.1f} points against the reference"
        found = round(found, 9)  # 2 of 100 prompts are 2 points
        broken = found > self.bound if self.above else found < self.bound
        return f"{what} (--fail_if {self.text!r})" if broken else None

    def is_out_of_reach(self, reference: Mapping[str, Any] | None) -> bool:
        """Whether no share from 0 to 1 breaks it: it would pass whatever is measured."""
        room = (1.0 if self.above else 0.0) - (reference[self.figure] if reference is not None else 0.0)
        room = round(100 * room, 9)
        return room <= self.bound if self.above else room >= self.bound


def parse_limits(text: str | None, figures: Collection[str], reference: Mapping[str, Any] | None) -> list[Limit]:
    """The conditions of `--fail_if`, separated by commas: "asr > +2, over_refusal > 40".

    Raises:
        ValueError: one cannot be read, can never be so beside this reference, or is about a figure that is not
            measured, or not in the reference.
    """
    limits = []
    for part in [part.strip() for part in text.split(",")] if text is not None else []:
        read = FORM.fullmatch(part)
        if read is None:
            raise ValueError(
                f"--fail_if: {part!r} is not FIGURE > NUMBER or FIGURE < NUMBER, such as 'asr > 10' (percent) or "
                "'asr > +2' (points more than the --reference)"
            )
        limit = Limit(
            part, read["figure"], read["side"] == ">", float(read["bound"]), relative=read["bound"][0] in "+-"
        )
        if limit.figure not in figures:
            there = f"{', '.join(figures)} are" if figures else "without a model nothing is"
            raise ValueError(f"--fail_if: {limit.figure} is not measured; {there}")
        if limit.relative and (reference is None or limit.figure not in reference["refused"]):
            raise ValueError(
                f"--fail_if: {part!r} is points against a --reference, which "
                + ("is not given" if reference is None else f"has no {limit.figure}; measure it again")
            )
        if limit.relative and reference is not None and limit.is_out_of_reach(reference):
            why = " (it refuses too little to lose more)" * (limit.above and limit.figure != "over_refusal")
            raise ValueError(
                f"--fail_if: {part!r} can never be so: {limit.figure} of the reference {reference['model']} is "
                f"{reference[limit.figure]:.1%}{why}; name the results of another model, or a bound in percent, "
                "without a sign"
            )
        if not limit.relative and limit.is_out_of_reach(None):
            raise ValueError(f"--fail_if: {part!r} can never be so: figures are from 0 to 100 percent")
        limits.append(limit)
    return limits
