"""What a pip install gets."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from refiner_hf.commands import COMMANDS


ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
HOME = SETUP["metadata"]["url"]
RAW = HOME.replace("github.com", "raw.githubusercontent.com") + "/main/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "refiner_hf", source / "refiner_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # The build's own packages are those installed here, so that nothing is downloaded.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next((source / "dist").glob("*.whl"))


def test_the_wheel_holds_the_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "refiner_hf").rglob("*"):
        if path.suffix in (".py", ".yaml", ".md", ".txt", ".typed", ".cpp", ".h"):
            assert str(path.relative_to(ROOT)) in names
    assert not any(name.startswith(("tests", "scripts")) for name in names)


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # importing them fails, as where they aren't installed
import refiner_hf
assert refiner_hf.__file__.startswith(sys.argv[1]), refiner_hf.__file__
from refiner_hf.commands import convert, predict, push
from refiner_hf.commands.training_options import recipe_names
assert {"digits", "fine_tune", "imagenet_s_224"} <= set(recipe_names())
from refiner_hf.cards.card import TEMPLATE
assert TEMPLATE.exists()
"""


def test_the_wheel_works_installed_and_imports_what_it_needs_only(wheel, tmp_path):
    """Unpacked alone, outside the checkout: importing it takes none of the packages for training."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    for_training = ["datasets", "evaluate", "matplotlib", "sklearn", "timm", "onnxruntime", "gradio"]
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(site), *for_training], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    programs = {path.name for path in (site / "bin").iterdir()}
    assert programs == {"refiner", *(f"refiner-{name}" for name in COMMANDS)}


def test_everything_names_one_home():
    """Moving it is one replacement, and nothing is forgotten."""
    files = [ROOT / name for name in ("setup.cfg", "README.md", "CITATION.cff", "CONTRIBUTING.md", "mkdocs.yml")]
    for file in [*files, *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.*")]:
        for named in re.findall(r"https://(?:raw\.githubusercontent|github)\.com/[\w-]+/refiner_hf", file.read_text()):
            assert named.replace("raw.githubusercontent", "github") == HOME, file


def test_the_readme_shows_on_pypi():
    """There a link relative to the repository leads nowhere. What is in the repository is there."""
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 20
    for target in targets:
        assert target.startswith("https://"), target
        for start in (RAW, f"{HOME}/blob/main/"):
            if target.startswith(start):
                assert (ROOT / target.removeprefix(start).partition("#")[0]).is_file(), target


def test_one_version_of_the_style():
    """Another ruff would format otherwise."""
    (least,) = re.findall(r"ruff >=([\d.]+),", (ROOT / "setup.cfg").read_text())
    assert f"rev: v{least}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_patch_releases_are_admitted():
    """An upper bound that names a release refuses its own corrections."""
    requirements = SETUP["options"]["install_requires"]
    assert not re.search(r"<=|==", requirements) and re.search(r"^torch .*<2\.15$", requirements, re.MULTILINE)
