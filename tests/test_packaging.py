"""The wheel in a bare virtual environment elsewhere, and what importing the loss imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.processes import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "palf_dist")
HEAVY = ("ray", "mlflow", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "highspy", "jinja2", "torch._dynamo")
UNUSED = """
import sys
from palf_dist import AdaptiveLoss
criterion = AdaptiveLoss.load("default", total_steps=10)
criterion.explain()
print(*({heavy} & sys.modules.keys()))
"""
INSTALLED = """
import palf_dist, warnings
from importlib.metadata import version
from palf_dist import AdaptiveLoss
warnings.simplefilter("ignore")
print(palf_dist.__file__, version("palf-dist"), AdaptiveLoss.load("default", total_steps=10).explain().features[0])
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a program prints that sees nothing of this checkout."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PALF", "MLFLOW"))
    }
    ended = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_loss_imports_little(tmp_path: Path) -> None:
    """Neither the import nor a loaded policy takes what only training, tracking and reports need."""
    script = UNUSED.format(heavy=set(HEAVY))
    assert run(sys.executable, "-W", "ignore", "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT)).split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools builds in the folder of the sources, and would take along what is left there."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", built]
    run(*pip, sources, cwd=sources)
    (path,) = built.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    files = (path.relative_to(ROOT) for path in (ROOT / "palf_dist").rglob("*") if path.is_file())
    wanted = {str(path) for path in files if "__pycache__" not in path.parts}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wanted <= held and {name.split("/")[0] for name in held - wanted} == {
        f"{wheel.name.split('-py3')[0]}.dist-info"
    }


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, which borrows torch and the other libraries from that of the tests."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_an_example_runs_with_the_installed_wheel(bare: Path, tmp_path: Path) -> None:
    python = bare / "bin" / "python"
    (site,) = bare.glob("lib/python*/site-packages")
    place, _, feature = run(python, "-c", INSTALLED, cwd=tmp_path).split()
    assert Path(place).parent.parent == site and feature == "time"
    shutil.copy(ROOT / "examples" / "noisy_digits.py", tmp_path)
    printed = run(python, "-W", "ignore", "noisy_digits.py", "default", cwd=tmp_path)
    gain = float(printed.split("difference ")[1].split()[0])
    assert gain > 3, printed

    command = bare / "bin" / "palf-dist"
    assert run(command, "--version", cwd=tmp_path).startswith("palf-dist ")
    assert "fashion-mnist" in run(command, "datasets", "list", "--suite", "palf12", cwd=tmp_path)
    assert "robust_ce" in run(command, "policy", "show", "default", cwd=tmp_path)


@pytest.mark.slow
def test_a_users_code_is_checked_strictly_against_the_installed_wheel(bare: Path, tmp_path: Path) -> None:
    """And what is wrong in it is found: so the types come from the wheel, and are not all Any."""
    code = (ROOT / "tests" / "users_code.py").read_text()
    assert mypy_says(bare, tmp_path, code) == []
    wrong = code.replace("total_steps=1000", 'total_steps="1000"').replace('active_basis = ("ce", "mae")', "")
    found = mypy_says(bare, tmp_path, wrong)
    assert len(found) == 3 and "total_steps" in found[-1], found


def mypy_says(bare: Path, folder: Path, code: str) -> list[str]:
    """The errors that ``mypy --strict`` finds, without this project's configuration. It would read the insides of ray
    and mlflow for minutes: they are left out."""
    (folder / "users_code.py").write_text(code)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-ray.*,mlflow.*]\nfollow_imports = skip\n")
    options = ["--cache-dir", str(bare / "mypy"), "--python-executable", str(bare / "bin" / "python")]
    command = [sys.executable, "-m", "mypy", *options, "users_code.py"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert not ended.stderr, ended.stderr
    return [line for line in ended.stdout.splitlines() if ": error:" in line]
