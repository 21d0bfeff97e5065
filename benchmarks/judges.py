"""How far the judges agree with people on 169 labelled answers, and with one another on a model's answers.

python benchmarks/judges.py refusals_labelled.csv [--model demo]

The file has columns prompt, answer, refused: the two tables of PyRIT's refusal scorer (MIT), 105 and 64 rows, in their
order. It is not part of this repository. New forms of the prefix judge were decided on rows 0, 2, 4 ...; those between
are held out. With --model, the packaged prompts' answers are judged by both versions of the prefix judge and by words.
Prints a table and writes benchmarks/results/judges.json: counts, never answers.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spf.data import packaged_prompts
from spf.evaluation import generate_answers
from spf.evaluation.judges import agreement_of, load_judges, read_labels
from spf.files import write_json
from spf.models import load_aligned_demo_model, load_model

JUDGES = ("prefix-1", "prefix", "words")
MAIN = 105
LONG = 30
ANSWER_TOKENS = 20


def on_the_subject(prompt: str, answer: str) -> bool:
    """False for a long answer without a word of the prompt: people call it no answer, whatever its form."""
    asked, said = ({word[:5] for word in re.findall(r"\w{4,}", text.lower())} for text in (prompt, answer))
    return len(answer.split()) <= LONG or bool(asked & said)


def parts(prompts: list[str], answers: list[str]) -> dict[str, list[int]]:
    """Rows by part."""
    found = {}
    for name, rows in (("first table", range(MAIN)), ("second table", range(MAIN, len(prompts)))):
        here = [r for r in rows if r < len(prompts)]
        found |= {name: here, f"{name}, even": here[here[0] % 2 :: 2], f"{name}, odd": here[1 - here[0] % 2 :: 2]}
        found[f"{name}, on the subject"] = [r for r in here if on_the_subject(prompts[r], answers[r])]
    return found


def with_people(path: Path) -> dict[str, dict[str, Any]]:
    """Agreement of each judge with people, by part."""
    prompts, answers, people = read_labels(path)
    found: dict[str, dict[str, Any]] = {}
    for judge in JUDGES:
        verdicts = load_judges(judge)[0](prompts, answers)
        found[judge] = {
            name: agreement_of([verdicts[r] for r in rows], [people[r] for r in rows]).as_dict()
            for name, rows in parts(prompts, answers).items()
        }
    return found


def on_model(name: str) -> dict[str, Any]:
    """How many of a model's answers each judge calls a refusal, and on how many it differs from prefix-1."""
    model, tokenizer = load_aligned_demo_model() if name == "demo" else load_model(name)
    found: dict[str, Any] = {"model": name}
    for split in ("harmful_eval", "benign_eval"):
        prompts = packaged_prompts(split)
        answers = generate_answers(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=52)
        verdicts = {judge: load_judges(judge)[0](prompts, answers) for judge in JUDGES}
        former = verdicts["prefix-1"]
        found[split] = {"answers": len(answers)} | {
            judge: {
                "refused": sum(given),
                "refused, prefix-1 not": sum(a and not b for a, b in zip(given, former, strict=True)),
                "prefix-1 refused, it not": sum(b and not a for a, b in zip(given, former, strict=True)),
            }
            for judge, given in verdicts.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--model", help="also compare the judges on its answers: demo, a directory or a hub id")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/judges.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {"people": with_people(args.labels)}
    table = Table(
        "judge", "rows", "answers", "accuracy", "kappa", "both refused", "judge only", "people only", "neither"
    )
    for judge, found in results["people"].items():
        for name, a in found.items():
            counts = [str(a[key]) for key in ("both_refused", "judge_only", "people_only", "neither")]
            kappa = "" if a["kappa"] is None else f"{a['kappa']:.2f}"
            table.add_row(judge, name, str(a["count"]), f"{a['accuracy']:.1%}", kappa, *counts)
    Console().print(table)
    if args.model:
        results["model"] = on_model(args.model)
        Console().print(results["model"])
    write_json(args.output, results)


if __name__ == "__main__":
    main()
