"""One way to make a page: a template, its figures embedded, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from spf.files import replace_file
from spf.lab.report.tables import SIGNS, value_text


@dataclass(frozen=True)
class Picture:
    """A PNG picture, its text for who cannot see it, and the file that it is in, too, if there is one."""

    said: str
    png: bytes
    path: Path | None = None

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("spf.lab.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["value_text"] = value_text
    made.globals["signs"] = SIGNS
    return made


def write_page(template: str, path: Path, **content: Any) -> Path:
    """Render `templates/<template>.html.j2`, write it atomically and return its path.

    Raises:
        jinja2.UndefinedError: the template asks for what `content` lacks.
    """
    text = _templates().get_template(f"{template}.html.j2").render(**content)
    return replace_file(path, text.encode("utf-8"))
