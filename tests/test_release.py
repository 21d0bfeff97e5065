"""What is published: built from a clean copy, described well, small, and nothing in it that is not the package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_the_wheel_is_small_and_holds_the_package_alone(built):
    [wheel] = built.glob("*.whl")
    assert wheel.stat().st_size < 8_000_000
    assert wheel.name.startswith(f"spf-{spf.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"spf", f"spf-{spf.__version__}.dist-info"}
    assert not [name for name in names if "test" in Path(name).name or "result" in name.split("/")[:-1]]
    needed = {"spf/py.typed", "spf/prompts/harmful_anchors.jsonl", "spf/integrations/axolotl.py"}
    assert needed <= set(names)
    assert any(name.startswith("spf/lab/demo/aligned/") for name in names)


def test_twine_finds_no_fault(built):
    said = run("twine", "check", "--strict", *map(str, sorted(built.iterdir())), cwd=built)
    assert said.count("PASSED") == 2


def test_the_version_stands_in_one_place():
    found = [
        path
        for path in (ROOT / "pyproject.toml", *(ROOT / "spf").rglob("*.py"))
        if spf.__version__ in path.read_text("utf-8")
    ]
    assert found == [ROOT / "spf" / "__init__.py"]
