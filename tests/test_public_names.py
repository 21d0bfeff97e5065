"""Every name that README and docs import is there, and so are old paths that they named."""

import importlib
import re
from pathlib import Path

import pytest

import spf
from spf.rules import RULES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORTS = sorted(
    {
        (module, name.strip())
        for page in PAGES
        for module, names in re.findall(r"^from (spf[\w.]*) import ([\w, ]+)$", page.read_text("utf-8"), re.M)
        for name in names.split(",")
    }
)


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_what_the_docs_import_is_there(module, name):
    assert getattr(importlib.import_module(module), name) is not None


def test_there_is_something_to_import():
    assert ("spf", "SafetyCallback") in IMPORTS
    assert len(IMPORTS) >= 5


def test_the_package_has_what_it_lists():
    for name in spf.__all__:
        assert getattr(spf, name).__name__.lower() == name.lower()
        assert name in dir(spf)
    assert {rule.__name__ for rule in RULES.values() if rule.__module__.startswith("spf.")} <= set(spf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        spf.Nothing  # noqa: B018


@pytest.mark.parametrize("path", ["spf.analysis.gradients", "spf.analysis.activations", "spf.baselines.kl"])
def test_old_paths_work_for_one_release(path):
    assert importlib.import_module(path).__name__ == path
