"""What people may write: types of settings and files, the callback's settings, one sentence for what is wrong."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", arbitrary_types_allowed=True)
"""A bool is no number, text is no number, NaN and infinity are none either, and an unknown name is a mistake."""

T = TypeVar("T")

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Weight = Annotated[float, Gt(0), Le(1e6)]
"""Of a token; more would leave the others nothing in float32."""
Name = Annotated[str, MinLen(1)]
Share = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
_ORDERED = AfterValidator(lambda ends: ends if ends[0] <= ends[1] else _refuse("[low, high] in this order"))
Ends = Annotated[list[float], MinLen(2), MaxLen(2), _ORDERED]
Interval = Annotated[list[Share], MinLen(2), MaxLen(2), _ORDERED]
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What NumPy takes, too."""

Conflicts = Literal["hold", "hold-all", "drop", "allow", "error"]
"""What is done about training rows that answer prompts which the aligned model refuses: their prompts are held with the
model's own refusals and the rows are left out where they can be, or have to be, nothing, or the run is refused."""

OnLeak = Literal["tighten", "stop", "warn"]
"""What is done about refusals that are lost while training: more directions are held as soon as prompts flip, the
run is ended, or nothing but a warning, which comes with the others too."""

_WANTED = {
    "bool_type": "true or false",
    "dataclass_exact_type": "a {class_name}",
    "dataclass_type": "a {class_name}",
    "dict_type": "an object of names and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than_equal": "at least {ge:.10g}",
    "int_type": "a whole number",
    "less_than": "below {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
    "json_type": "JSON",
    "list_type": "a list",
    "model_type": "an object of names and values",
    "literal_error": "{expected}",
    "is_instance_of": "a {class}",
    "path_type": "a path",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
    "value_error": "{error}",
}


def _refuse(wanted: str) -> Any:
    raise ValueError(wanted)


def one_of(names: Collection[str]) -> AfterValidator:
    """For `Annotated[str, ...]`, where the names are known only when the program runs."""
    return AfterValidator(lambda name: name if name in names else _refuse(f"one of {', '.join(names)}"))


def sentence(error: ValidationError, form: str = "{}", depth: int = 1) -> str:
    """The first mistake: which field (its place up to `depth`, in `form`), what it must be, what it is."""
    found = error.errors(include_url=False)
    first = found[0]
    kind, value, name = first["type"], first["input"], ".".join(map(str, first["loc"][:depth]))
    what = form.format(name) if name else "it"
    if kind in ("missing", "extra_forbidden", "unexpected_keyword_argument"):
        return f"{what} is {'missing' if kind == 'missing' else 'not known'}"
    if kind == "value_error" and not name:
        return str(first["ctx"]["error"])
    # what may be of several types has a mistake for each
    wanted = dict.fromkeys(_wanted(e) for e in found if e["loc"][:depth] == first["loc"][:depth])
    return f"{what} must be {' or '.join(wanted)}, not {' '.join(repr(value).split())[:60]}"


def _wanted(error: Any) -> str:
    given = error.get("ctx", {})
    if error["loc"][-1:] == ("[key]",):
        return "values with names that are text"
    if error["type"] == "greater_than":
        return "positive" if given["gt"] == 0 else f"above {given['gt']:.10g}"
    form = _WANTED.get(error["type"])
    return form.format(**given).replace("'", "") if form else error["msg"]


def check_values(hints: Mapping[str, Any], values: Mapping[str, Any], form: str = "{}") -> None:
    """Hold values to types by name; `form` is how a name stands in the message ("--{}", "mix: {}").

    Raises:
        ValueError: one is of another type or out of range, NaN or infinite, or not known; one sentence.
    """
    _validate(_adapter(tuple(hints.items())), values, form)


def check(kind: Any, values: Mapping[str, Any], form: str = "{}") -> None:
    """Hold values to the annotations of a dataclass's fields or a function's arguments, as `check_values` does."""
    _validate(_adapter_of(kind), values, form)


def _validate(adapter: TypeAdapter, values: Mapping[str, Any], form: str) -> None:
    try:
        adapter.validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(sentence(error, form)) from None


