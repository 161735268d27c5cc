import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxsight
import fxsight.passes

ROOT = Path(__file__).resolve().parents[1]
PASSES = ROOT / "passes"


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_link_points_home() -> None:
    link = ROOT / "fxsight" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"
    assert link.resolve() == PASSES


def test_passes_is_imported_only_as_fxsight_passes() -> None:
    done = python("-c", "import passes")
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: import fxsight.passes, not passes\n")


def test_every_pass_is_listed_and_has_its_test() -> None:
    files = {path.stem for path in PASSES.glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "passes").glob("test_*.py")}
    listed = [each.__module__.removeprefix("fxsight.passes.") for each in fxsight.passes.PASSES]
    assert set(listed) == files
    assert files <= tests


def test_importing_fxsight_imports_nothing_heavy() -> None:
    done = python("-c", "import fxsight, sys; print(*sorted(sys.modules), sep='\\n')")
    assert done.returncode == 0, done.stderr
    assert {"transformers", "torch._inductor", "torch._dynamo"}.isdisjoint(done.stdout.split())
    assert "fxsight.compat" not in done.stdout.split()


def test_a_wheel_holds_fxsight_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    # A copy, since building leaves folders behind, and takes in what an earlier build left.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fxsight", "passes", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")

    built = python("-m", "pip", "wheel", *offline, "--wheel-dir", str(tmp_path), str(source))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fxsight").rglob("*.py")}
    modules |= {f"fxsight/passes/{path.name}" for path in PASSES.glob("*.py")}
    assert names == modules | {"fxsight/py.typed"}

    target = tmp_path / "target"
    installed = python("-m", "pip", "install", *offline, "--target", str(target), str(wheel))
    assert installed.returncode == 0, installed.stderr
    assert sorted(path.name for path in target.iterdir()) == [
        "fxsight",
        f"fxsight-{fxsight.__version__}.dist-info",
    ]
    code = "import fxsight.passes; print(fxsight.passes.__file__)"
    found = python("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert found.stdout == f"{target / 'fxsight' / 'passes' / '__init__.py'}\n", found.stderr
    code = "from importlib.metadata import entry_points as e; print(e(group='torch_dynamo_backends', name='fxsight'))"
    found = python("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert "value='fxsight.backend:backend'" in found.stdout, found.stderr
    code = "import fxsight.compat.nnsight as nnsight; print(nnsight.NNsight.__module__)"
    found = python("-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert found.stdout == "fxsight.compat.nnsight\n", found.stderr


def test_public_names_are_loaded_when_they_are_asked_for() -> None:
    said = "import sys, fxsight; print('torch' in sys.modules); fxsight.Model; print('transformers' in sys.modules)"
    done = python("-c", said)
    assert done.stdout.split() == ["False", "False"]


def test_every_public_name_has_its_home() -> None:
    source = ast.parse(Path(fxsight.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name, module in typed.items():
        assert getattr(fxsight, name) is getattr(importlib.import_module(str(module)), name)
        assert name in dir(fxsight)
    with pytest.raises(AttributeError, match="module 'fxsight' has no attribute 'Modell'"):
        fxsight.Modell  # noqa: B018
