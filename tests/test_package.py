"""The wheel has everything that runs without the repository, and importing the package is fast."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from s2q.recipes.load import recipe_names
from s2q.shapes.embedded import EMBEDDED_NAMES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel, unpacked where nothing else is, and an environment in which it is found before the repository."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder, {**os.environ, "PYTHONPATH": str(folder)}


def python(installed, *arguments):
    folder, environment = installed
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "src/s2q"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("no git repository")
    assert names == {name.removeprefix("src/") for name in listed.stdout.split("\n") if name}


@pytest.mark.slow
def test_the_size_of_the_wheel_is_that_of_the_page(wheel):
    stated = re.search(r"The wheel is (\d+) MB", (ROOT / "docs" / "quickstart.md").read_text())
    assert stated is not None
    assert abs(wheel.stat().st_size / 1e6 - int(stated[1])) < 1


@pytest.mark.slow
def test_models_and_recipes_are_in_the_wheel(installed):
    code = (
        "import s2q\n"
        "from s2q.recipes.load import load_recipe, recipe_names\n"
        "from s2q.shapes.embedded import EMBEDDED_NAMES\n"
        "[load_recipe(name) for name in recipe_names()]\n"
        "print(s2q.__file__, s2q.__version__, len(recipe_names()), *EMBEDDED_NAMES)"
    )
    file, version, recipes, *models = python(installed, "-c", code).split()
    assert Path(file).parent.parent == installed[0]
    assert (version, int(recipes), models) == ("0.1.0", len(recipe_names()), list(EMBEDDED_NAMES))
    planned = python(installed, "-m", "s2q", "plan", "-m", "shapes-wan", "-r", "rtn-w4a8")
    assert "shapes-wan with rtn-w4a8" in planned


@pytest.mark.slow
def test_the_import_takes_less_than_300_ms_and_no_torch(installed):
    code = (
        "import sys, time; start = time.process_time(); import s2q\n"
        "print(time.process_time() - start, 'torch' in sys.modules, hasattr(s2q, 'quantize'), 'torch' in sys.modules)"
    )
    seconds, *imported = python(installed, "-c", code).split()
    assert float(seconds) < 0.3
    assert imported == ["False", "True", "True"]