def annotations(kind: Any) -> dict[str, Any]:
    """Of a dataclass's fields or a function's arguments, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else [name for name in hints if name != "return"]
    return {name: hints[name] for name in names}


@cache
def _adapter_of(kind: Any) -> TypeAdapter:
    return _adapter(tuple(annotations(kind).items()))


def _adapter(hints: tuple[tuple[str, Any], ...]) -> TypeAdapter:
    """Of a mapping with some of these names."""
    values: Any = TypedDict("values", dict(hints), total=False)  # type: ignore
    return TypeAdapter(with_config(STRICT)(values))


class File(BaseModel):
    """Subclass it for what one of our files holds: types are strict, unknown names are mistakes."""

    model_config = STRICT


def parse_json(kind: type[T], content: str | bytes, where: str | Path, remedy: str) -> T:
    """JSON as a `File` or a dataclass.

    Raises:
        ValueError: it is no JSON, or one of its fields is not as it must be: one sentence with `where` and what to do.
    """
    try:
        found: T = _whole(kind).validate_json(content, strict=True)  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        broken = error.errors(include_url=False)[0]["type"] == "json_invalid"
        said = "not a JSON file" if broken else sentence(error, "`{}`", depth=9)
        raise ValueError(f"{where}: {said}; {remedy}") from None


def read_json(kind: type[T], path: Path, remedy: str) -> T:
    """`parse_json` of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a directory, or see `parse_json`.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a directory, where a file is expected; {remedy}")
    return parse_json(kind, path.read_bytes(), path, remedy)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of names and values.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}, where YAML is expected")
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: must hold names and values, not {repr(found)[:60]}")
    return found


@cache
def _whole(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


class Settings:
    """Subclass it as a dataclass: its fields are held to their annotations whenever one is made.

    form: how a field is named in a message.
    """

    form: ClassVar[str] = "{}"
    __pydantic_config__: ClassVar[ConfigDict] = STRICT  # where one is read from JSON

    def __post_init__(self) -> None:
        check(type(self), vars(self), self.form)


class Arguments(Settings):
    """Settings from a command line (`spf.words.parse`)."""

    form = "--{}"


# To add a setting of the callback: a field here, the argument of the same name in SafetyCallback.__init__ (which hands
# it on and keeps it). `spf train` then has it as --safety_NAME, with this help.
@dataclass(frozen=True)
class CallbackSettings(Settings):
    """The settings of SafetyCallback beside its data and its rule."""

    anchors: Count | None = field(default=None, metadata={"help": "use only so many safety samples"})
    anchors_per_step: Count = field(default=4, metadata={"help": "safety samples a probe, in turn"})
    first_tokens: Whole = field(default=0, metadata={"help": "so many first tokens of every refusal weigh otherwise"})
    first_weight: Weight = field(default=1.0, metadata={"help": "what they weigh"})
    monitor_steps: Whole = field(
        default=10, metadata={"help": "ask watched prompts every so many steps; 0: at the end only"}
    )
    cosines: bool = field(
        default=False, metadata={"help": "measure the cosine of both gradients then, too (a backward pass)"}
    )
    conflicts: Conflicts = field(
        default="hold",
        metadata={
            "help": "training rows that answer harmful prompts which the model refuses: hold (and leave them out where "
            "they can be), hold-all (of all that it refuses), drop (leave them out, or stop), allow or error"
        },
    )
    audited: Name | None = field(
        default=None,
        metadata={
            "help": "directory of an audit of these data that was made before (spf audit): the model is not asked"
        },
    )
    on_leak: OnLeak = field(
        default="tighten",
        metadata={
            "help": "when refusals are being lost: tighten (hold more directions; null-space), stop (then end the run, "
            "too) or warn"
        },
    )
    chat_template_kwargs: Mapping[str, Any] | None = field(
        default=None, metadata={"help": "variables of the chat template for the safety samples, as JSON"}
    )
    subspace: Name | None = field(
        default=None, metadata={"help": "directory of an adapter that spf trained, to go on with it"}
    )
    seed: Seed = field(default=0, metadata={"help": "choice and order of the safety samples"})

    form = "SafetyCallback: {}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_leak == "stop" and not self.monitor_steps:
            raise ValueError(
                "SafetyCallback: on_leak='stop' needs monitor_steps=1 or more: with 0 nothing is asked until the run "
                "has ended"
            )
