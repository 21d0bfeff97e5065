"""For mkdocs: links from the docs to other files of the repository, which the site does not have.

They lead to the repository where `repo_url` is set, else they become names of files. One that is not there stops the
build.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    place = ROOT / "docs" / Path(page.file.src_uri).parent

    def led(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target:
            return found[0]
        path = (place / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]  # mkdocs looks after those
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: links to {target}, which is not there")
        name = path.relative_to(ROOT).as_posix()
        repository = (config.repo_url or "").rstrip("/")
        if not repository:
            return f"{text} (`{name}`)" if text.strip("`") != name else f"`{name}`"
        return f"[{text}]({repository}/blob/main/{name}{anchor})"

    return LINK.sub(led, markdown)
