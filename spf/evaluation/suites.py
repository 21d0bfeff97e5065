"""Prompt suites: packaged, from a file, or public ones from the Hugging Face hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from datasets import load_dataset

FILE_NAME = re.compile(r"\S*(/|\.\w)\S*|(\S+ ){0,3}\S+\.(txt|md|text|prompt|jinja2?|json|ya?ml)", re.IGNORECASE)
"""What a system prompt is not: the name of a file that is not there."""


@dataclass(frozen=True)
class Suite:
    """User prompts of one kind (harmful or benign), and where they came from."""

    name: str
    prompts: list[str]
    where: str


@dataclass(frozen=True)
class HubSuite:
    """Where a public suite lies on the hub: the rows of one split whose columns have the values in `rows`."""

    hub_id: str
    config: str | None = None
    split: str = "train"
    column: str = "prompt"
    rows: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)


HUB_SUITES = {
    # Harmful. Zou et al. 2307.15043; Mazeika et al. 2402.04249; Qi et al. 2310.03693; Souly et al. 2402.10260.
    "advbench": HubSuite("walledai/AdvBench"),
    "harmbench": HubSuite("walledai/HarmBench", config="standard"),
    # One CSV file a category, without header line; the authors withdrew category 2.
    "hex-phi": HubSuite(
        "LLM-Tuning-Safety/HEx-PHI",
        arguments={"data_files": [f"category_{i}.csv" for i in (1, *range(3, 12))], "names": ["prompt"]},
    ),
    "strongreject": HubSuite("walledai/StrongREJECT"),
    # Benign. Röttger et al. 2308.01263, without its unsafe contrasts; Cui et al. 2405.20947, the hard subset.
    "xstest": HubSuite("walledai/XSTest", split="test", rows={"label": "safe"}),
    "or-bench": HubSuite("bench-llm/or-bench", config="or-bench-hard-1k"),
}


def packaged_suites() -> list[str]:
    """Names of the prompt sets that come with the package."""
    names = (Path(file.name) for file in (files("spf") / "prompts").iterdir())
    return sorted(path.stem for path in names if path.name.startswith(("harmful_", "benign_")))


def load_suite(source: str | Path) -> Suite:
    """A suite by packaged name, by public name (a key of `HUB_SUITES`), or from a JSONL or CSV file, column `prompt`.

    Raises:
        SafetyDataError: no such suite or file, a bad row, or the hub did not give the data set.
    """
    from spf.data import load_safety_rows, packaged_prompts
    from spf.errors import SafetyDataError

    name, path = str(source), Path(source)
    if name in packaged_suites():
        return Suite(name, packaged_prompts(name), f"spf/prompts/{name}.jsonl")
    if name in HUB_SUITES:
        return _load_hub_suite(name, HUB_SUITES[name])
    if not path.is_file():
        known = ", ".join([*packaged_suites(), *HUB_SUITES])
        raise SafetyDataError(f"{name}: neither a file nor a known suite ({known})")
    rows = load_safety_rows(path)
    for row in rows:
        count, role = len(row.messages), row.messages[0]["role"]
        if count != 1 or role != "user":
            what = f"{count} messages" if count != 1 else f"one of the role {role}"
            remedy = "; give the system message by --system_prompt" * (role == "system")
            raise SafetyDataError(f"{row.where}: a suite holds single user prompts, not {what}{remedy}")
    return Suite(path.stem, [row.messages[0]["content"] for row in rows], name)


def read_system_prompt(given: str) -> str:
    """The text of `--system_prompt`: that of a file if there is one of this name, else what was given.

    Raises:
        FileNotFoundError: it is like the name of a file, and there is none.
        ValueError: there is no text.
    """
    text = given
    try:
        is_file = Path(given).is_file()
    except OSError:  # too long for a name
        is_file = False
    if is_file:
        text = Path(given).read_text("utf-8-sig")
    elif FILE_NAME.fullmatch(given.strip()):
        raise FileNotFoundError(f"--system_prompt: {given}: no such file; give the text itself, or the name of a file")
    if not text.strip():
        raise ValueError(f"--system_prompt: {given if is_file else 'it'} says nothing; leave it out")
    return text.strip()


def _load_hub_suite(name: str, suite: HubSuite) -> Suite:
    from spf.errors import SafetyDataError

    try:
        data = load_dataset(suite.hub_id, suite.config, split=suite.split, **suite.arguments)
    except Exception as error:
        raise SafetyDataError(
            f"{name}: {suite.hub_id} could not be loaded from the hub ({error}); it may need network access, a login "
            f"(hf auth login) and its terms accepted at https://huggingface.co/datasets/{suite.hub_id}"
        ) from error
    for column in (suite.column, *suite.rows):
        if column not in data.column_names:
            raise SafetyDataError(
                f"{name}: {suite.hub_id} has no column {column!r} (any more), only {', '.join(data.column_names)}"
            )
    prompts = [row[suite.column] for row in data if all(row[key] == value for key, value in suite.rows.items())]
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise SafetyDataError(f"{name}: {suite.hub_id} has rows without a prompt in {suite.column!r}")
    if not prompts:
        raise SafetyDataError(f"{name}: {suite.hub_id} holds no row with {dict(suite.rows)}")
    return Suite(name, prompts, f"{suite.hub_id}, {suite.config or 'default'}, split {suite.split}")
