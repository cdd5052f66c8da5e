"""Recipe files: read as they are written, and one for each row that is recommended."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmsparse.cli import app
from llmsparse.errors import UserError
from llmsparse.pattern import parse
from llmsparse.prune import prune
from llmsparse.recipe import Recipe, show
from tests.pruned import SMALL
from tests.tiny import save_tiny

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))
CONTEST = ("50%", "2:4", "70%")
RECIPES = [Recipe.of(file, {}) for file in CONFIGS]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_published_recipe_is_valid_and_says_its_name(file):
    recipe = Recipe.of(file, {})
    solver, pattern, *values = file.stem.removesuffix("-dense-reconstruct").replace("of", ":").split("-")
    beyond = file.stem.endswith("-dense-reconstruct")
    assert (recipe.targets, recipe.reconstruct) == (("dense", 1) if beyond else ("pruned", 0))
    assert recipe.solver == solver
    wanted = {"dense": "as-is"}.get(pattern, pattern if ":" in pattern else f"{pattern}%")
    assert [str(parse(p)) for p in recipe.pattern] == [wanted]
    assert recipe.values == (values[0] if values else None)
    assert recipe.embeddings == (values[-1] if "tables" in values else "keep" if values else None)
    assert f"--recipe configs/{file.name}" in file.read_text()


def test_each_recommended_row_of_solver_and_pattern_and_of_swept_values_has_a_recipe():
    plain = {(r.solver, *r.pattern) for r in RECIPES if r.values is None and not r.reconstruct}
    tables = {(s, p) for s in ("magnitude", "wanda", "sparsegpt") for p in ("50%", "2:4", "4:8")}
    assert plain == tables | {("alps", p) for p in CONTEST}
    swept = {(*r.pattern, r.values) for r in RECIPES if r.values is not None}
    assert swept == {(p, v) for p in ("50%", "2:4", "as-is") for v in ("int8", "int4:32")}
    measured = json.loads((CONFIGS[0].parents[1] / "benchmarks/results/quality.json").read_text())
    rows = {(row["solver"], row["pattern"]) for row in measured}
    beyond = {
        (f"{r.solver}+targets={r.targets}+reconstruct={r.reconstruct}", *r.pattern)
        for r in RECIPES
        if r.reconstruct
    }
    assert beyond == {("alps+targets=dense+reconstruct=1", p) for p in CONTEST}
    assert plain | beyond <= rows


def test_a_pattern_is_not_read_as_a_time_of_day(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "pattern: 2:4\nseed: 3\ntrust-remote-code: true\nskip: [a, b]\nsamples: null\nvalues: null\n"
    )
    recipe = Recipe.of(file, {})
    assert recipe.pattern == ("2:4",) and recipe.seed == 3 and recipe.trust_remote_code is True
    assert recipe.skip == ("a", "b") and recipe.samples is None and recipe.values is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples: many", "samples must be a whole number, found 'many'"),
        ("trust-remote-code: perhaps", "must be true or false"),
        ("solver: [a, b]", "takes one value, a list was given"),
        ("solver: {a: b}", "must be plain text"),
        ("- a", "must hold `option: value` lines"),
        ("seed: 1\na: [", "line 2 is not YAML"),
        (
            "seed: 1\nsover: wanda",
            "line 2: key 'sover' is unknown; did you mean solver; known: solver, pattern",
        ),
        ("seed: 1\n\nseed: 2", "line 3: seed was given in line 1 already"),
        ("# a\nsamples: many", "r.yaml, line 2: samples"),
    ],
)
def test_a_bad_recipe_is_one_clear_error(text, message, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Recipe.of(file, {})


def test_options_win_and_the_token_is_not_kept(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("solver: wanda\nseed: 3\n")
    recipe = Recipe.of(file, {"seed": 4, "token": "secret"})
    assert (recipe.solver, recipe.seed) == ("wanda", 4)
    assert "secret" not in str(recipe.as_dict())


def test_a_report_is_the_recipe_of_its_run_and_reproduces_it(tmp_path):
    dense = save_tiny("llama", tmp_path / "dense")
    options = {"pattern": ["2:4", "mlp=50%"], "values": "int8", "set": "damping=0.02", "seed": 3, **SMALL}
    first = prune(dense, tmp_path / "first", **options)
    for number, recipe in enumerate((tmp_path / "first", tmp_path / "first" / "report.json")):
        assert prune(dense, tmp_path / f"{number}", recipe=recipe)["files"] == first["files"]
    file = tmp_path / "shown.yaml"
    file.write_text(show(tmp_path / "first"))
    assert prune(dense, tmp_path / "shown", recipe=file)["files"] == first["files"]


def test_recipe_show_prints_every_option(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("pattern: 2:4\n")
    done = CliRunner().invoke(app, ["recipe", "show", str(file)])
    assert done.exit_code == 0
    assert Recipe.of(_saved(tmp_path, done.stdout), {}) == Recipe.of(file, {})
    assert "solver: null" in done.stdout and "token" not in done.stdout
    assert CliRunner().invoke(app, ["recipe", "draw", str(file)]).exit_code == 2


def _saved(folder, text):
    (folder / "saved.yaml").write_text(text)
    return folder / "saved.yaml"
