"""What each export target needs: declared once for pip and once for the message, and both say the same."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from llmsparse import extras, plugins
from llmsparse.errors import UserError
from llmsparse.extras import Extra
from llmsparse.gguf_rounding import EXTRA as K_TYPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")
ROOT = Path(__file__).parents[1]
FORMATS = plugins.names("exporters")
FOREIGN = {"gguf", "libgguf", "xllamacpp", "onnx", "onnxruntime", "onnxruntime_genai", "openvino", "executorch",
           "torchao", "compressed_tensors"}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_pip_and_the_message_name_the_same_versions(format: str) -> None:
    extra = plugins.load("exporters", format).EXTRA
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = dict(re.split(">=", line) for line in declared.get(extra.name, []))
    assert extra.packages | extra.check == listed


def test_the_package_of_ggmls_k_types_is_an_extra_of_its_own() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ((package, oldest),) = K_TYPES.packages.items()
    assert declared[str(K_TYPES.name)] == ["llmsparse[gguf]", f"{package}>={oldest}"]


@pytest.mark.parametrize("format", FORMATS)
def test_an_exporter_imports_no_package_of_a_runtime_when_it_is_loaded(format: str) -> None:
    parsed = ast.parse(plugins.file("exporters", format).read_text())
    named = [node for node in parsed.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in named if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in named if isinstance(node, ast.ImportFrom)}
    assert not {module.partition(".")[0] for module in modules} & FOREIGN


def test_an_absent_and_an_old_package_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = Extra("thing", {"of-nowhere": "1.0"})
    with pytest.raises(UserError, match="--x needs the package of-nowhere.*pip install 'llmsparse.thing.'"):
        extras.require("--x", extra, extra.packages)
    monkeypatch.setattr(metadata, "version", lambda package: "0.9.12rc1")
    with pytest.raises(UserError, match="needs of-nowhere 1.0 or newer, and 0.9.12rc1 is installed"):
        extras.require("--x", extra, extra.packages)
    monkeypatch.setattr(metadata, "version", lambda package: "1.10+cpu")
    extras.require("--x", extra, extra.packages)
