"""The model card's section on safety: which rule, what was held, what was refused before and after, what was proven."""

import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from spf.conflicts import TOLD_BY
from spf.files import replace_file, write_json
from spf.sharding import is_first

VERDICT_FILE = "spf_verdict.json"
"""What a run's last line says, for programs; lies where the model card does."""

BEGIN, END = "<!-- spf: begin -->", "<!-- spf: end -->"

EMPTY = "---\ntags:\n- spf\n---\n"
"""A card that nobody has written yet; what libraries add to one keeps our section."""


class ModelCard:
    """Puts a section into the README.md of a run's output, also where a trainer writes that file anew."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        """What the run said of itself when it began."""
        self._section = ""

    def follow(self, trainer: Trainer) -> None:
        """Have the section added whenever this trainer writes its card."""
        create = trainer.create_model_card

        @functools.wraps(create)
        def created(*args: Any, **kwargs: Any) -> None:
            create(*args, **kwargs)
            if is_first():
                self._add(Path(str(trainer.args.output_dir)))

        trainer.create_model_card = created  # type: ignore[method-assign]

    def begin(self, lines: Sequence[str], directory: Path) -> None:
        """A run begins, of which nothing can be said yet; what an earlier one said in `directory` is not of this."""
        self.begun, self._section = list(lines), ""
        (directory / VERDICT_FILE).unlink(missing_ok=True)
        path = directory / "README.md"
        text = path.read_text("utf-8") if path.is_file() else ""
        if BEGIN in text:
            replace_file(path, "\n\n".join(part for part in _around(text) if part).encode("utf-8"))

    def finish(self, args: TrainingArguments, rule: object, verdict: str, proof: str, seen: Mapping[str, Any]) -> None:
        """Write the section and the verdict's file, on the first process. verdict, proof: what the run says of itself
        at its end; seen: what the verdict is of, for the file."""
        if not is_first():
            return
        said = "\n".join(f"- {line}" for line in [verdict, *self.begun, proof])
        self._section = (
            f"{BEGIN}\n## Safety\n\nFine-tuned with `SafetyCallback` of spf {version('spf')}, which keeps an aligned "
            f"model's refusals: `{rule!r}`.\n\n{said}\n\nWatched prompts are not among those that are held. Attack "
            f"success rate and over-refusal are measured by `spf eval`. In what the training data attack, {TOLD_BY}.\n"
            f"{END}\n"
        )
        self._add(Path(str(args.output_dir)))
        write_json(Path(str(args.output_dir)) / VERDICT_FILE, {**seen, "proof": proof, "lines": self.begun})

    def _add(self, directory: Path) -> None:
        if not self._section:
            return
        path = directory / "README.md"
        text = path.read_text("utf-8") if path.is_file() else EMPTY
        before, after = _around(text)
        text = f"{before}\n\n{self._section}" + (f"\n{after}" if after else "")
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode("utf-8"))


def _around(text: str) -> tuple[str, str]:
    """What stands before and behind the section; if somebody cut its end mark, it ends before the next heading."""
    before, _, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not ended:
        _, heading, after = rest.removeprefix("\n## Safety").partition("\n#")
        after = heading + after
    return before.rstrip(), after.lstrip("\n")
