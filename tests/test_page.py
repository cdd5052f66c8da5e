"""The report as a file: what it says, what it must never contain, and how it is written."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmsparse import atomic
from llmsparse.errors import UserError
from llmsparse.page import html_of, markdown_of, report
from llmsparse.panels import block_of, kind_of
from llmsparse.plots import Line, Look, Point, frontier, lines, looks
from llmsparse.runs import load_runs
from tests.results import evaluation, full_evaluation, pruned_folder, scenes, source, task, write

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Collects what a test asks about; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made(*runs: str) -> tuple[str, Page]:
    text = html_of(load_runs(runs))
    return text, Page(text)


@pytest.mark.parametrize("scene", ["one", "four", "unmeasured", "minimal", "long"])
def test_the_page_is_well_formed_with_unique_ids_and_asks_for_nothing_else(
    scene: str, tmp_path: Path
) -> None:
    text, parsed = made(*scenes(tmp_path)[scene])
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(ids)
    outside = [v for _, a in parsed.tags for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert all(value and value.startswith(("#", "data:,")) for value in outside)
    assert "@import" not in text and "url(http" not in text
    assert not any(tag in ("script", "img", "iframe") for tag, _ in parsed.tags)
    assert re.findall(r"(?:fill|stroke): #", text) == []  # every colour is the page's


def test_every_plot_has_a_title_and_says_what_it_shows(tmp_path: Path) -> None:
    text, parsed = made(*scenes(tmp_path)["four"])
    plots = [a for tag, a in parsed.tags if tag == "svg" and a.get("class") == "plot"]
    assert len(plots) == text.count("<figcaption>") > 15
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in plots)
    assert "hellaswag: items right, %. dense 43.0 ± 2.2; sparsegpt-50% 39.8 ± 2.2" in text


def test_what_was_measured_stands_on_the_page_beside_the_dense_figures(tmp_path: Path) -> None:
    _, parsed = made(*scenes(tmp_path)["one"])
    for expected in (
        "27.9 ± 1.1 × 1.35", "20.70 ± 0.83", "39.8 ± 2.2 −3.2 ± 1.8", "43.0 ± 2.2", "0.350 ± 0.018", "71.0 %",
        "35 % lost most", "not measurable", "not measured", "41.0 % 0.0 %", "12.0 % 25.0 %", "2.515 GiB",
        "llmsparse prune dense pruned --solver sparsegpt --pattern 50%", "f4" * 32, "7e" * 32, "696cca6b" * 8,
        "no BOS: the tokenizer adds none", "torch 2.13.0", "by the company of Gustave Eiffel",
    ):  # fmt: skip
        assert expected in parsed.text, expected


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    _, parsed = made(pruned_folder(tmp_path / "p", solver="magnitude"))
    assert "Not measured." in parsed.text
    assert "Not evaluated: p. This does it: llmsparse eval" in parsed.text
    assert "no relative error, because magnitude reads no calibration text" in parsed.text
    infinite = evaluation(against=None, sources=[source(dense=None, perplexity=1.0) | {"perplexity": None}])
    assert "not finite" in made(write(tmp_path / "e.json", infinite))[1].text


def test_what_a_run_brings_along_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>\"'&"
    found = evaluation(
        model=evil,
        against=evil + "2",
        bos=evil,
        sources=[source(name=evil, data=evil)],
        tasks=[task(evil)],
        generation={"new_tokens": 2, "samples": [{"prompt": evil, "continuation": evil}], "repetition": 0.1},
    )
    runs = [f"{evil}{i}={write(tmp_path / f'{i}.json', found)}" for i in range(2)]
    text, parsed = made(*runs)
    assert "<script" not in text
    assert evil in parsed.text
    assert "<script" not in re.sub(r"(`{3,})text\n.*?\n\1", "", markdown_of(load_runs(runs)), flags=re.DOTALL)


def test_runs_that_must_not_be_compared_are_marked_and_returned(tmp_path: Path) -> None:
    runs = tuple(
        write(tmp_path / f"{dtype}.json", evaluation(dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    result = report(runs, html=tmp_path / "r.html", markdown=tmp_path / "r.md")
    assert result["warnings"] == [
        "wikitext2: number formats of the forward pass differ: float32 (float32); bfloat16 (bfloat16)"
    ]
    assert result["runs"] == ["float32", "bfloat16"]
    assert result["warnings"][0] in Page((tmp_path / "r.html").read_text()).text
    assert "must not be compared" in (tmp_path / "r.md").read_text()
    json.dumps(result)


def test_files_are_replaced_whole_and_left_alone_when_something_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = pruned_folder(tmp_path / "p", evaluation()), tmp_path / "out"
    out.mkdir()
    (out / "r.html").write_text("before")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        report((run,), html=out / "r.html")
    assert [(f.name, f.read_text()) for f in out.iterdir()] == [("r.html", "before")]
    assert report((run,), html=out / "r.html")["markdown"] is None
    assert (out / "r.html").read_text().startswith("<!doctype html>")
    assert html_of(load_runs([run])) == (out / "r.html").read_text()  # the same again, byte for byte


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    run = pruned_folder(tmp_path / "p", evaluation())
    with pytest.raises(UserError, match="add --html report.html or --markdown report.md"):
        report((run,))
    with pytest.raises(UserError, match="no run; name a pruned folder"):
        report((), html=tmp_path / "r.html")
    with pytest.raises(UserError, match="which is no folder; make it first"):
        report((run,), html=tmp_path / "r.html", markdown=tmp_path / "absent" / "r.md")
    with pytest.raises(UserError, match="is a folder"):
        report((run,), html=tmp_path)
    assert not (tmp_path / "r.html").exists()


def test_markdown_needs_no_plots_and_html_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pruned_folder(tmp_path / "p", evaluation())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report((run,), markdown=tmp_path / "r.md")
    with pytest.raises(UserError, match=r"pip install 'llmsparse\[report\]'"):
        report((run,), html=tmp_path / "r.html")


def test_markdown_tables_are_whole_whatever_stands_in_them(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "p", full_evaluation(1.4, bos="a | b\nc `d`"))
    text = markdown_of(load_runs([f"x|y={folder}"]))
    unfenced = re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", unfenced, flags=re.MULTILINE)
    assert len(tables) >= 7
    assert "## Layer by layer" not in text  # it has plots only
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"| c4 (perplexity, less is better, context 2048) | 31.0 ± 1.2 | 43.4 ± 1.7 (× 1.40) |" in text
    assert r"a \| b c \`d\`" in text
    assert "```text\nneed <b>flour</b> & `water` | salt" in text


def test_weights_are_grouped_by_block_and_by_kind() -> None:
    names = [
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_proj.weight",
        "h.1.mlp.experts.3.w1.weight",
        "lm_head.weight",
    ]
    weights = [{"name": name} for name in names]
    assert [block_of(weight) for weight in weights] == ["0", "0", "1", "lm_head"]
    assert list(map(kind_of(weights), weights)) == ["attn.c_proj", "mlp.c_proj", "w1", "lm_head"]


def test_the_frontier_holds_what_nothing_beats() -> None:
    look = Look(1, 1)
    points = [Point(look, *xy) for xy in ((2, 5), (1, 9), (3, 6), (3, 4), (1, 8))]
    assert frontier(points, lower=True) == [(1, 8), (2, 5), (3, 4)]
    assert frontier(points, lower=False) == [(1, 9)]


def test_no_two_of_many_runs_look_alike() -> None:
    assert len(set(looks(1, 40))) == 41


def test_a_gap_in_a_line_is_drawn_as_a_gap() -> None:
    svg = lines([Line(Look(1, 1), [1.0, None, 3.0])], ["1", "2", "3"], x="x", y="y", alt="a line")
    assert "nan" not in svg.lower().replace("nance", "")
