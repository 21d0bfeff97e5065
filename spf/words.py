"""How the words of a command line become what a command is told. Light, as `arguments.py` is."""

import re
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


class _Parser(ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} ({self.prog} --help shows the options)")


def parse(kind: Any, command: str, arguments: Sequence[str]) -> Any:
    """The dataclass `kind` from the words behind `spf COMMAND`.

    Raises:
        ValueError: an unknown option, a value of another type, or something that is missing.
        SystemExit: help was asked for and printed.
    """
    parser = parser_of(kind, command, places=False)
    former = {old: f.name for f in fields(kind) for old in f.metadata.get("former", ())}
    switches = {f.name for f in fields(kind) if _type(kind, f) is bool}
    named, rest = parser.parse_known_args(spelled(arguments, former, notice=True, switches=switches))
    found = vars(named)
    # what has no name goes, in order, where no name was given
    for f in _places(kind):
        if f.name not in found and rest and not rest[0].startswith("-"):
            found[f.name], rest = (rest, []) if _type(kind, f) is list else (rest[0], rest[1:])
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if missing := [f"--{f.name}" for f in fields(kind) if f.name not in found and _required(f)]:
        parser.error(f"{', '.join(missing)} must be given")
    return kind(**found)


def spelled(
    arguments: Sequence[str], names: dict[str, str], *, notice: bool = False, switches: Collection[str] = ()
) -> list[str]:
    """The arguments with underscores in the names of options, and `names` in place of others.

    notice: say so, as those go. switches: options that may stand without a value, whatever follows them.
    """
    words = []
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if re.match("--[a-z]", option):
            name = option[2:].replace("-", "_")
            if name in names:
                if notice:
                    print(
                        f"spf: --{name} is now --{names[name]}; the old name goes with the next release",
                        file=sys.stderr,
                    )
                name = names[name]
            if name in switches and not equals and not {"true", "false"} & set(arguments[i + 1 : i + 2]):
                equals, value = "=", "true"
            word = f"--{name}{equals}{value}"
        words.append(word)
    return words


def parser_of(
    kind: Any, command: str, *, epilog: str | None = None, places: bool = True, add_help: bool = True
) -> ArgumentParser:
    """The argparse parser of a command. What is not given is not in its namespace.

    places: with what may be given without its name, for help texts and completion.
    """
    shown = []
    for f in _places(kind):
        name = f"{f.name.upper()}{' ...' if _type(kind, f) is list else ''}"
        shown.append(name if _required(f) else f"[{name}]")
    parser = _Parser(
        prog=f"spf {command}",
        usage=" ".join(["spf", command, *shown, "[--option value ...]"]),
        description=kind.__doc__,
        epilog=epilog,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
        argument_default=SUPPRESS,
    )
    for f in _places(kind) if places else ():
        nargs = "*" if _type(kind, f) is list else "?"
        parser.add_argument(f.name, nargs=nargs, metavar=f.name.upper(), help=f"the same as --{f.name}")
    for f in fields(kind):
        wanted = _type(kind, f)
        options: dict[str, Any] = {"type": wanted}
        if wanted is bool:
            options = {"type": _switch, "nargs": "?", "const": True, "metavar": "true|false"}
        elif wanted is list:
            options = {"type": str, "nargs": "+"}
        elif choices := _choices(kind, f):
            options = {"type": str, "choices": choices}
        default = "" if f.default in (MISSING, None, False) else f" (default: {f.default})"
        text = f"{f.metadata['help']}{default}{' (needed)' if _required(f) else ''}"
        parser.add_argument(f"--{f.name}", dest=f.name, help=text.replace("%", "%%"), **options)
    return parser


def expanded(value: Any) -> Any:
    """A value of the command line or a YAML file with `~` and `~user` in place of home directories, however deep.

    Also behind `=` and commas (--output=~/x, name=~/x, a,~/b).

    Raises:
        ValueError: there is no such user.
    """
    if isinstance(value, str):
        return re.sub(r"(?<![^=,])~[\w.-]*(?=[/,]|$)", _home, value)
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if isinstance(value, dict):
        return {key: expanded(item) for key, item in value.items()}
    return value


def _home(found: re.Match[str]) -> str:
    try:
        return str(Path(found[0]).expanduser())
    except RuntimeError:
        raise ValueError(f"{found.string}: no home directory of {found[0]} is known") from None


def _places(kind: Any) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.metadata.get("positional")]


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _type(kind: Any, f: Field[Any]) -> Any:
    """str, int, float, bool or list: what a word of the command line becomes."""
    hint = get_type_hints(kind)[f.name]
    if _choices(kind, f):
        return str
    if get_origin(hint) is list:
        return list
    named = [part for part in get_args(hint) if part is not type(None)] or [hint]
    return named[-1]


def _choices(kind: Any, f: Field[Any]) -> tuple[str, ...]:
    hint = get_type_hints(kind)[f.name]
    return get_args(hint) if get_origin(hint) is Literal else ()


def _switch(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError(word)
    return word.lower() == "true"


_switch.__name__ = "true or false"
