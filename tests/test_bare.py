"""llmsparse from its sources, uninstalled, among the packages that it cannot do without, and no others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmsparse.documents import documents
from llmsparse.errors import UserError
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
ABSENT = ("datasets", "lm_eval", "jinja2", "matplotlib", "pyarrow", "gguf")
# What a bare environment answers: no such module, no such distribution, llmsparse's own neither.
BARE = f"""
import importlib.metadata as metadata, runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
found = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name in {(*ABSENT, "llmsparse")!r}:
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
runpy.run_module("llmsparse", run_name="__main__", alter_sys=True)
"""


def test_builtin_and_local_text_prune_in_a_bare_environment(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some text of a few words. " * 100)
    arguments = [
        "prune",
        str(model),
        str(tmp_path / "out"),
        "--calibration",
        f"builtin,{tmp_path / 'text.txt'}",
    ]
    arguments += ["--samples", "2", "--sequence-length", "32", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["versions"]["llmsparse"] == report["versions"]["datasets"] == "not installed"
    assert [source["documents"] > 0 for source in report["calibration"]["sources"]] == [True, True]


@pytest.mark.parametrize(("source", "package"), [("some/rows", "datasets"), ("text.parquet", "pyarrow")])
def test_a_source_that_needs_a_package_names_it(monkeypatch, tmp_path, source: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "text.parquet").write_bytes(b"PAR1")
    given = source if "/" in source else str(tmp_path / source)
    message = rf"{source} .*needs the package {package}, which is not installed; pip install {package}, or give a \.txt"
    with pytest.raises(UserError, match=message):
        list(documents(given))
