"""SafetyCallback from settings with names: those of a command line, of a YAML file, of another framework's."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from spf.arguments import SafetyArguments
from spf.callback import SafetyCallback
from spf.config import CallbackSettings, annotations, check_values
from spf.rules import RULES, Rule
from spf.text.chat import parse_options

PREFIX = "safety_"


def make_callback(safety: SafetyArguments, called: str = "safety_{}") -> SafetyCallback | None:
    """The callback these arguments describe; None for the rule `none`. called: how the user writes a setting's name.

    Raises:
        ValueError: an unknown rule, or a rank that it cannot have.
    """
    rule = make_rule(safety, called)
    if rule is None:
        return None
    settings = {setting.name: vars(safety)[f"{PREFIX}{setting.name}"] for setting in fields(CallbackSettings)}
    options = settings["chat_template_kwargs"]
    if isinstance(options, str):
        settings["chat_template_kwargs"] = parse_options(options, called.format("chat_template_kwargs"))
    return SafetyCallback(safety.safety_data, rule, keep=safety.safety_keep, **settings)


def make_rule(safety: SafetyArguments, called: str = "safety_{}") -> Rule | None:
    """Its rule, with the rank that is asked for; see `make_callback`."""
    if safety.safety_rule == "none":
        return None
    if safety.safety_rule not in RULES:
        raise ValueError(f"{called.format('rule')}: no rule {safety.safety_rule}; there are none, {', '.join(RULES)}")
    kind: Any = RULES[safety.safety_rule]
    if safety.safety_rank is None:
        return kind()
    if "rank" in {setting.name for setting in fields(kind)}:
        return kind(rank=safety.safety_rank)
    raise ValueError(f"{called.format('rank')}: the rule {safety.safety_rule} has no rank; null-space and spf have one")


def callback_from(settings: Mapping[str, Any]) -> SafetyCallback | None:
    """The callback of a framework's `spf:` block: the names of `spf train` without `safety_` (data, keep, rule, ...).

    Raises:
        ValueError: a name that is not known, or a value of another type or out of its range.
    """
    hints = {name.removeprefix(PREFIX): hint for name, hint in annotations(SafetyArguments).items()}
    check_values(hints, settings, "spf: {}")
    return make_callback(SafetyArguments(**{f"{PREFIX}{name}": value for name, value in settings.items()}), "spf: {}")
