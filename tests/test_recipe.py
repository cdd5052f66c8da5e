"""Recipe files: read as they are written, and one for each published row."""

from pathlib import Path

import pytest

from llmsparse.errors import UserError
from llmsparse.pattern import parse
from llmsparse.recipe import Recipe

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_published_recipe_is_valid_and_says_its_name(file):
    recipe = Recipe.of(file, {})
    solver, _, pattern = file.stem.partition("-")
    assert recipe.solver == solver
    assert [str(parse(p)) for p in recipe.pattern] == [
        pattern.replace("of", ":") if "of" in pattern else f"{pattern}%"
    ]


def test_there_is_a_recipe_for_each_row_of_the_readme():
    assert len(CONFIGS) == 9


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
        ("a: [", "is not YAML"),
        ("sover: wanda", "key 'sover' is unknown; known: solver, pattern"),
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
