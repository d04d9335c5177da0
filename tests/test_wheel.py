"""The built wheel holds the whole package, linked rooms and recipes included, and works away from the checkout."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("mambakit", "kernels", "datamodules", "recipes", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, source: Path, destination: Path) -> Path:
    """Build ``wheel`` or ``sdist`` of ``source`` with the installed setuptools, in a process of its own."""
    destination.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(destination)!r}))"
    return destination / run(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with links kept as links, so that building leaves nothing in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def overlay(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed without its dependencies into a folder of its own."""
    folder = tmp_path_factory.mktemp("overlay")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder))
    run(*pip, str(wheel), cwd=folder)
    return folder


def run_in_overlay(overlay: Path, code: str, cwd: Path) -> str:
    """Run ``code`` where mambakit is the overlay's.

    ``-I`` keeps the working folder and PYTHONPATH off the path. An editable install in site-packages finds packages
    last of all, so the overlay wins; the check at the end makes sure of it for every module that was loaded.
    """
    return run(
        *(sys.executable, "-I", "-c"),
        f"import sys\nsys.path.insert(0, {str(overlay)!r})\n{code}\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.split('.')[0] == 'mambakit' and module.__spec__.origin:\n"
        f"        assert module.__spec__.origin.startswith({str(overlay)!r}), module.__spec__.origin\n",
        cwd=cwd,
    )


def expected_files() -> set[str]:
    """Every Python file and recipe of the checkout, by its name in the package."""
    names = set()
    for folder, prefix in (
        ("mambakit", ""),
        ("kernels", "mambakit/"),
        ("datamodules", "mambakit/"),
        ("recipes", "mambakit/"),
    ):
        for file in (ROOT / folder).rglob("*"):
            if file.resolve() == file and file.suffix in (".py", ".yaml"):
                names.add(prefix + file.relative_to(ROOT).as_posix())
    return names


def test_wheel_holds_every_file(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = expected_files()
    assert expected - names == set(), "missing from the wheel"
    assert "mambakit/recipes/text/quickstart.yaml" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mambakit"}, "only mambakit may stand at the top"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_imports_and_reads_a_recipe(overlay: Path, tmp_path: Path):
    printed = run_in_overlay(
        overlay,
        "import mambakit.kernels, mambakit.datamodules\n"
        "from importlib.resources import files\n"
        "print(mambakit.kernels.selective_scan.__module__)\n"
        "print((files('mambakit.recipes') / 'text' / 'quickstart.yaml').read_text(encoding='utf-8'))",
        cwd=tmp_path,
    )
    assert printed.startswith("mambakit.kernels.scan")
    assert (
        printed.split("\n", 1)[1].rstrip()
        == (ROOT / "recipes/text/quickstart.yaml").read_text(encoding="utf-8").rstrip()
    )


def test_wheel_computes(overlay: Path, tmp_path: Path):
    printed = run_in_overlay(
        overlay,
        "import torch, mambakit\n"
        "model = mambakit.Backbone(d_model=8, n_layers=1, mixer='mamba1')\n"
        "print(tuple(model(torch.randn(2, 5, 8)).shape))",
        cwd=tmp_path,
    )
    assert printed.strip() == "(2, 5, 8)"


def test_wheel_names_the_command(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "mambakit = mambakit.cli:main" in archive.read(entry_points).decode()


def test_source_archive_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path):
    archive = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            assert not member.name.startswith(("/", "..")), member.name
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    rebuilt = build("wheel", source, tmp_path / "wheel")
    assert set(zipfile.ZipFile(rebuilt).namelist()) == set(zipfile.ZipFile(wheel).namelist())
