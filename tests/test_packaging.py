"""What the wheel holds, and that the top-level folders disturb nobody."""

import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmsparse"
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks", "*.so"
)


def python(code: str, cwd: Path = ROOT) -> str:
    return run(sys.executable, "-W", "error", "-c", code, cwd=cwd)


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that no stale build folder can add to it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT, dirs_exist_ok=True)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=source)
    return next(out.glob("*.whl"))


def test_only_llmsparse_is_importable_from_the_wheel(wheel: Path) -> None:
    assert [module.name for module in pkgutil.iter_modules([str(wheel)])] == ["llmsparse"]


def test_the_wheel_holds_every_module_of_every_package_folder(wheel: Path) -> None:
    inner = [*PACKAGE.glob("*/__init__.py"), *PACKAGE.glob("*/*/__init__.py")]
    folders = [PACKAGE, *(file.parent for file in inner)]
    assert {"solvers", "kernels", "cpu", "eval"} <= {folder.name for folder in folders}
    expected = {f.relative_to(ROOT).as_posix() for folder in folders for f in folder.glob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == expected


def test_the_wheel_holds_what_is_read_beside_the_modules(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for file in (
        *PACKAGE.glob("eval/tasks/*.yaml"),
        *PACKAGE.glob("*.jinja"),
        *PACKAGE.glob("exporters/*.c"),
    ):
        assert file.relative_to(ROOT).as_posix() in names


def test_the_wheel_holds_the_native_kernels_and_not_their_sources(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "/kernels/cpu/" in name}
    assert not [name for name in names if name.endswith((".c", ".h"))]
    if not shutil.which("gcc"):
        pytest.skip("needs gcc to build them")
    assert "llmsparse/kernels/cpu/native.abi3.so" in names


def test_llmsparse_installs_without_a_c_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    monkeypatch.setenv("CC", "false")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
    run(*pip, "--target", str(target), str(source), cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); from llmsparse.kernels.cpu import library\n"
        f"assert library.__file__.startswith({str(target)!r}); print(library.available())"
    )
    assert "the native kernels are not built" in python(code, cwd=tmp_path)


def test_the_build_names_every_c_file() -> None:
    build = (ROOT / "pyproject.toml").read_text()
    for file in (ROOT / "kernels" / "cpu").glob("*.[ch]"):
        assert f'"kernels/cpu/{file.name}"' in build


def test_the_wheel_carries_its_licence_and_its_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert b"Apache License" in archive.read(texts["licenses/LICENSE"])
    assert b"llmsparse = llmsparse.cli:app" in archive.read(texts["entry_points.txt"])


@pytest.mark.parametrize("name", ["kernels", "eval"])
def test_the_links_lead_to_the_top_level_folders(name: str) -> None:
    assert (PACKAGE / name).is_symlink()
    assert (PACKAGE / name).resolve() == ROOT / name


@pytest.mark.parametrize("name", ["kernels", "eval"])
def test_installed_and_uninstalled_runs_find_the_same_folders(name: str, tmp_path: Path) -> None:
    code = f"import llmsparse.{name} as package; print(package.__file__)"
    assert Path(python(code)).resolve() == ROOT / name / "__init__.py"
    assert Path(python(code, cwd=tmp_path)).resolve() == ROOT / name / "__init__.py"


def test_transformers_imports_from_the_repository_root() -> None:
    """transformers looks for the hub's package ``kernels`` and finds our folder of that name here."""
    code = "import kernels; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    assert Path(python(code)) == ROOT / "kernels" / "__init__.py"


def test_importing_llmsparse_is_light() -> None:
    """``llmsparse --version`` must not wait for torch, and triton waits for the first GPU kernel."""
    code = "import sys, llmsparse; print([m for m in ('torch', 'triton') if m in sys.modules])"
    assert python(code) == "[]"


def test_the_kernel_package_has_no_imports() -> None:
    lines = (ROOT / "kernels" / "__init__.py").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith('"""')
