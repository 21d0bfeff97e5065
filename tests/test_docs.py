"""The pages: short, linked rightly, built strictly, and every command in them is one that there is."""

import ast
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spf import words
from spf.cli import COMMANDS
from tests.lab.browser import CHROMIUM

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST = ("spf", "python", "python3", "pip", "make", "accelerate", "torchrun", "swift", "mkdocs", "export")
NOT_RUN = re.compile(r"<!-- not run: (.{10,}?) -->\s*$")
"""Stands before a block of commands that no test runs, and says why."""


def blocks(page):
    """The page's blocks of code without the language Python or YAML, each with the text before it."""
    text = page.read_text("utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$|(?<=\n\n)(?:    \S[^\n]*\n)+", text, re.M | re.S):
        if (found[1] or "") in ("", "bash", "sh"):
            yield text[: found.start()].rstrip(), found[2] or found[0]


def commands():
    for page in PAGES:
        for before, block in blocks(page):
            marked = bool(NOT_RUN.search(before))
            for line in block.splitlines():
                said = shlex.split(line.strip(), comments=True) if line.strip().startswith(FIRST) else []
                if said and said[0] in FIRST and not marked:
                    yield pytest.param(said, id=f"{page.relative_to(ROOT)}: {' '.join(said)[:60]}")


def in_recipes(recipe):
    return (ROOT / recipe).is_file() and recipe.startswith("recipes/")


def known(said):
    """Whether a test runs this command, or at least its own parser has all its options; runs of all are elsewhere."""
    match said:
        case ["spf", "train", recipe, *flags]:  # every recipe: test_recipes.py
            return in_recipes(recipe) and all(re.fullmatch(r"--\w+", flag) for flag in flags[::2])
        case ["spf", first, *rest]:  # every command: test_cli.py, safetylock/, lab/
            name, rest = (f"{first} {rest[0]}", rest[1:]) if first in ("lock", "study") else (first, rest)
            words.parse(COMMANDS[name].arguments, name, rest)
            return True
        case ["accelerate", "launch", "--config_file", launcher, "-m", "spf.cli", "train", recipe]:
            return (ROOT / launcher).is_file() and in_recipes(recipe)  # distributed/test_recipes.py
        case ["make", target]:
            return bool(re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M))
        case ["pip", "install", "-e", extra]:
            name = extra.removeprefix(".").strip("[]")
            return not name or bool(re.search(rf"^{name} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M))
        case ["python", "-m", "pytest", path, *_]:
            return (ROOT / path).exists()
        case ["python", "-m", module, *_]:  # what makes a page or a picture for the docs
            return module.startswith("tests.") and (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    return False


@pytest.mark.parametrize("said", commands())
def test_a_command_in_the_docs_is_known(said):
    assert known(said), "no test knows it: mark its block with <!-- not run: why -->"


def test_wrong_commands_are_noticed():
    assert len(list(commands())) > 25
    assert not known(["make", "coffee"])
    assert not known(["spf", "train", "recipes/gone.yaml"])
    assert not known(["python", "gone.py"])
    with pytest.raises(ValueError, match="--modle"):
        known(["spf", "audit", "data.jsonl", "--modle", "m"])


def examples():
    for page in PAGES:
        for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S), 1):
            yield pytest.param(block, id=f"{page.relative_to(ROOT)}: {i}")


def misplaced(block):
    """Arguments of an example that do not go where they say: what a name was imported for is called by its signature.

    What is called like another parameter than the one it is given to is wrong, though it can be bound: `args` as the
    second argument is a trainer's arguments of SFT, and of DPO its reference model.
    """
    tree = ast.parse(block)
    known = {}
    for line in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        try:
            module = importlib.import_module(line.module)
        except ModuleNotFoundError as error:
            # of a framework that is not installed here; ours and those that we stand on are
            if error.name.split(".")[0] in ("spf", "trl", "peft", "transformers", "datasets", "torch"):
                raise
            continue
        known |= {name.asname or name.name: getattr(module, name.name) for name in line.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        base, _, method = ast.unparse(call.func).partition(".")
        called = getattr(known[base], method) if base in known and method else known.get(base)
        if called is None:
            continue
        signature = inspect.signature(called)
        said = list(itertools.takewhile(lambda given: not isinstance(given, ast.Starred), call.args))
        bind = signature.bind if len(said) == len(call.args) else signature.bind_partial
        try:
            bound = bind(*said, **{word.arg: word.value for word in call.keywords if word.arg})
        except TypeError as error:
            yield f"{ast.unparse(call.func)}: {error}"
            continue
        for place, given in bound.arguments.items():
            if isinstance(given, ast.Name) and given.id != place and given.id in signature.parameters:
                yield f"{ast.unparse(call.func)}: {given.id} is given as {place}"


@pytest.mark.parametrize("block", examples())
def test_an_example_gives_its_arguments_where_they_belong(block):
    """The DPO example gave its arguments as the reference model."""
    assert not list(misplaced(block))


def test_wrong_examples_are_noticed():
    assert len(list(examples())) > 7
    start = "from trl import DPOTrainer, SFTTrainer\nfrom spf import NullSpace\n"
    assert list(misplaced(start + "DPOTrainer(model, args)")) == ["DPOTrainer: args is given as ref_model"]
    assert not list(misplaced(start + "SFTTrainer(model, args)"))
    assert list(misplaced(start + "NullSpace(rnk=3)")) == ["NullSpace: got an unexpected keyword argument 'rnk'"]
    with pytest.raises(ModuleNotFoundError):
        list(misplaced("from spf.gone import Rule"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_short_and_its_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    assert len(text.splitlines()) <= (120 if page.name == "README.md" else 300)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, as CI publishes it: a wrong link, anchor, name of the API or page that is left out stops the build."""
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return place


@pytest.mark.slow
def test_the_site_is_built_strictly(site):
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / (name.parent if name.name == "index" else name) / "index.html").is_file(), name
    api = (site / "api" / "index.html").read_text("utf-8")
    assert "one probe" in api or "safety_data" in api
    assert not re.search(r'href="[^"]*\.\./(recipes/|README)', (site / "index.html").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no browser here")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["", "evidence", "api", "troubleshooting"])
def test_a_page_of_the_site_is_as_wide_as_the_window(site, page, width, tmp_path):
    from tests.lab.browser import needed_width

    assert needed_width(site / page / "index.html", width) <= width
