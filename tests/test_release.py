"""What is published: built from a clean copy, described well, small, and nothing in it that is not the package."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import spf

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    place = tmp_path_factory.mktemp("release")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, place)
    for name in ("spf", "tests", "benchmarks", "recipes"):  # the last three: to see that they stay out
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors.tmp"))
    run("build", "--no-isolation", "--outdir", "dist", cwd=place)
    return place / "dist"


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_the_package_alone(built):
    [wheel] = built.glob("*.whl")
    assert wheel.stat().st_size < 8_000_000
    assert wheel.name.startswith(f"spf-{spf.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"spf", f"spf-{spf.__version__}.dist-info"}
    assert not [name for name in names if "test" in Path(name).name or "result" in name.split("/")[:-1]]
    # nothing of the package is left out: prompts, labelled answers, the demo's adapter, templates of the reports
    files = [path for path in (ROOT / "spf").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {name for name in names if name.startswith("spf/")} == {p.relative_to(ROOT).as_posix() for p in files}
    assert len({Path(name).suffix for name in names} & {".jsonl", ".safetensors", ".j2", ".css", ".typed"}) == 5


@pytest.mark.slow
def test_twine_finds_no_fault(built):
    said = run("twine", "check", "--strict", *map(str, sorted(built.iterdir())), cwd=built)
    assert said.count("PASSED") == 2


def test_the_changelog_begins_with_this_version():
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## "))
    assert re.fullmatch(rf"## {re.escape(spf.__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", first)


def test_the_citation_names_the_package_and_no_version():
    """What CFF 1.2.0 requires; the version stands elsewhere."""
    given = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= given.keys()
    assert (given["cff-version"], given["type"], given["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert given["authors"] == [{"name": "SPF developers"}]
    assert "version" not in given


def test_the_version_stands_in_one_place():
    found = [
        path
        for path in (ROOT / "pyproject.toml", *(ROOT / "spf").rglob("*.py"))
        if spf.__version__ in path.read_text("utf-8")
    ]
    assert found == [ROOT / "spf" / "__init__.py"]
