"""Inputs that are wrong, made from the types of what they stand for, and how spf answers to one."""

import contextlib
import io
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
from annotated_types import Ge, Gt

from spf import cli

NOT = {
    int: (True, 1.5, "3", math.nan, math.inf, [1], {}),
    float: (True, "0.5", math.nan, math.inf, -math.inf, [1.0], {}),
    bool: (1, 0.0, "yes", [], {}),
    str: (3, True, ["x"], {}),
    list: (3, "x", True, {}),
    dict: (3, True, ["x"]),
}
"""Values that are not of a type."""

TEXTS = {
    int: ("x", "1.5", "nan", "", "true", "1e3"),
    float: ("x", "nan", "inf", "-inf", ""),
    bool: ("maybe", "2"),
}
"""Texts on a command line that are not of a type."""


@dataclass(frozen=True)
class Case:
    """What is done in an empty directory; the sentence has one of `names`; `command` if it is a command line."""

    id: str
    act: Callable[[Path], Any]
    names: tuple[str, ...]
    command: bool = False


def command(id: str, arguments: Callable[[Path], list[str]], *names: str) -> Case:
    return Case(id, lambda place: cli.main(arguments(place)), names, command=True)


def kinds(hint: Any) -> tuple[list[type], tuple[Any, ...], bool]:
    """Of an annotation: the plain types it allows, the values of its Literal, and whether None is allowed."""
    if get_origin(hint) in (Union, types.UnionType):
        found = [kinds(arm) for arm in get_args(hint) if arm is not type(None)]
        plain, literal = ([x for f in found for x in f[i]] for i in (0, 1))
        return plain, tuple(literal), type(None) in get_args(hint)
    if get_origin(hint) is Literal:
        return [], get_args(hint), False
    if get_origin(hint) is typing.Annotated:
        return kinds(get_args(hint)[0])
    origin = get_origin(hint) or hint
    return [dict if origin is Mapping else origin], (), False


def bad_values(hint: Any) -> list[Any]:
    """Python values that an annotation does not allow."""
    plain, literal, optional = kinds(hint)
    found: list[Any] = [] if optional else [None]
    if literal:
        found += ["nonsense", "", 3, ["x"]]
    known = [kind for kind in plain if kind in NOT]
    for value in (v for kind in known for v in NOT[kind]):
        number = isinstance(value, int | float) and not isinstance(value, bool) and float in plain
        fits = any(isinstance(value, k) and not (k is int and isinstance(value, bool)) for k in plain)
        if (not fits and not (number and math.isfinite(value))) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            found.append(value)
    return list({repr(value): value for value in found}.values())


def bad_texts(hint: Any) -> list[str]:
    """Texts on a command line that an annotation does not allow."""
    plain, literal, _ = kinds(hint)
    found = ["nonsense"] if literal else []
    if str not in plain:
        found += [text for kind in plain for text in TEXTS.get(kind, ())]
    return found


def hints(kind: Any) -> dict[str, Any]:
    """The annotations of a class's fields, or of a function's arguments."""
    found = get_type_hints(kind)
    names = getattr(kind, "__dataclass_fields__", None)
    return {name: hint for name, hint in found.items() if (name in names if names is not None else name != "return")}


def out_of_range(kind: Any, name: str) -> list[float]:
    """A value beyond each bound that is annotated."""
    found: list[float] = []

    def look(hint: Any) -> None:
        for part in getattr(hint, "__metadata__", ()):
            found.extend([part.ge - 1] if isinstance(part, Ge) else [part.gt] if isinstance(part, Gt) else [])
            found.extend([part.le + 1] if hasattr(part, "le") else [part.lt] if hasattr(part, "lt") else [])
        for arm in get_args(hint):
            look(arm)

    look(get_type_hints(kind, include_extras=True)[name])
    return found


def outcome(case: Case, place: Path) -> str:
    """`refused`, or what was wrong with the answer: accepted, late, traceback, not one sentence, not named."""
    err = io.StringIO()
    message = ""
    with sentinels(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = case.act(place)
        except SystemExit as error:
            code = error.code
        except AssertionError as error:
            return "late" if "TOO LATE" in str(error) else f"traceback: {error!r}"
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            message, code = str(error), 2
            if case.command:
                return f"traceback: {error!r}"
        except Exception as error:
            return f"traceback: {error!r}"
        else:
            if not case.command:
                return "accepted"
    if case.command:
        said = err.getvalue()
        if "TOO LATE" in said:
            return "late"
        if code == 0:
            return "accepted"
        if code != 2 or "Traceback" in said:
            return f"traceback: {code} {said[-300:]}"
        lines = said.strip().splitlines()
        if (
            not lines
            or not lines[-1].startswith("spf: ")
            or sum(line.startswith(("spf", "usage")) for line in lines) > 1
        ):
            return f"not one sentence: {said[-300:]}"
        message = lines[-1]
    if not message or "\n" in message:
        return f"not one sentence: {message[:300]}"
    if not any(name in message for name in case.names):
        return f"not named: {message[:300]}"
    return "refused"


@contextlib.contextmanager
def sentinels() -> Iterator[None]:
    """No model is loaded and nothing is trained: that would be too late."""
    from datasets import load_dataset  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

    def late(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("TOO LATE")

    with contextlib.ExitStack() as stack:
        for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer):
            stack.enter_context(mock.patch.object(kind, "from_pretrained", late))
        stack.enter_context(mock.patch.object(Trainer, "train", late))
        yield


def parameters(cases: list[Case]) -> list[Any]:
    """For parametrize; every id once."""
    assert len({case.id for case in cases}) == len(cases), [
        c.id for c in cases if [d.id for d in cases].count(c.id) > 1
    ]
    return [pytest.param(case, id=case.id) for case in cases]


def changes(good: Any, free: tuple[str, ...] = (), path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(what, name of the field, the whole with one thing wrong) for every field of a JSON object, not below `free`.

    A field is left out, of another type, NaN where it is a number; an unknown one is added.
    """
    if not isinstance(good, dict) or path in free:
        return
    yield f"{path or 'top'} has an unknown name", "surplus", good | {"surplus": 1}
    for name, value in good.items():
        place = f"{path}.{name}" if path else name
        rest = {key: kept for key, kept in good.items() if key != name}
        yield f"{place} missing", name, rest
        for other in wrong(value):
            yield f"{place} is {json.dumps(other)[:20]}", name, rest | {name: other}
        for what, field, whole in changes(value, free, place):
            yield what, field, good | {name: whole}


def wrong(value: Any) -> list[Any]:
    """JSON of other types."""
    if isinstance(value, bool):
        return ["yes", 3]
    if isinstance(value, int | float):
        return ["1", True, math.nan, []]
    if isinstance(value, str):
        return [3, []]
    if isinstance(value, list):
        return [{}, "x"]
    if isinstance(value, dict):
        return [[], 3]
    return []


def damages(content: bytes) -> list[tuple[str, bytes | None]]:
    """(what, content) of a file that is cut, empty, or something else; None for a directory in its place."""
    cuts = [1, 8, len(content) // 4, len(content) // 2, len(content) - 9, len(content) - 1]
    return [
        ("empty", b""),
        ("a directory", None),
        ("a list", b"[]"),
        ("a number", b"3"),
        ("null", b"null"),
        ("text", b"not what you think"),
        ("zeros", bytes(64)),
        ("no UTF-8", b"\xff\xfe" + content[2:]),
        ("nested", b"[" * 100_000),
        *((f"cut at {cut}", content[:cut]) for cut in dict.fromkeys(cuts) if 0 < cut < len(content)),
    ]


def put(path: Path, content: bytes | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path
