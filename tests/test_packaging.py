"""What the wheel holds, and that the top-level folders disturb nobody."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmsparse"
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks", "*.so"
)


def python(code: str, cwd: Path = ROOT) -> str:
    return run(sys.executable, "-W", "error", "-c", code, cwd=cwd)


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def build(place: Path, **environment: str) -> Path:
    """A wheel from a copy of the sources, so that no stale build folder can add to it."""
    shutil.copytree(ROOT, place / "source", symlinks=True, ignore=LEFT_OUT)
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place))
    run(*command, cwd=place / "source", env={**os.environ, **environment})
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pure"), LLMSPARSE_PURE="1")


def test_one_wheel_serves_every_python_of_a_platform_and_one_every_platform(wheel: Path, pure: Path) -> None:
    assert "-cp310-abi3-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert pure.name.endswith("-py3-none-any.whl")
    here, everywhere = ({*zipfile.ZipFile(file).namelist()} for file in (wheel, pure))
    assert {name for name in here - everywhere if ".dist-info" not in name} == {
        name for name in here if name.endswith((".so", ".pyd"))
    }


@pytest.mark.long
@pytest.mark.parametrize("kind", ["wheel", "pure"])
def test_a_wheel_works_in_an_environment_without_a_compiler(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Installed as users do, with this environment's packages beside it, and nothing on the search path."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    here = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(here),
    )
    run(*pip, str(request.getfixturevalue(kind)), cwd=tmp_path)
    packages = sysconfig.get_paths()["purelib"]  # as a path, so that this project's own .pth file is not read
    (here / "others.pth").write_text(packages + "\n")
    bare = {"PATH": "/nowhere", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    llmsparse = (str(tmp_path / "venv" / "bin" / "python"), "-I", "-m", "llmsparse")
    save_tiny("llama", tmp_path / "dense")
    run(
        *llmsparse,
        "prune",
        "dense",
        "out",
        "--solver",
        "magnitude",
        "--values",
        "int8",
        cwd=tmp_path,
        env=bare,
    )
    run(*llmsparse, "export", "out", "packed", cwd=tmp_path, env=bare)
    words = (
        "eval",
        "packed",
        "--data",
        "builtin",
        "--context",
        "32",
        "--windows",
        "2",
        "--against",
        "out",
        "--json",
    )
    found = json.loads(run(*llmsparse, *words, cwd=tmp_path, env=bare))["sources"][0]
    assert found["kl"] < 1e-3
    doctor = json.loads(run(*llmsparse, "doctor", "--json", cwd=tmp_path, env=bare))
    assert (doctor["used"] is None) == (kind == "pure" or not shutil.which("gcc"))


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
