"""What people may write: types of settings, the callback's settings, and one sentence for what is wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", arbitrary_types_allowed=True)
"""A bool is no number, text is no number, NaN and infinity are none either, and an unknown name is a mistake."""

Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Weight = Annotated[float, Gt(0), Le(1e6)]
"""Of a token; more would leave the others nothing in float32."""
Share = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What NumPy takes, too."""

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
    "list_type": "a list",
    "literal_error": "{expected}",
    "is_instance_of": "a {class}",
    "path_type": "a path",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
    "value_error": "{error}",
}


def sentence(error: ValidationError, form: str = "{}") -> str:
    """The first mistake: which field (in `form`), what it must be, what it is."""
    found = error.errors(include_url=False)
    first = found[0]
    name, kind, value = str(first["loc"][0]) if first["loc"] else "", first["type"], first["input"]
    if kind in ("missing", "extra_forbidden"):
        return f"{form.format(name)} is {'missing' if kind == 'missing' else 'not known'}"
    # what may be of several types has a mistake for each
    wanted = dict.fromkeys(_wanted(e) for e in found if e["loc"][:1] == first["loc"][:1])
    return f"{form.format(name)} must be {' or '.join(wanted)}, not {' '.join(repr(value).split())[:60]}"


def _wanted(error: Any) -> str:
    given = error.get("ctx", {})
    if error["loc"][-1:] == ("[key]",):
        return "values with names that are text"
    if error["type"] == "greater_than":
        return "positive" if given["gt"] == 0 else f"above {given['gt']:.10g}"
    form = _WANTED.get(error["type"])
    return form.format(**given).replace("'", "") if form else error["msg"]


@cache
def _adapter(kind: Any) -> TypeAdapter:
    """Of a dataclass or a function: a mapping with some of its fields or arguments, of the types that are annotated."""
    hints = get_type_hints(kind, include_extras=True)
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else [name for name in hints if name != "return"]
    values: Any = TypedDict(kind.__name__, {name: hints[name] for name in names}, total=False)  # type: ignore
    return TypeAdapter(with_config(STRICT)(values))


def check(kind: Any, values: Mapping[str, Any], form: str = "{}") -> None:
    """Hold values to the annotations of a dataclass's fields or a function's arguments.

    form: how one is named in the message ("--{}", "mix: {}").

    Raises:
        ValueError: one is of another type or out of range, NaN or infinite, or not known; one sentence.
    """
    try:
        _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(sentence(error, form)) from None


class Settings:
    """Subclass it as a dataclass: its fields are held to their annotations whenever one is made.

    form: how a field is named in a message.
    """

    form: ClassVar[str] = "{}"

    def __post_init__(self) -> None:
        check(type(self), vars(self), self.form)


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
    chat_template_kwargs: Mapping[str, Any] | None = field(
        default=None, metadata={"help": "variables of the chat template for the safety samples, as JSON"}
    )
    seed: Seed = field(default=0, metadata={"help": "choice and order of the safety samples"})

    form = "SafetyCallback: {}"
