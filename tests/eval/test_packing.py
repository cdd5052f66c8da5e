"""Rows that share prefixes hold every path whole, and the mask lets none see another."""

import random

import torch

from llmsparse.eval.packing import Path, Row, attention_mask, batches, collate, share


def paths_of(*texts: str) -> list[Path]:
    """``context|continuation``: each letter a token; the last token is only predicted."""
    found = []
    for number, text in enumerate(texts):
        context, continuation = (list(map(ord, part)) for part in text.split("|"))
        found.append(Path(number, (context + continuation)[:-1], continuation))
    return found


def test_neighbours_with_one_context_share_a_row_and_others_do_not():
    rows = share(paths_of("question|one", "question|two", "other thing|x", "other thing|y", "q|z"), most=99)
    assert [[path.number for path in row.paths] for row in rows] == [[0, 1], [2, 3], [4]]
    assert [row.prefix for row in rows] == [8, 11, 1]
    assert [len(row) for row in rows] == [8 + 2 + 2, 11, 1]


def test_contexts_that_differ_at_their_end_share_what_they_have_in_common():
    (row,) = share(paths_of("the cat because he|ran off", "the cat because it|ran off"), most=99)
    assert row.prefix == len("the cat because ")


def test_continuations_of_one_token_are_one_sequence():
    (row,) = share(paths_of("question|A", "question|B", "question|C and"), most=99)
    assert row.branches == 1 and len(row) == len("questionC an")


def test_a_short_common_beginning_is_not_worth_a_row():
    assert len(share(paths_of("question: who|x", "question: a thing much longer than that|x"), most=99)) == 2


def test_no_row_outgrows_the_most():
    rows = share(paths_of(*(f"a context|{i}{'x' * 10}" for i in range(9))), most=40)
    assert [len(row.paths) for row in rows] == [3, 3, 3] and max(map(len, rows)) <= 40


def test_every_row_lies_in_one_batch_beside_rows_of_its_length():
    draw = random.Random(0)
    rows = [Row(size, [Path(i, [1] * size, [1])]) for i, size in enumerate(draw.choices(range(1, 50), k=100))]
    found = list(batches(rows, most=100))
    assert sorted(row.paths[0].number for batch in found for row in batch) == list(range(100))
    assert all(len(batch) * max(map(len, batch)) <= 100 for batch in found)
    lengths = [len(row) for batch in found for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches([Row(200, [Path(0, [1] * 200, [1])])], most=100)] == [1]


def test_a_row_spells_every_path_and_predicts_its_targets():
    paths = paths_of("question|one", "question|four", "question|x", "another|ab")
    rows = share(paths, most=99)
    batch = collate(rows)
    predicted = iter(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True))
    for path in batch.paths:
        number = next(i for i, row in enumerate(rows) if path in row.paths)
        branch = rows[number].paths.index(path)
        mine = [c for c, b in enumerate(batch.branches[number].tolist()) if b in (-1, branch)]
        assert batch.ids[number, mine].tolist() == path.inputs
        assert batch.positions[number, mine].tolist() == list(range(len(path.inputs)))
        for place, target in enumerate(path.targets):
            row, column, wanted = next(predicted)
            assert (row, wanted) == (number, target)
            assert mine.index(column) == len(path.inputs) - len(path.targets) + place


def test_the_mask_allows_the_prefix_and_ones_own_branch():
    mask = attention_mask(torch.tensor([[-1, -1, 0, 0, 1, -2]]), torch.float32)[0, 0] == 0
    expected = ["100000", "110000", "111000", "111100", "110010", "110001"]
    assert ["".join(str(int(x)) for x in row) for row in mask] == expected
