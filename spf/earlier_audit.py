"""An audit that was made before, of the same data: nothing is asked, so rows can be left out where the model is sharded
by the time that it can answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from spf.audit import CACHE_FILE, Beginnings, Kept, compare
from spf.config import read_json
from spf.conflicts import Audit
from spf.data import Anchor, SafetyDataError
from spf.data.columns import with_read_columns
from spf.data.examples import read_examples
from spf.errors import kind_of
from spf.next_token import Known, fingerprint
from spf.over_refusal import PROBE
from spf.scripts import unlike_scripts
from spf.sharding import sees_all


class EarlierAudit:
    """What `spf audit`, or a run, found; taken for the data of another run, whatever the order of their rows.

    Example:
        SafetyCallback(audited="spf-audit")  # after: spf audit DATA --model MODEL --output spf-audit
    """

    def __init__(self, directory: Path):
        """
        Raises:
            SafetyDataError: there is no audit that was finished.
        """
        self.directory = directory
        self.again = again = f"`spf audit DATA --model MODEL --output {directory}` makes it"
        try:
            kept = read_json(Kept, directory / CACHE_FILE, again)
        except FileNotFoundError as error:
            raise SafetyDataError(f"audited: {directory} holds no audit; {again}") from error
        except ValueError as error:
            raise SafetyDataError(f"audited: {error}") from error
        if kept.finished is None:
            raise SafetyDataError(f"audited: the audit in {directory} was not finished; {again}")
        self.asked, self.finished = set(kept.finished.asked), kept.finished

    def of(
        self,
        dataset: Any,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None,
        max_length: int,
        *,
        tell_apart: bool,
    ) -> Audit:
        """The audit of these data.

        Raises:
            SafetyDataError: it was made of other data, or does not tell over-refusals apart.
        """
        if tell_apart and (self.finished.harmless is None or self.finished.probe != PROBE):
            raise SafetyDataError(
                f"audited: the audit in {self.directory} does not tell over-refusals apart, since it was made by a run "
                "whose rule holds nothing or that has conflicts='hold-all' or 'allow', or by another version of spf; "
                f"{self.again} anew"
            )
        if not isinstance(dataset, Dataset):
            raise SafetyDataError(
                f"audited: of {kind_of(dataset)} rows are not compared with an earlier audit; leave audited= "
                "out, or give a Dataset"
            )
        examples = read_examples(with_read_columns(dataset), tokenizer, options, max_length)
        names = {example.prompt_ids: Known.name(example.prompt_ids) for example in examples.examples}
        new = sum(name not in self.asked for name in names.values())
        if new:
            raise SafetyDataError(
                f"audited: {new} of the {len(names)} distinct prompts of the training data were not asked in the audit "
                f"in {self.directory}: it is of other data, or of a model with another chat template; for these "
                f"data {self.again}"
            )
        found = compare(
            examples,
            Beginnings([Anchor([], refusal, "") for refusal in self.finished.refusals]),
            {prompt: self.finished.refused[name] for prompt, name in names.items() if name in self.finished.refused},
            {prompt: self.finished.leaning[name] for prompt, name in names.items() if name in self.finished.leaning},
        )
        if tell_apart:
            kinds = set(self.finished.harmless or ()), set(self.finished.unclear)
            harmless, unclear = ({prompt for prompt, name in names.items() if name in kind} for kind in kinds)
            found.set_apart(harmless, unclear)
        found.unlike = unlike_scripts(list(names), self.finished.refusals, tokenizer)
        found.refuses, found.source = bool(self.finished.refusals), str(self.directory)
        return found

    def is_of(self, model: nn.Module) -> bool:
        """Whether the weights are those that were asked; where they are in parts, it cannot be told."""
        return not sees_all(model) or self.finished.weights == fingerprint(model)
