"""export --format c-header --check: the compiled C is measured, and what it says is what Python computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmsparse
from llmsparse import c_check, export_check, render
from llmsparse.c_arrays import Arrays
from llmsparse.c_program import Program, compiler
from llmsparse.errors import UserError
from llmsparse.export import export
from llmsparse.gridfile import GridFile
from tests.packed_tiny import add_grid, sparse
from tests.tiny import VOCAB, tokenizer

CHECKS = "gcc -std=c99 -Wall -Wextra -Werror -pedantic -fsanitize=address,undefined -fno-sanitize-recover=all"

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_check, "TOKENS", 256)


def checked(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return export(source, out, format="c-header", check=True, **options)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows).logits.double()[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).exp().item()


@pytest.mark.parametrize("family, values", [("llama", "int8"), ("qwen2", "int4:32"), ("mistral", "int8")])
def test_the_check_says_what_python_computes_with_the_same_weights(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch, family: str, values: str
) -> None:
    monkeypatch.setenv("CC", CHECKS)
    source = sparse(tmp_path / "sparse", family)
    result = checked(source, tmp_path / "o", values=values)
    export(source, tmp_path / "packed", values=values)
    same = llmsparse.load(tmp_path / "packed", dtype=torch.float32).dequantize()
    found, context = result["check"], 8 if family == "mistral" else 128
    windows = export_check.fixed_text(tokenizer(), context, 256).windows.ids
    assert windows.shape == (256 // context, context)
    assert found["perplexity"]["export"] == pytest.approx(perplexity(same, windows), rel=1e-4)
    assert found["zeros"]["kept"] == 1.0 and found["zeros"]["export"] >= found["zeros"]["source"] > 0.49
    assert found["greedy"]["equal"] == found["greedy"]["tokens"] > 0
    assert found["file_bytes"] == result["device"]["flash_bytes"] and 0 < found["zipped_share"] < 1
    assert [*found["runtime"]["tokens_per_second"]] == ([] if family == "mistral" else ["1"])
    assert "llama.c, gcc" in found["runtime"]["name"] and found["compile_seconds"] > 0
    assert (
        json.loads((tmp_path / "o" / "export.json").read_text())["check"]["perplexity"] == found["perplexity"]
    )
    printed = "\n".join(str(line) for line in render.export(result).renderables[1:])
    assert ("decodes too few tokens to time" in printed) == (family == "mistral")
    assert "zeros are neither stored nor multiplied" in printed and "compiled in" in printed


@pytest.mark.parametrize("grid", ["int8", "int4:32"])
def test_the_compiled_program_has_the_codes_beside_the_model(tmp_path: Path, few: None, grid: str) -> None:
    add_grid(sparse(tmp_path / "sparse"), grid)
    result = checked(tmp_path / "sparse", tmp_path / "o")
    given = GridFile.open(tmp_path / "sparse")
    assert given is not None
    names = [f"model.layers.{i}.{end}.weight" for i in range(3) for end in c_check.LINEAR.values()]
    codes = [given.codes(name) for name in names]
    program = Program.build(tmp_path / "o", 8, tmp_path)
    shapes = [(len(each), each.shape[1]) for each in codes]
    found = program.weights([*shapes, (VOCAB, 32), (VOCAB, 32)])
    for name, each, weight in zip([*names, None, None], [*codes, None, None], found, strict=True):
        if name is not None:
            scales = given.scales(name).float()
            wide = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
            assert torch.equal(weight / wide.where(wide != 0, 1.0), each.float())
    check = result["check"]
    assert result["values"] == {"from": "grid.safetensors", "kinds": [grid], "rounded": ["int8"]}
    assert "2 matrices have no codes beside the model and are the nearest int8" in result["warnings"][0]
    assert check["tolerance"] == 0.02, "of the tables' int8 alone"
    with pytest.raises(UserError, match="has other weights than the model"):
        list(program.weights(shapes))


def test_where_all_codes_lay_beside_the_model_nothing_may_be_lost(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llmsparse.prune(sparse(tmp_path / "s"), tmp_path / "p", solver="magnitude", pattern="50%", values="int8")
    fine = checked(tmp_path / "p", tmp_path / "o")
    assert fine["check"]["tolerance"] == export_check.EXACT and not fine["warnings"]
    assert abs(fine["check"]["perplexity"]["change"]) < 1e-5
    right = Arrays.of_scales
    monkeypatch.setattr(Arrays, "of_scales", lambda self, name, scales: right(self, name, 1.25 * scales))
    with pytest.raises(UserError, match="is written, but its check failed: perplexity is .*0.1% is allowed"):
        checked(tmp_path / "p", tmp_path / "wrong")
    assert json.loads((tmp_path / "wrong" / "export.json").read_text())["check"]["failed"]


def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sparse(tmp_path / "sparse")
    monkeypatch.setenv("CC", "of-nowhere -O1")
    with pytest.raises(UserError, match=r"no C compiler was found \(CC=of-nowhere -O1\); install gcc"):
        checked(source, tmp_path / "o")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"no C compiler was found \(cc, gcc, clang\); install gcc .Debian: apt"
    ):
        checked(source, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    export(source, tmp_path / "o", format="c-header")


def test_a_compiler_or_a_program_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "gcc -fno-such-option")
    assert compiler() == ["gcc", "-fno-such-option"]
    (tmp_path / "llama.c").write_text("int main(void) { return 3; }\n")
    with pytest.raises(UserError, match=r"gcc -fno-such-option cannot compile .*llama.c \(status 1\): "):
        Program.build(tmp_path, 8, tmp_path)
    (tmp_path / "fails").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "fails").chmod(0o755)
    with pytest.raises(UserError, match="ended with status 3 when asked for greedy"):
        Program(tmp_path / "fails", "llama.c", 0.0).ask("greedy", 1)


def test_the_exported_file_is_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(sparse(tmp_path / "sparse"), tmp_path / "o", format="c-header")
    with (tmp_path / "o" / "llama.c").open("a") as file:
        file.write("#error of the exported file\n")
    with pytest.raises(UserError, match=r"cannot compile .*/o/llama.c \(status 1\)"):
        Program.build(tmp_path / "o", 8, tmp_path)
