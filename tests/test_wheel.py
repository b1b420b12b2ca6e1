"""A built wheel holds what an editable install finds in the source tree: recipes, shapes, templates, the sample."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import lit_tune
from lit_tune import recipes
from lit_tune.data.instruct import bundled_sample
from lit_tune.data.prompts import load_template
from lit_tune.modules.load import shapes
from pathlib import Path
assert Path(bundled_sample()).is_file()
assert load_template("llama3").source
assert "llama2-7b" in shapes()
print(Path(lit_tune.__file__).parent)
print(*recipes.shipped())
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, offline, and unpack it as an install would."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("lit_tune", "configs"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True, capture_output=True)
    (wheel,) = folder.glob("lit_tune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_installed_package_finds_what_it_ships(unpacked: Path, tmp_path: Path) -> None:
    # Ahead of everything on the path, as site-packages would be; the working directory is not the source tree.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, names = done.stdout.splitlines()
    assert Path(place) == unpacked / "lit_tune"
    assert set(names.split()) == {path.name for path in (ROOT / "configs").glob("*.yaml")}
