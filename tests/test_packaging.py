"""What a user gets: the links, the built archives and the cost of importing them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "processors", "ui")
TREE = ("LICENSE", "README.md", "pyproject.toml", "dit_accel", *LINKED)

checkout_only = pytest.mark.skipif(
    not (ROOT / "kernels").is_dir(), reason="an unpacked sdist has real folders in place of the links"
)


def _python(code: str, cwd: Path = ROOT) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTHONPATH"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _build(source: Path, out: Path, kind: str) -> Path:
    """Builds with the installed backend, so neither an environment nor the network is needed."""
    code = f"import hatchling.build as b; print(b.build_{kind}({str(out)!r}))"
    return out / _python(code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _package_files(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("dit_accel/")}


@checkout_only
@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_resolve(name: str) -> None:
    link = ROOT / "dit_accel" / name
    assert link.is_symlink(), f"{link} must be a link to ../{name}"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert any(link.glob("*.py"))


@checkout_only
def test_kernels_stays_a_namespace_folder() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@checkout_only
def test_importing_kernels_from_the_root_never_yields_ours() -> None:
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); "
        "print('' if s is None or s.origin is None else s.origin)"
    )
    origin = _python(code)
    assert not origin or ROOT not in Path(origin).resolve().parents


def test_no_folder_shadows_a_package_that_we_import() -> None:
    taken = {"torch", "triton", "diffusers", "transformers", "gradio", "numpy"}
    folders = {p.name for top in ("dit_accel", *LINKED) for p in (ROOT / top).glob("**/") if p.name != top}
    assert not folders & taken


def test_wheel_holds_one_package_with_every_file(wheel: Path) -> None:
    names = _names(wheel)
    assert {name.split("/")[0] for name in names} == {"dit_accel", f"dit_accel-{dit_accel.__version__}.dist-info"}
    expected = {
        f"dit_accel/{path.relative_to(ROOT / 'dit_accel').as_posix()}"
        for top in (ROOT / "dit_accel", *(ROOT / "dit_accel" / name for name in LINKED))
        for path in top.rglob("*")
        if path.suffix in {".py", ".typed", ".json", ".safetensors"} and "__pycache__" not in path.parts
    }
    assert expected - names == set()
    must = {"py.typed", "kernels/attend.py", "kernels/sparse_plan.py", "plan/radial.py", "ui/__init__.py"}
    assert {f"dit_accel/{name}" for name in must} - names == set()
    assert any(name.startswith("dit_accel/processors/") for name in names)
    assert not any("__pycache__" in name for name in names)


def test_wheel_from_the_sdist_equals_the_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        assert not any(m.issym() or m.islnk() for m in members), "an sdist must hold real folders, not links"
        archive.extractall(tmp_path)
    again = _build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "out", "wheel")
    assert _package_files(_names(again)) == _package_files(_names(wheel))


def test_wheel_imports_from_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import dit_accel.kernels.sparse_plan as m; "
        "import dit_accel.ui, importlib.resources as r; assert r.files('dit_accel').joinpath('py.typed').is_file(); "
        "print(m.__file__)"
    )
    # An editable install adds the checkout to sys.path; the unpacked wheel comes first.
    assert _python(code, cwd=tmp_path).startswith(str(tmp_path / "site"))


def test_import_is_light() -> None:
    heavy = {"triton", "gradio", "diffusers", "transformers"}
    code = f"import dit_accel, sys; print(sorted({heavy!r} & set(sys.modules)))"
    assert _python(code) == "[]"


def test_import_costs_little_more_than_torch(tmp_path: Path) -> None:
    code = (
        "import time, torch; t = time.perf_counter(); import dit_accel, dit_accel.plan; print(time.perf_counter() - t)"
    )
    seconds = [float(_python(code)) for _ in range(3)]
    assert min(seconds) < 0.3  # other processes only add to it


@checkout_only
def test_editable_paths_do_not_depend_on_the_place(tmp_path: Path) -> None:
    """A copy of the checkout elsewhere imports its own files: no absolute path in links or code."""
    for name in TREE:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, tmp_path / name)
    code = "import dit_accel.kernels.sparse_plan as m; print(m.__file__)"
    assert _python(code, cwd=tmp_path).startswith(str(tmp_path))
