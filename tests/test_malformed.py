"""A generated table of wrong inputs: every one is refused in one sentence that names it, before any work."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from trl import ModelConfig, SFTConfig

from spf import SafetyCallback, SafetyProbe, SafetySubspace, attach
from spf import arguments as given_to
from spf.checkpoint import read_checkpoint
from spf.config import CallbackSettings
from spf.data import load_safety_rows
from spf.rules import RULES, NullSpace
from spf.safetylock import SafetyLock, extract, unlock_saved
from spf.safetylock.pairs import load_pairs
from tests.conftest import make_model
from tests.malformed import (
    Case,
    bad_texts,
    bad_values,
    changes,
    command,
    damages,
    hints,
    kinds,
    out_of_range,
    outcome,
    parameters,
    put,
)

GOOD_ROW = {"prompt": "How do I pick a lock?", "refusal": "I'm sorry, but I can't help with that."}


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def short(value):
    return repr(value)[:30]


# ---------------------------------------------------------------------------------------------------- safety data


def of_rows():
    """Every column of safety data with values that it cannot have."""
    talk = [{"role": "user", "content": "How?"}]
    said = [*talk, {"role": "assistant", "content": "No."}]
    bad_messages = [
        3, "text", {}, [], [3], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 3, "content": "x"}],
        [{"role": "user", "content": 3}], [{"role": "user", "content": None}], [{"role": "user", "content": " "}],
        [{"role": "user", "content": [{"type": "image"}]}], [{"role": "assistant", "content": "No."}],
    ]  # fmt: skip
    for value in (3, True, 1.5, {}, "", "  ", [], [3], None):
        yield f"prompt {short(value)}", {"prompt": value, "refusal": "No."}
    for value in (3, True, 1.5, {}, [], [3], "", " ", [{"role": "user", "content": "x"}]):
        for column in ("refusal", "completion", "chosen"):
            yield f"{column} {short(value)}", {"prompt": "How?", column: value}
    for value in bad_messages:
        yield f"messages {short(value)}", {"messages": value, "refusal": "No."}
    for value in (3, "yes", [], 0.5):
        yield f"cut {short(value)}", GOOD_ROW | {"cut": value}
    yield "two answers", {"prompt": "How?", "refusal": "No.", "completion": "Never."}
    yield "answered twice", {"prompt": said, "completion": "No."}
    yield "rejected elsewhere", {"chosen": said, "rejected": [{"role": "user", "content": "Who?"}, said[-1]]}
    yield "two prompts", {"prompt": "How?", "messages": [{"role": "user", "content": "Who?"}]}
    yield "no column", {}
    yield "other columns", {"question": "How?", "answer": "No."}


def of_data():
    for what, row in of_rows():
        yield Case(
            f"jsonl: {what}", lambda p, r=row: load_safety_rows(put(p / "s.jsonl", lines(GOOD_ROW, r))), ("s.jsonl:2",)
        )
        try:
            data = Dataset.from_list([row])
        except Exception:
            continue  # no data set can hold it
        yield Case(f"dataset: {what}", lambda p, d=data: load_safety_rows(d), ("the data set",))
    for what, content in damages(lines(GOOD_ROW)):
        if what not in ("cut at 1",):
            yield Case(f"jsonl: {what}", lambda p, c=content: load_safety_rows(put(p / "s.jsonl", c)), ("s.jsonl",))
    for what, content in {
        "empty": b"",
        "header only": b"prompt,refusal\n",
        "no column": b"a,b\n1,2\n",
        "same column twice": b"prompt,prompt\na,b\n",
        "unquoted comma": b"prompt,refusal\nHow?,No, never\n",
        "too few fields": b"prompt,refusal\nHow?\n",
        "open quote": b'prompt,refusal\n"How?,No.\n',
        "empty prompt": b"prompt,refusal\n,No.\n",
        "no UTF-8": b"prompt,refusal\n\xff\xfe,No.\n",
        "a directory": None,
    }.items():
        yield Case(f"csv: {what}", lambda p, c=content: load_safety_rows(put(p / "s.csv", c)), ("s.csv",))
    yield Case("no such file", lambda p: load_safety_rows(p / "gone.jsonl"), ("gone.jsonl",))
    yield Case("other suffix", lambda p: load_safety_rows(put(p / "s.parquet", b"x")), ("s.parquet",))
    yield Case("an empty data set", lambda p: load_safety_rows(Dataset.from_list([])), ("the data set",))
    for value in (3, True, 1.5, ["x"], {"train": []}, b"x"):
        yield Case(f"safety_data {short(value)}", lambda p, v=value: SafetyCallback(v), ("safety_data",))
        yield Case(f"keep {short(value)}", lambda p, v=value: SafetyCallback(keep=v), ("keep",))


def of_pairs():
    talk = [{"role": "user", "content": "How?"}]
    good = {"question": "How?", "safe": "No.", "unsafe": "Sure."}
    for key in good:
        for value in (3, True, "", " ", [], {}, [3], [{"role": "pirate", "content": "x"}], None):
            row = good | {key: value}
            yield Case(
                f"pairs: {key} {short(value)}",
                lambda p, r=row: load_pairs(put(p / "p.jsonl", lines(r))),
                ("p.jsonl:1",),
            )
    for row in (
        good | {"unsafe": "No."},
        {"chosen": talk, "rejected": talk},
        {"chosen": [3], "rejected": [3]},
        {
            "prompt": "Who?",
            "chosen": [*talk, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {},
    ):
        yield Case(
            f"pairs: {json.dumps(row)[:60]}", lambda p, r=row: load_pairs(put(p / "p.jsonl", lines(r))), ("p.jsonl:1",)
        )
    for what, content in damages(lines(good)):
        if what != "cut at 1":
            yield Case(f"pairs: {what}", lambda p, c=content: load_pairs(put(p / "p.jsonl", c)), ("p.jsonl",))


# -------------------------------------------------------------------------------------------------- constructors


@cache
def toy():
    from spf.data import SafetyRow, tokenise
    from tests.conftest import make_tokenizer

    model = make_model()
    row = SafetyRow([{"role": "user", "content": GOOD_ROW["prompt"]}], GOOD_ROW["refusal"], "row")
    return model, tokenise([row] * 4, make_tokenizer(), 256)


def make_probe(**given):
    model, anchors = toy()
    return SafetyProbe(model, anchors, **{"pad_token_id": 1} | given)


def make_attachment(**given):
    return attach(make_probe(), torch.optim.SGD(toy()[0].parameters(), lr=0.1), **{"rule": RULES["mix"]()} | given)


MADE = {**{kind: kind for kind in RULES.values()}, CallbackSettings: SafetyCallback}
SKIPPED = ("model", "anchors")
"""Of the probe: they are no settings."""


def of_constructors():
    for kind, make in {**MADE, SafetyProbe.__init__: make_probe}.items():
        label = getattr(make, "__name__", "")
        for name, hint in hints(kind).items():
            if make is make_probe and name in SKIPPED:
                continue
            for value in [*bad_values(hint), *out_of_range(kind, name)]:
                yield Case(f"{label}: {name} {short(value)}", lambda p, m=make, n=name, v=value: m(**{n: v}), (name,))
        yield Case(f"{label}: an unknown name", lambda p, m=make: m(nonsense=1), ("nonsense",))
    for value in ("sfp", "", 3, None, NullSpace, {}, ["mix"], True):
        yield Case(f"SafetyCallback: rule {short(value)}", lambda p, v=value: SafetyCallback(rule=v), ("rule",))
    for value in (3, "mix", {}, True, RULES["spf"]()):
        yield Case(f"NullSpace: feedback {short(value)}", lambda p, v=value: NullSpace(feedback=v), ("feedback",))
    attached = {
        "monitor_steps": (True, 1.5, "3", None, math.nan, -1),
        "cosines": (1, "yes", None),
        "rule": ("mix", NullSpace, 3),
        "subspace": ({}, "x"),
        "resumed": (1, "no"),
        "correction_dtype": ("bfloat16", 3, None),
        "nonsense": (1,),
    }
    for name, values in attached.items():
        for value in values:
            yield Case(f"attach: {name} {short(value)}", lambda p, n=name, v=value: make_attachment(**{n: v}), (name,))


EXTRACTED = ("k", "window", "alpha", "val_fraction", "seed", "score", "batch_size")


def of_locks():
    kept = hints(extract)
    for name in EXTRACTED:
        for value in [*bad_values(kept[name]), *out_of_range(extract, name)]:
            yield Case(
                f"extract: {name} {short(value)}", lambda p, n=name, v=value: extract(None, None, [], **{n: v}), (name,)
            )
    applied = hints(SafetyLock.apply)
    for name in ("alpha", "mode", "positions", "stack"):
        for value in bad_values(applied[name]):
            yield Case(
                f"apply: {name} {short(value)}",
                lambda p, n=name, v=value: SafetyLock.load(lock_file(p)).apply(toy()[0], **{n: v}),
                (name,),
            )
    for value in (True, 1.5, "2", None, 0, 99):
        yield Case(f"top: {short(value)}", lambda p, v=value: SafetyLock.load(lock_file(p)).top(v), ("k ", "heads"))


# -------------------------------------------------------------------------------------------------- command lines


def filled(place):
    """A directory with what the commands read; no model, since none may be loaded."""
    put(place / "safety.jsonl", lines(GOOD_ROW))
    put(
        place / "train.jsonl",
        # a form of every trainer
        lines(
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                **{"prompt": "a", "completion": "b", "label": True, "chosen": "b", "rejected": "c"},
            }
        ),
    )
    put(place / "model" / "config.json", b"{}")
    lock_file(place)
    return place


def lock_file(place):
    path = place / "my.lock"
    if not path.exists():
        put(path, lock_content())
    return path


COMMANDS = {
    "eval": (given_to.EvalArguments, lambda p: [str(p / "model")], ()),
    "lock extract": (given_to.ExtractArguments, lambda p: [str(p / "model"), str(p / "new.lock")], ()),
    "lock apply": (given_to.ApplyArguments, lambda p: [str(p / x) for x in ("model", "my.lock", "out")], ()),
    "lock tune": (given_to.TuneArguments, lambda p: [str(p / x) for x in ("model", "my.lock", "out")], ()),
    "lock inspect": (given_to.InspectArguments, lambda p: [str(p / "my.lock")], ()),
    "lock remove": (given_to.RemoveArguments, lambda p: [str(p / "model"), str(p / "out")], ()),
}


def of_commands(commands):
    for label, (kind, base, required) in commands.items():
        words = label.split()

        def case(what, given, *names, words=words, base=base, label=label):
            return command(f"{label} {what}", lambda p: [*words, *base(filled(p)), *given], *names)

        for name, hint in hints(kind).items():
            for text in [*bad_texts(hint), *map(str, out_of_range(kind, name))]:
                yield case(f"--{name} {text!r}", [f"--{name}={text}"], name)
        yield case("an unknown flag", ["--nonsense", "1"], "nonsense")
        yield case(
            "a word too many",
            ["--seed" if "seed" in hints(kind) else "--nonsense", "1", "surplus"],
            "surplus",
            "nonsense",
        )
        for name in required:
            yield command(f"{label} without {name}", lambda p, w=words: [*w], name)


def of_texts():
    """What a list in one text, or a choice, cannot be."""

    def lock(what, *given, names):
        return command(
            f"lock {what} {' '.join(given)}",
            lambda p: ["lock", what, *COMMANDS[f"lock {what}"][1](filled(p)), *given],
            *names,
        )

    for text in ("", "two", "1,,2", "1.5", "0", "-1", "99", "nan", "1;2"):
        yield lock("tune", "--ks", text, names=("ks", "heads"))
    for text in ("", "a", "1,,2", "nan", "inf", "1;2"):
        yield lock("tune", "--alphas", text, names=("alphas",))
    yield lock("extract", "--pairs", "gone.jsonl", names=("gone.jsonl",))

    def evaluated(what, *given, names):
        return command(f"eval {what}", lambda p: ["eval", str(filled(p) / "model"), *given], *names)

    for flag, text in (
        ("transforms", "hypnosis"), ("transforms", ""), ("transforms", "all,none"), ("harmful", "gone.jsonl"),
        ("harmful", ""), ("benign", "gone.csv"), ("judge", "some/model"), ("judge", ""), ("chat_template_kwargs", "{"),
        ("chat_template_kwargs", "[]"), ("chat_template_kwargs", "3"), ("chat_template_kwargs", ""), ("output", "/"),
        ("reference", "gone.json"), ("reference", "/"), ("validate_judge", "gone.jsonl"), ("validate_judge", "/"),
    ):  # fmt: skip
        yield evaluated(f"--{flag} {text!r}", f"--{flag}", text, names=(flag, text or flag))
    for label in ("eval", "lock apply", "lock extract", "lock inspect", "lock remove", "lock tune", "train"):
        yield command(f"{label} with nothing", lambda p, label=label: label.split(), "model", "lock", "dataset_name")
    yield command("no such command", lambda p: ["evil"], "evil")
    yield command("no such lock command", lambda p: ["lock", "pick"], "pick")
    for what, content in damages(lock_content()):
        for name in ("inspect", "apply", "tune"):

            def arguments(p, n=name, c=content):
                put(p / "bad.lock", c)
                return [
                    "lock",
                    n,
                    *[str(p / x) for x in (("bad.lock",) if n == "inspect" else ("model", "bad.lock", "out"))],
                ]

            yield command(f"lock {name}, the file {what}", arguments, "bad.lock")


# ------------------------------------------------------------------------------------------------------ spf train

TRAIN = {
    "model_name_or_path": "model", "dataset_name": "train.jsonl", "output_dir": "out", "use_cpu": True, "bf16": False,
    "report_to": "none", "safety_data": "safety.jsonl",
}  # fmt: skip
TRL_SKIPPED = ("bf16", "use_cpu")


def train(what, change, *names, flags=()):
    def arguments(p):
        filled(p)
        config = TRAIN | {
            key: str(p / TRAIN[key]) for key in ("model_name_or_path", "dataset_name", "output_dir", "safety_data")
        }
        put(p / "train.yaml", yaml.safe_dump({k: v for k, v in (config | change).items() if v != "left out"}).encode())
        return ["train", str(p / "train.yaml"), *flags]

    return command(f"train: {what}", arguments, *names)


def yaml_values(hint):
    """Text is read as on the command line, so text that is a number is one."""
    return [v for v in bad_values(hint) if v is not None and v != "3" and v != "0.5" and v != "yes"]


def of_training():
    for name, hint in hints(given_to.SafetyArguments).items():
        for value in [*yaml_values(hint), *out_of_range(given_to.SafetyArguments, name)]:
            yield train(f"{name}: {short(value)}", {name: value}, name, name.removeprefix("safety_"))
        for text in bad_texts(hint):
            yield train(f"--{name} {text!r}", {}, name, flags=(f"--{name}", text))
    turn = 0
    for kind in (SFTConfig, ModelConfig):
        for name, hint in hints(kind).items():
            plain, _, _ = kinds(hint)
            if name in TRL_SKIPPED or not set(plain) & {int, float, bool} or set(plain) & {str, dict, list}:
                continue
            values = yaml_values(hint)
            turn += 1  # each field has one, the fields together have all
            value = values[turn % len(values)]
            yield train(f"{name}: {short(value)}", {name: value}, name)
    for name, value in {
        "learning_rate": -1.0, "per_device_train_batch_size": 0, "gradient_accumulation_steps": 0, "lora_r": 0,
        "num_train_epochs": -1, "lora_alpha": -1, "lora_dropout": 1.5, "max_grad_norm": -1.0, "weight_decay": -0.1,
        "adam_beta1": 1.5,
        "max_length": 0, "warmup_steps": -1, "save_steps": -1, "logging_steps": -1, "seed": -1,
        "lr_scheduler_type": "zigzag", "optim": "evil", "save_strategy": "often", "eval_strategy": "never",
        "safety_rule": "mixed", "safety_data": "gone.jsonl", "safety_keep": "gone.jsonl",
        "dataset_name": "gone.jsonl", "nonsense": 1,
        "dataset_streaming": True, "dataset_train_split": "trian",
    }.items():  # fmt: skip
        yield train(f"{name} = {value}", {name: value}, name, str(value))
    for name in ("model_name_or_path", "dataset_name"):
        yield train(f"without {name}", {name: "left out"}, name)
    yield train("a rank that the rule has not", {"safety_rule": "mix", "safety_rank": 4}, "safety_rank")
    for text in ("{", "[]", "3"):
        yield train(f"chat template {text}", {"safety_chat_template_kwargs": text}, "chat_template_kwargs")
    yield train("an unknown flag", {}, "nonsense", flags=("--nonsense", "1"))
    for what, content in damages(b"model_name_or_path: [a\nb: c"):
        yield command(f"train: the file {what}", lambda p, c=content: ["train", str(put(p / "c.yaml", c))], "c.yaml")
    yield command("train: a name that is no text", lambda p: ["train", str(put(p / "c.yaml", b"1: 2"))], "c.yaml")
    yield command("train: no such file", lambda p: ["train", str(p / "c.yaml")], "c.yaml")
    yield command("train: --config alone", lambda p: ["train", "--config"], "config")


# ------------------------------------------------------------------------------------------------ files of our own


@cache
def subspace_parts():
    V = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q
    return {"right/a": V.contiguous(), "target/a": torch.zeros(4, 3)}, {
        "format": "spf-subspace-2",
        "spf": json.dumps({"rule": "NullSpace()"}),
        "same": json.dumps({"right/b": "right/a"}),
    }


def subspace(place, tensors=None, header=None):
    good, about = subspace_parts()
    path = place / "s.safetensors"
    save_file(good | (tensors or {}), path, metadata=about | (header or {}))
    return path


def of_subspaces():
    tensors, about = subspace_parts()

    def case(what, tensors=None, header=None):
        return Case(
            f"subspace: {what}", lambda p: SafetySubspace.load(subspace(p, tensors, header)), ("s.safetensors",)
        )

    V, target = tensors["right/a"], tensors["target/a"]
    nan = torch.full_like(target, math.nan)
    for what, changed in {
        "basis of zeros": {"right/a": torch.zeros(8, 3)},
        "basis without columns": {"right/a": V[:, :0].contiguous(), "target/a": target[:, :0].contiguous()},
        "basis of NaN": {"right/a": torch.full_like(V, math.nan)},
        "basis of one dimension": {"right/a": V[:, 0].contiguous()},
        "basis of three dimensions": {"right/a": V[None].contiguous()},
        "basis of whole numbers": {"right/a": torch.eye(8, 3).long()},
        "basis transposed": {"right/a": V.T.contiguous()},
        "basis and target swapped": {"right/a": target, "target/a": V},
        "basis twice as long": {"right/a": 2 * V},
        "target of NaN": {"target/a": nan},
        "target too narrow": {"target/a": target[:, :2].contiguous()},
        "target of one dimension": {"target/a": target[0].contiguous()},
        "target of whole numbers": {"target/a": target.long()},
        "target without a basis": {"target/c": target.clone()},
        "a name without a kind": {"a": V.clone()},
        "an unknown kind": {"middle/a": V.clone()},
    }.items():
        yield case(what, changed)
    for key, values in {
        "format": ("", "spf-subspace-9", "3"),
        "spf": ("", "{", "[]", "3", '{"rule": 3}', '{"rule": null}'),
        "same": ("", "{", "[]", '{"right/b": "right/z"}', '{"right/b": 3}', '{"b": "right/a"}', '{"up/b": "right/a"}'),
    }.items():
        for value in values:
            yield case(f"header {key} {value}", None, {key: value})
        rest = {k: v for k, v in about.items() if k != key}
        if key != "same":
            yield Case(
                f"subspace: header without {key}",
                lambda p, r=rest: SafetySubspace.load(put(p / "s.safetensors", save(tensors, metadata=r))),
                ("s.safetensors",),
            )
    yield Case(
        "subspace: no header",
        lambda p: SafetySubspace.load(put(p / "s.safetensors", save(tensors))),
        ("s.safetensors",),
    )
    for what, content in damages(save(tensors, metadata=about)):
        yield Case(
            f"subspace: {what}",
            lambda p, c=content: SafetySubspace.load(put(p / "s.safetensors", c)),
            ("s.safetensors",),
        )
    yield Case("subspace: no such file", lambda p: SafetySubspace.load(p / "gone.safetensors"), ("gone.safetensors",))


STATE = {
    "format": 4,
    "state": {
        "rule": "NullSpace()", "steps": 3, "skipped": 0, "corrected": 3, "position": 4,
        "monitor": {"loss": 0.5, "refused": 1.0, "conflicts_refused": 1.0},
        "correction": {"multiplier": 0.0, "lr_scale": 1.2, "acted": {"a": 1}, "feedback": None},
        "reference_nll": [[1.5, 2.0]],
        "held": [],
        "watched": [],
        "kept": {"prompts": None},
        "left_out": {"conflicts": "hold", "places": [[1, 0]], "of": 4, "content": "0" * 64},
    },
    "samples": [{"prompt": "0" * 24, "refusal": "No.", "cut": False}],
    "subspace": None,
}  # fmt: skip


def of_states():
    def case(what, content, *names):
        return Case(
            f"state: {what}",
            lambda p: read_checkpoint(put(p / "spf_state.json", content).parent),
            ("spf_state.json", *names),
        )

    # a rule of one's own may keep more
    free = ("state.correction.acted",)
    for what, name, whole in changes(STATE, free):
        if (
            what != "state.correction has an unknown name"
            and "correction.acted missing" not in what
            and "correction.feedback missing" not in what
        ):
            yield case(what, json.dumps(whole).encode(), name)
    for key, values in {
        "prompt": (3, None, "", "x" * 24, "0" * 23), "refusal": (3, [], True), "cut": (0, "no", None)
    }.items():  # fmt: skip
        for value in values:
            yield case(
                f"sample {key} {value!r}",
                json.dumps(STATE | {"samples": [STATE["samples"][0] | {key: value}]}).encode(),
            )
    for value in ([], [3], [{}], [[]]):
        yield case(f"samples {value}", json.dumps(STATE | {"samples": value}).encode())
    for value in (
        3,
        [],
        {},
        {"file": "a"},
        {"file": 3, "sha256": "0" * 64},
        {"file": "../../etc/passwd", "sha256": "0" * 64},
        {"file": "a", "sha256": 3},
        {"file": "a", "sha256": "0"},
    ):
        yield case(f"subspace {value}", json.dumps(STATE | {"subspace": value}).encode())
    for field, value in (
        ("steps", -1),
        ("steps", 1.5),
        ("lr_scale", 0),
        ("lr_scale", math.inf),
        ("multiplier", -1),
        ("loss", math.inf),
        ("refused", 2),
        ("position", -1),
    ):
        text = json.dumps(STATE)
        part = f'"{field}": '
        start = text.index(part) + len(part)
        end = min(i for i in (text.find(",", start), text.find("}", start)) if i > 0)
        yield case(f"{field} = {value}", (text[:start] + json.dumps(value) + text[end:]).encode())
    for value in ([3], [[1.0]], [["a", 1.0]], [[math.nan, 1.0]], {}):
        yield case(
            f"reference_nll {value}", json.dumps(STATE | {"state": STATE["state"] | {"reference_nll": value}}).encode()
        )
    one = {"row": 3, "prompt": "0" * 32, "refusal": [5, 6]}
    for value in (
        3,
        [3],
        [{}],
        [one | {"row": -1}],
        [one | {"prompt": "0"}],
        [one | {"refusal": []}],
        [one | {"x": 1}],
    ):
        yield case(f"watched {value}", json.dumps(STATE | {"state": STATE["state"] | {"watched": value}}).encode())
    for what, content in damages(json.dumps(STATE).encode()):
        yield case(what, content)
    yield Case("state: gone", lambda p: read_checkpoint(p), ("spf_state.json",))

    def with_bases(p, content):
        bases = put(p / "spf_subspace-0.safetensors", content)
        found = {"file": bases.name, "sha256": "0" * 64}
        return read_checkpoint(
            put(p / "checkpoint-1" / "spf_state.json", json.dumps(STATE | {"subspace": found}).encode()).parent
        )

    for what, content in damages(save(subspace_parts()[0], metadata=subspace_parts()[1])):
        yield Case(f"bases: {what}", lambda p, c=content: with_bases(p, c), ("spf_subspace-0.safetensors",))


def lock_parts():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 8, generator=generator), dim=1)
    tensors = {
        "heads": torch.tensor([[0, 1], [1, 3]]), "directions": directions, "sigmas": torch.tensor([0.5, 0.4]),
        "train_accuracy": torch.full((2, 4), 0.9), "val_accuracy": torch.full((2, 4), 0.8),
        "val_loss": torch.full((2, 4), 0.3), "sketch": torch.ones(2, 32),
    }  # fmt: skip
    info = {
        "format": 1, "base_model": "m", "base_hash": "0" * 64, "model_type": "llama",
        "geometry": {"layers": 2, "heads": 4, "head_dim": 8, "hidden_size": 32}, "tokenizer_hash": "0" * 64,
        "template_hash": "0" * 64, "dtype": "float32", "window": 5, "pairs": 10, "duplicates": 0, "words_safe": 9.0,
        "words_unsafe": 8.0, "data_hash": "0" * 64, "seed": 0, "val_fraction": 0.4, "score": "val", "alpha": 6.0,
        "spf_version": "0.1.0",
    }  # fmt: skip
    return tensors, info


def lock_content(tensors=None, info=None):
    good, about = lock_parts()
    return save(good | (tensors or {}), metadata={"safetylock": json.dumps(info or about)})


def of_lock_files():
    tensors, info = lock_parts()

    def case(what, content, *names):
        return Case(f"lock: {what}", lambda p: SafetyLock.load(put(p / "my.lock", content)), ("my.lock", *names))

    for what, name, whole in changes(info):
        yield case(what, lock_content(info=whole), name)
    for name, value in {
        "alpha": math.inf,
        "window": 0,
        "pairs": -1,
        "val_fraction": 2.0,
        "score": "best",
        "format": 9,
    }.items():
        yield case(f"{name} = {value}", lock_content(info=info | {name: value}))
    for key in ("layers", "heads", "head_dim", "hidden_size"):
        yield case(f"geometry {key} = 0", lock_content(info=info | {"geometry": info["geometry"] | {key: 0}}))
    yield case("another geometry", lock_content(info=info | {"geometry": info["geometry"] | {"layers": 1}}))
    for name, tensor in tensors.items():
        for what, changed in {
            "without rows": tensor[:0],
            "of one dimension more": tensor[None],
            "a row short": tensor[:1],
            "of another type": tensor.half() if tensor.is_floating_point() else tensor.float(),
            "out of range": torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor + 9,
        }.items():
            yield case(f"{name} {what}", lock_content({name: changed.contiguous()}))
        rest = {key: kept for key, kept in tensors.items() if key != name}
        yield case(f"without {name}", save(rest, metadata={"safetylock": json.dumps(info)}))
    yield case(
        "directions and accuracies swapped",
        lock_content({"directions": tensors["val_loss"], "val_loss": tensors["directions"]}),
    )
    yield case("directions that are no unit vectors", lock_content({"directions": 5 * tensors["directions"]}))
    yield case("an accuracy of 2", lock_content({"val_accuracy": 2 * torch.ones(2, 4)}))
    yield case("a head twice", lock_content({"heads": torch.tensor([[0, 1], [0, 1]])}))
    yield case("a negative sigma", lock_content({"sigmas": torch.tensor([-0.5, 0.4])}))
    yield case("a subspace", save(subspace_parts()[0], metadata=subspace_parts()[1]))
    for text in ("", "{", "[]", "3", "null"):
        yield case(f"info {text!r}", save(tensors, metadata={"safetylock": text}))
    yield case("no header", save(tensors))
    for what, content in damages(lock_content()):
        yield case(what, content)
    yield Case("lock: gone", lambda p: SafetyLock.load(p / "gone.lock"), ("gone.lock",))


def of_locked_models():
    good = {"fingerprints": ["0" * 64], "attention_bias_added": False}

    def case(what, content):
        return Case(
            f"locked: {what}",
            lambda p: unlock_saved(put(p / "m" / "config.json", content).parent),
            ("config.json", "/m"),
        )

    for what, _, whole in changes(good):
        yield case(what, json.dumps({"spf_safetylock": whole}).encode())
    for value in (3, [], "x", True):
        yield case(f"mark {value!r}", json.dumps({"spf_safetylock": value}).encode())
    for what, content in damages(json.dumps({"spf_safetylock": good, "model_type": "llama"}).encode()):
        yield case(what, content)
    for what, content in damages(save({"0": torch.zeros(32)})):

        def unlock(p, c=content):
            put(p / "m" / "config.json", json.dumps({"spf_safetylock": good}).encode())
            put(p / "m" / "safetylock_original_biases.safetensors", c)
            return unlock_saved(p / "m")

        yield Case(f"locked, biases: {what}", unlock, ("safetylock_original_biases", "/m"))


REFERENCE = {
    "model": "m",
    "suites": {
        kind: {"name": f"{kind}_eval", "where": f"spf/prompts/{kind}_eval.jsonl", "count": 1, "sha256": "0" * 64}
        for kind in ("harmful", "benign")
    },
    "judge": {"name": "prefix", "refusal_label": None},
    "max_new_tokens": 32,
    "refused": {"asr": [True], "over_refusal": [False]},
    "asr": 0.0, "asr_ci": [0.0, 0.8], "asr_count": 1, "over_refusal": 0.0, "over_refusal_ci": [0.0, 0.8],
    "over_refusal_count": 1, "over_refusal_judge": "prefix", "versions": {"spf": "0.1.0"},
}  # fmt: skip


def of_references():
    def case(what, content, *names):
        def arguments(p):
            put(p / "ref.json", content)
            return ["eval", str(filled(p) / "model"), "--reference", str(p / "ref.json")]

        return command(f"reference: {what}", arguments, "ref.json", *names)

    needed = {key: REFERENCE[key] for key in ("model", "suites", "judge", "max_new_tokens", "refused")}
    for what, name, whole in changes(needed, ("refused",)):
        yield case(what, json.dumps(whole).encode(), name)
    for value in (
        {"asr": [1]},
        {"asr": "1"},
        {"asr": [True, False]},
        {"asr": {}},
        {"nonsense": [True]},
        {"asr": [None]},
    ):
        yield case(f"refused {value}", json.dumps(REFERENCE | {"refused": value}).encode())
    for key, value in (("asr", 2.0), ("asr", math.nan), ("asr_ci", [0.9, 0.1]), ("asr_count", -1), ("surplus", 1)):
        yield case(f"{key} {value}", json.dumps(REFERENCE | {key: value}).encode(), key)
    for what, content in damages(json.dumps(REFERENCE).encode()):
        yield case(what, content)


def of_adapters():
    def evaluated(p, content):
        put(p / "adapter" / "adapter_config.json", content)
        return ["eval", str(p / "adapter")]

    bad = [
        ("no base", b"{}"),
        ("a base of 3", b'{"base_model_name_or_path": 3}'),
        ("", b'{"base_model_name_or_path": ""}'),
    ]
    for what, content in [*damages(b'{"base_model_name_or_path": "m"}'), *bad]:
        yield command(f"adapter: {what}", lambda p, c=content: evaluated(p, c), "adapter_config.json")


# ------------------------------------------------------------------------------------------------------- the table

CASES = [
    case
    for make in (
        of_data,
        of_pairs,
        of_constructors,
        of_locks,
        lambda: of_commands(COMMANDS),
        of_texts,
        of_training,
        of_subspaces,
        of_states,
        of_lock_files,
        of_locked_models,
        of_references,
        of_adapters,
    )
    for case in make()
]


def test_the_table_is_large_enough():
    print(f"{len(CASES)} malformed inputs")
    assert len(CASES) >= 600


def test_every_setting_of_the_callback_is_checked():
    assert {*hints(SafetyCallback.__init__)} == {*hints(CallbackSettings), "safety_data", "keep", "rule"}


@pytest.mark.parametrize("case", parameters(CASES))
def test_it_is_refused_in_one_sentence_before_any_work(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outcome(case, tmp_path) == "refused"


# ------------------------------------------------------------------------------- what is right must not be refused


def of_good():
    """What the table was made from, and what is unusual but right."""
    yield Case("jsonl", lambda p: load_safety_rows(put(p / "s.jsonl", lines(GOOD_ROW))), ())
    yield Case(
        "pairs", lambda p: load_pairs(put(p / "p.jsonl", lines({"question": "a", "safe": "b", "unsafe": "c"}))), ()
    )
    yield Case("csv", lambda p: load_safety_rows(put(p / "s.csv", b"prompt,refusal\r\nHow?,No.\r\n")), ())
    yield Case("subspace", lambda p: SafetySubspace.load(subspace(p)), ())
    yield Case("state", lambda p: read_checkpoint(put(p / "spf_state.json", json.dumps(STATE).encode()).parent), ())
    yield Case("lock", lambda p: SafetyLock.load(lock_file(p)), ())
    for kind in RULES.values():
        yield Case(kind.name, lambda p, k=kind: k(), ())
    yield Case(
        "whole numbers for rates", lambda p: (RULES["mix"](2), NullSpace(energy=1), SafetyCallback(first_weight=3)), ()
    )
    yield Case("attach", lambda p: make_attachment(monitor_steps=0), ())
    yield command("inspect", lambda p: ["lock", "inspect", str(lock_file(p))])


def of_late():
    """Good command lines come as far as loading a model."""
    yield train("as it is", {})
    yield train("numbers as text", {"learning_rate": "1e-4", "safety_rank": "4", "safety_first_weight": "1e1"})
    names = {"lora_target_modules": ["q_proj", "v_proj"], "use_peft": True, "report_to": ["none"], "max_steps": 3}
    yield train("lists", names | {"safety_chat_template_kwargs": {"enable_thinking": False}, "save_steps": 0.5})
    yield train("one name for a list", {"lora_target_modules": "all-linear", "use_peft": True, "warmup_steps": 0.1})
    yield train("no rule", {"safety_rule": "none", "num_train_epochs": 0.5, "lr_scheduler_kwargs": "{}"})
    for recipe in sorted(Path("recipes").absolute().glob("*.yaml")):
        there = recipe.read_text("utf-8").replace("recipes/examples", str(recipe.parent / "examples"))
        yield train(
            recipe.name,
            {k: v for k, v in yaml.safe_load(there).items() if k not in TRAIN} | {"dtype": "float32"},
        )
    for label, (_, base, _) in COMMANDS.items():
        if label not in ("lock inspect", "lock remove", "lock tune"):
            yield command(label, lambda p, label=label, base=base: [*label.split(), *base(filled(p))])
    yield command(
        "tune", lambda p: ["lock", "tune", *COMMANDS["lock tune"][1](filled(p)), "--ks", "1,2", "--alphas=-1,0,2.5"]
    )

    def compared(p):
        from spf.evaluation import load_suite
        from spf.evaluation import run as evaluation

        suites = load_suite("harmful_eval"), load_suite("benign_eval")
        verdicts = {"asr": [True] * 104, "asr/base64": [False] * 104, "over_refusal": [False] * len(suites[1].prompts)}
        content = (
            REFERENCE
            | evaluation.settings(*suites, "prefix", None, 32)
            | {"refused": verdicts, "perplexity": {"value": 3.0}}
            | {"asr": 0.0, "asr/base64": 1.0, "over_refusal": 0.0}
        )
        put(p / "ref.json", json.dumps(content).encode())
        return ["eval", str(filled(p) / "model"), "--reference", str(p / "ref.json")]

    yield command("reference", compared)


@pytest.mark.parametrize("case", parameters(list(of_good())))
def test_what_is_right_is_accepted(case, tmp_path):
    assert outcome(case, tmp_path) == "accepted"


@pytest.mark.parametrize("case", parameters(list(of_late())))
def test_what_is_right_comes_as_far_as_the_model(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outcome(case, tmp_path) == "late"


# ------------------------------------------------------------------------------------------------------ hypothesis

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [(kind, make, name) for kind, make in MADE.items() for name in hints(kind)]


def is_of(value, hint):
    """Whether a value is of an annotated type: written again, without pydantic."""
    plain, literal, optional = kinds(hint)
    if value is None or isinstance(value, bool):
        return optional if value is None else bool in plain
    if isinstance(value, float | int):
        return (isinstance(value, int) and int in plain) or (float in plain and math.isfinite(value))
    if isinstance(value, dict):
        return dict in plain
    if isinstance(value, str):
        return value in literal if literal else str in plain and bool(value)
    return False


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FIELDS), JSON)
def test_any_json_for_a_setting_is_of_its_type_or_refused(field, value):
    kind, make, name = field
    said = ""
    try:
        make(**{name: value})
    except ValueError as error:
        said = str(error)
    if not is_of(value, hints(kind)[name]):
        assert name in said
        assert "\n" not in said
    elif not out_of_range(kind, name):
        # a directory that is not there
        assert not said or (name == "audited" and "holds no audit" in said)


FILES = {
    "s.safetensors": (lambda: save(subspace_parts()[0], metadata=subspace_parts()[1]), SafetySubspace.load),
    "spf_state.json": (lambda: json.dumps(STATE).encode(), lambda path: read_checkpoint(path.parent)),
    "my.lock": (lock_content, SafetyLock.load),
}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_anywhere_is_named(tmp_path_factory, name, share):
    make, load = FILES[name]
    content = make()
    path = put(tmp_path_factory.mktemp("cut") / name, content[: int(share * len(content))])
    with pytest.raises(ValueError, match=name) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_what_a_rule_misses_in_its_state_is_named():
    attachment = make_attachment(rule=NullSpace(rank=4))
    state = attachment.state_dict()
    attachment.load_state_dict(state)
    state["correction"].pop("acted")
    with pytest.raises(ValueError, match="the checkpoint holds no 'acted' of the rule"):
        attachment.load_state_dict(state)
