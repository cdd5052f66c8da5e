"""Flips, the ability kept and its interval, capabilities: against plain counting and a plain bootstrap."""

import random

import pytest

from llmsparse.eval.ability import ability_kept, beside, capabilities, capability_of, flips, lost_most


def answers(count: int, right: float, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(str(int(draw.random() < right)) for _ in range(count))


def row(task: str, given: str, chance: float = 0.25) -> dict:
    share = given.count("1") / len(given)
    return {"task": task, "answers": given, "chance": chance, "value": share, "standard_error": 0.02, "items": len(given),
            "capability": capability_of(task)}  # fmt: skip


def test_flips_count_both_ways():
    assert flips("0011", "0101") == (1, 1)
    assert flips("0000", "1101") == (3, 0)


def test_the_ability_kept_is_above_chance_and_its_interval_a_paired_bootstrap():
    dense = answers(400, 0.7, 0)
    sparse = "".join(a if random.Random(i).random() < 0.8 else str(1 - int(a)) for i, a in enumerate(dense))
    found = ability_kept(sparse, dense, 0.25)
    assert found is not None

    def ratio(places):
        scores = [sum(given[p] == "1" for p in places) / 400 - 0.25 for given in (sparse, dense)]
        return scores[0] / scores[1]

    assert found["value"] == pytest.approx(ratio(range(400)))
    draw = random.Random(1)
    drawn = sorted(ratio(draw.choices(range(400), k=400)) for _ in range(2000))
    assert found["low"] == pytest.approx(drawn[50], abs=0.02)
    assert found["high"] == pytest.approx(drawn[1949], abs=0.02)
    assert found["low"] < found["value"] < found["high"]


def test_the_same_answers_keep_everything_without_doubt():
    dense = answers(200, 0.7, 0)
    assert ability_kept(dense, dense, 0.25) == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_dense_model_near_chance_makes_it_not_measurable():
    near, far = answers(100, 0.55, 3), answers(100, 0.75, 3)
    assert near.count("1") <= 60 and ability_kept(far, near, 0.5) is None
    assert beside(row("copa", far, 0.5), row("copa", near, 0.5))["ability"] == "not measurable"
    assert ability_kept(near, far, 0.5) is not None
    assert ability_kept("0" * 50, "0" * 50, 0.0) is None


def test_an_interval_without_an_end_says_so():
    found = beside(row("copa", "1" * 55 + "0" * 45, 0.5), row("copa", "0" * 20 + "1" * 60 + "0" * 20, 0.5))
    assert found["ability"].startswith("50 % (−") and found["ability"].endswith(" to unbounded)")


def test_a_row_beside_the_dense_one_has_it_all():
    dense = "1" * 80 + "0" * 20
    found = beside(row("arc_easy", "1" * 50 + "0" * 45 + "1" * 5), row("arc_easy", dense))
    assert (found["lost"], found["gained"]) == (30, 5)
    assert found["dense_value"] == 0.8 and found["dense_answers"] == dense
    assert found["ability"].startswith("55 % (") and found["ability_kept"]["value"] == pytest.approx(
        0.3 / 0.55
    )


def test_a_metric_that_is_no_yes_or_no_is_not_measurable():
    continuous = row("squad", "10") | {"answers": None}
    found = beside(continuous, continuous)
    assert found["ability"] == "not counted by items" and "lost" not in found


@pytest.mark.parametrize(
    ("task", "capability"),
    [
        ("hellaswag", "language"),
        ("lambada_openai", "language"),
        ("lambada_openai_mt_de", "other languages"),
        ("arc_easy", "knowledge"),
        ("arcade", "ungrouped"),
        ("mmlu_prox_de", "other languages"),
        ("mmlu_anatomy", "knowledge"),
        ("winogrande", "reasoning"),
        ("humaneval", "code"),
        ("my_own", "ungrouped"),
    ],
)
def test_tasks_are_grouped_by_the_longest_beginning(task, capability):
    assert capability_of(task) == capability


def test_the_capability_that_lost_most_is_named_and_uncovered_ones_are_said():
    dense = "1" * 160 + "0" * 40
    rows = [
        beside(row("hellaswag", "1" * 150 + "0" * 50), row("hellaswag", dense)),
        beside(row("arc_easy", "1" * 100 + "0" * 100), row("arc_easy", dense)),
        beside(row("arc_challenge", "1" * 80 + "0" * 20), row("arc_challenge", "1" * 80 + "0" * 20)),
        beside(row("sciq", "10" * 50, 0.5), row("sciq", "01" * 50, 0.5)),
        beside(row("copa", "10" * 100, 0.5), row("copa", "01" * 100, 0.5)),
        {"task": "mmlu", "capability": "knowledge", "group": True, "answers": None},
    ]
    groups = {group["capability"]: group for group in capabilities(rows)}
    assert groups["language"]["ability_kept"] == pytest.approx(0.5 / 0.55)
    assert groups["knowledge"]["ability_kept"] == pytest.approx((200 * 0.25 / 0.55 + 100) / 300)
    assert groups["knowledge"]["tasks"] == ["arc_easy", "arc_challenge", "sciq"]
    assert groups["knowledge"]["measurable"] == ["arc_easy", "arc_challenge"]
    assert groups["reasoning"]["status"] == "not measurable"
    assert groups["code"]["status"] == "not measured" and groups["code"]["tasks"] == []
    assert lost_most([*groups.values()]) == "knowledge"
    assert lost_most(capabilities([row("hellaswag", dense)])) is None
    assert lost_most(capabilities([beside(row("hellaswag", dense), row("hellaswag", dense))])) is None
    assert capabilities([row("hellaswag", dense)])[0]["status"] == "not measured"
