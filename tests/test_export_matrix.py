"""export-matrix: every export of one model side by side, what failed told, what is there kept."""

import html
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmsparse import extras, llama_cpp
from llmsparse.cli import app
from llmsparse.errors import UserError
from llmsparse.export_matrix import export_matrix
from llmsparse.figures import plain
from llmsparse.matrix_page import fewer
from tests.packed_tiny import add_grid, sparse
from tests.test_gguf_export import model

pytest.importorskip("gguf", reason="pip install 'llmsparse[gguf]'")
pytest.importorskip("matplotlib", reason="pip install 'llmsparse[report]'")


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_gguf_export.py runs it; here it would only take time."""
    monkeypatch.setattr(llama_cpp, "available", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_grid(model(tmp_path / "sparse"), "int8")
    return tmp_path / "sparse"


def test_targets_are_measured_and_drawn_together(folder: Path, tmp_path: Path) -> None:
    result = export_matrix(folder, out=tmp_path / "all", formats="gguf,packed")
    first, second = result["rows"]
    assert (first["name"], second["name"], result["failed"]) == ("gguf", "packed", [])
    for row in result["rows"]:
        assert row["why"] is None and abs(row["perplexity"]["change"]) < 1e-3
        assert row["bytes"] < row["source_bytes"] and row["zeros"]["kept"] == 1.0
        assert json.loads((Path(row["folder"]) / "export.json").read_text())["check"]["failed"] == []
    assert json.loads((tmp_path / "all" / "matrix.json").read_text())["rows"][0]["bytes"] == first["bytes"]
    page = (tmp_path / "all" / "matrix.html").read_text()
    assert "Against bytes" in page and "Against speed, 1 thread" in page and "gguf" in page


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_target_that_read_less_text_is_told_and_placed_by_what_it_loses(
    folder: Path, tmp_path: Path
) -> None:
    result = export_matrix(folder, out=tmp_path / "all", formats="c-header,gguf")
    less, most = result["rows"]
    assert less["tokens"] < most["tokens"] and result["failed"] == []
    assert [*less["tokens_per_second"]] == ["1"] and [*most["tokens_per_second"]] in ([], ["1", "2"])
    page = (tmp_path / "all" / "matrix.html").read_text()
    assert f"on {most['tokens']:,} tokens of" in page and fewer([most]) == []
    (line,) = fewer([less, most])
    assert (
        f"c-header: perplexity of {less['tokens']:,} tokens, the source's there is" in line
        and line in html.unescape(page)
    )
    placed = most["perplexity"]["source"] * (1 + less["perplexity"]["change"])
    assert f"c-header {plain(placed)} at" in page


def test_what_is_there_is_kept_and_overwrite_writes_it_again(folder: Path, tmp_path: Path) -> None:
    def written() -> int:
        export_matrix(folder, out=tmp_path / "all", formats="gguf", overwrite=again)
        (file,) = (tmp_path / "all" / "gguf").glob("*.gguf")
        return file.stat().st_mtime_ns

    again = False
    first = written()
    assert written() == first
    again = True
    assert written() > first


def test_a_model_without_codes_is_rounded_twice_and_asked_values_are_taken(tmp_path: Path) -> None:
    found = export_matrix(model(tmp_path / "sparse"), out=tmp_path / "all", formats="gguf")
    assert [row["name"] for row in found["rows"]] == ["gguf-int8", "gguf-int4-32"]
    found = export_matrix(tmp_path / "sparse", out=tmp_path / "one", formats="gguf", values="fp16")
    assert [row["bits_per_weight"] for row in found["rows"]] == [16.0]


def test_a_target_whose_package_is_missing_is_told_and_the_others_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "version", lambda package: "9" if package == "gguf" else None)
    result = export_matrix(folder, out=tmp_path / "all", formats="compressed-tensors,gguf")
    missing, fine = result["rows"]
    assert "pip install 'llmsparse[compressed-tensors]'" in missing["why"] and "bytes" not in missing
    assert fine["why"] is None and "compressed-tensors" in (tmp_path / "all" / "matrix.html").read_text()
    with pytest.raises(UserError, match="nothing was exported: compressed-tensors: .*pip install"):
        export_matrix(folder, out=tmp_path / "none", formats="compressed-tensors")


def test_a_check_that_failed_is_an_error_after_the_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsparse.gguf_layout.Place.from_file", lambda _, tensor: tensor)
    asked = ["export-matrix", str(folder), "--out", str(tmp_path / "all"), "--formats", "gguf,packed"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "error: gguf: perplexity is" in done.stderr
    assert "packed" in done.stdout and "failed" in done.stdout


def test_another_models_exports_and_a_strangers_folder_are_not_touched(folder: Path, tmp_path: Path) -> None:
    export_matrix(folder, out=tmp_path / "all", formats="gguf")
    with pytest.raises(UserError, match="holds an export of .*sparse, and .*other was asked for"):
        export_matrix(sparse(tmp_path / "other"), out=tmp_path / "all", formats="gguf", overwrite=True)
    (tmp_path / "all" / "holiday").mkdir()
    with pytest.raises(UserError, match="holds holiday, which is no export"):
        export_matrix(folder, out=tmp_path / "all", formats="gguf")
    with pytest.raises(UserError, match="format 'ggml' is unknown; known: "):
        export_matrix(folder, out=tmp_path / "new", formats="ggml")
    assert not (tmp_path / "new").exists()
