from dataclasses import replace

import numpy as np
import pytest
import torch

from configuration.recipe import Method
from training.data.batches import (
    Layout,
    collaborative_batch,
    constant,
    content_batch,
    evaluation_batch,
    join,
    last,
    next_item_batch,
    pad,
    plan_epoch,
    recommendation_batch,
    select,
    shifted,
    uniform,
)
from training.data.corpora import Texts
from training.data.ragged import Ragged

PROMPT = {"history": [1, 2], "separator": [3], "recommend": [4, 5]}
SMALL = Layout(num_words=10, num_users=40, num_items=100, prompt_ids=PROMPT)
USER, ITEM = 10, 50  # the first id of each
SEED = 7


def histories_of(*lengths):
    """Distinct items in [0, 100) for each user, as many as asked for."""
    generator = np.random.default_rng(0)
    return Ragged.from_lists([generator.permutation(100)[:length] for length in lengths], np.int32)


def rows_of(batch):
    """Ids of each document."""
    return [ids.tolist() for ids in batch["input_ids"][0].split(batch["document_lengths"])]


def labels_of(batch):
    """Labels of each document, of a language model's packed row or of the recommendation head's rectangle."""
    packed = "target_weights" not in batch
    rows = batch["labels"][0].split(batch["document_lengths"]) if packed else batch["labels"]
    return [labels[labels != -100].tolist() for labels in rows]


def prompt_of(row):
    """User tokens, item indices and words of a recommendation prompt."""
    return [i for i in row if USER <= i < ITEM], [i - ITEM for i in row if i >= ITEM], [i for i in row if i < USER]


def recommendation(histories, epoch=0, documents=None, seed=SEED, **method):
    documents = np.arange(len(histories)) if documents is None else documents
    return recommendation_batch(np.arange(len(histories)), histories, documents, SMALL, Method(**method), seed, epoch)


def collaborative(histories, epoch=0, documents=None, seed=SEED, **method):
    documents = np.arange(len(histories)) if documents is None else documents
    return collaborative_batch(np.arange(len(histories)), histories, documents, SMALL, Method(**method), seed, epoch)


def test_random_numbers_are_uniform():
    numbers = uniform(seed=1, epoch=0, stream=0, keys=np.arange(100_000))
    assert numbers.dtype == np.float64
    assert 0 <= numbers.min() < numbers.max() < 1
    counts, pairs = np.histogram(numbers, 20, (0, 1))[0], np.histogram2d(numbers[:-1], numbers[1:], 10)[0].ravel()
    # 99.99 % of what uniform numbers give lies below: 50.8 of 19 degrees of freedom, 157 of 99.
    for observed, limit in ((counts, 50.8), (pairs, 157)):
        expected = observed.sum() / len(observed)
        assert ((observed - expected) ** 2 / expected).sum() < limit


def test_random_numbers_depend_on_seed_epoch_stream_and_key_and_on_nothing_else():
    keys = np.array([3, 0, 2**40])
    numbers = uniform(5, 1, 2, keys)
    np.testing.assert_array_equal(numbers, uniform(5, 1, 2, keys))
    np.testing.assert_array_equal(numbers[::-1], uniform(5, 1, 2, keys[::-1]))
    np.testing.assert_array_equal(numbers[1:2], uniform(5, 1, 2, np.array([0])))
    others = [uniform(*key, keys) for key in ((6, 1, 2), (5, 2, 2), (5, 1, 1), (5, 2, 1), (1, 5, 2), (2**32 - 1, 1, 2))]
    assert len(np.unique([numbers, *others])) == 21


def test_an_epoch_holds_every_document_once_in_steps_of_the_batch_size():
    steps = plan_epoch(np.random.default_rng(0).integers(1, 50, 333), batch_size=4, seed=1, epoch=0)
    assert sorted(np.concatenate(steps)) == list(range(333))
    assert sorted(map(len, steps)) == [1] + [4] * 83


def test_epochs_differ_and_are_the_same_for_the_same_seed():
    lengths = np.full(64, 5)
    plans = [plan_epoch(lengths, 8, seed, epoch) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    first, again, later, other = (np.concatenate(plan).tolist() for plan in plans)
    assert first == again
    assert first != later
    assert first != other
    companions = [{frozenset(step.tolist()) for step in plan} for plan in plans]
    assert not companions[0] & companions[2]


def test_documents_are_sorted_within_a_step_so_that_processes_get_as_much():
    lengths = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 33), 8))
    for step in plan_epoch(lengths, 16, 0, 0):
        assert (np.diff(lengths[step]) >= 0).all()
        assert abs(lengths[step[::2]].sum() - lengths[step[1::2]].sum()) <= lengths[step].max()


def test_documents_of_a_small_corpus_meet_others_in_the_next_epoch():
    lengths = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 33), 8))
    step_of = np.empty((2, len(lengths)), int)
    for epoch in range(2):
        for number, step in enumerate(plan_epoch(lengths, 8, 0, epoch)):
            step_of[epoch, step] = number
    together = [step[:, None] == step[None, :] for step in step_of]
    for pairs in together:
        np.fill_diagonal(pairs, False)
    assert (together[0] & together[1]).sum() < 0.3 * together[0].sum()


def test_no_documents_make_no_steps():
    assert plan_epoch(np.empty(0, np.int64), 8, 0, 0) == []


def test_content_has_labels_on_the_main_text_only():
    documents = Ragged.from_lists([[11, 4, 5, 6, 0], [50, 7, 0]], np.int32)
    columns = {"kind": np.zeros(2), "user": np.zeros(2), "item": np.zeros(2), "prompt_length": np.array([2, 1])}
    batch = content_batch(Texts(documents, **columns), np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[50, 7, 0, 11, 4, 5, 6, 0]]
    assert batch["document_lengths"] == (3, 5)
    assert batch["labels"].tolist() == [[-100, 7, 0, -100, -100, 5, 6, 0]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_a_first_token_has_no_label_since_nothing_precedes_it():
    columns = {"kind": np.zeros(2), "user": np.zeros(2), "item": np.zeros(2), "prompt_length": np.zeros(2, int)}
    batch = content_batch(Texts(Ragged.from_lists([[1, 2], [3, 4]], np.int32), **columns), np.arange(2))
    assert batch["labels"].tolist() == [[-100, 2, -100, 4]]


def test_a_collaborative_document_reads_as_in_the_paper(shop, layout):
    users, histories = shop.histories("collaborative")
    method = Method(history_order="chronological")
    batch = collaborative_batch(users, histories, np.array([0, 4]), layout, method, SEED, 0)
    decoded = [shop.tokenizer.decode(row) for row in rows_of(batch)]
    assert decoded == [
        "user_0 has interacted with item_0 item_1 item_2 item_3 item_4",
        "user_4 has interacted with item_4 item_5 item_6 item_7 item_8",
    ]
    assert [shop.tokenizer.decode(row) for row in labels_of(batch)] == [text.split(" with ")[1] for text in decoded]


def test_collaborative_items_are_reshuffled_every_epoch():
    histories = histories_of(8, 3, 30)
    epochs = [labels_of(collaborative(histories, epoch)) for epoch in range(3)]
    wanted = [sorted(ITEM + row) for row in histories]
    assert all([sorted(row) for row in epoch] == wanted for epoch in epochs)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 3
    assert labels_of(collaborative(histories, 0)) == epochs[0]


def test_every_order_of_the_items_is_as_likely():
    histories = Ragged.from_lists([[0, 1, 2]] * 40)
    orders = [tuple(row) for epoch in range(30) for row in labels_of(collaborative(histories, epoch))]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 200) ** 2 / 200).sum() < 25.7  # 99.99 % of 5 degrees of freedom


@pytest.mark.parametrize("make", [collaborative, recommendation])
@pytest.mark.parametrize("order", ["shuffled", "chronological"])
def test_a_document_is_the_same_whatever_else_is_in_the_batch(make, order):
    histories = histories_of(5, 1, 9, 4, 30)
    whole = make(histories, 3, history_order=order)
    part = make(histories, 3, np.array([4, 2]), history_order=order)
    assert rows_of(part) == [rows_of(whole)[row] for row in (4, 2)]
    assert labels_of(part) == [labels_of(whole)[row] for row in (4, 2)]


@pytest.mark.parametrize("order", ["shuffled", "chronological"])
def test_prompt_and_targets_partition_the_history(order):
    histories = histories_of(2, 7, 40, 3)
    batch = recommendation(histories, history_order=order)
    for row, labels, history in zip(rows_of(batch), labels_of(batch), histories, strict=True):
        items = prompt_of(row)[1]
        assert items
        assert labels
        assert sorted(items + labels) == sorted(history)
        if order == "chronological":
            assert items + labels == history.tolist()
    assert batch["target_weights"].dtype == torch.float32
    assert torch.equal(batch["target_weights"], (batch["labels"] != -100).float())


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.6), (0.2, 0.2), (0.0, 1.0)])
def test_the_held_out_share_lies_between_its_bounds(low, high):
    histories = histories_of(*[50] * 40)
    counts = np.array(
        [
            len(row)
            for epoch in range(5)
            for row in labels_of(recommendation(histories, epoch, held_out_share=[low, high]))
        ]
    )
    at_least, at_most = max(1, 50 * low), min(49, 50 * high)
    assert counts.min() >= at_least
    assert counts.max() <= at_most
    assert np.ptp(counts) >= 0.85 * (at_most - at_least), "the share does not vary"


def test_the_tail_of_the_prompt_survives_and_the_oldest_items_go_first():
    histories = histories_of(10)
    cut = recommendation(
        histories, max_history=3, history_order="chronological", held_out_share=[0.5, 0.5], user_token_dropout=0.0
    )
    wanted = [USER, 1, 2, *(ITEM + histories[0][2:5]), 3, USER, 4, 5]
    assert rows_of(cut) == [wanted]
    assert labels_of(cut) == [histories[0][5:].tolist()]
    chronological = collaborative(histories, max_history=3, history_order="chronological")
    assert labels_of(chronological) == [(ITEM + histories[0][-3:]).tolist()]


def test_the_prompt_with_and_without_the_user_token_reads_as_in_the_paper(shop, layout):
    users, histories = shop.histories("recommendation")
    for share, someone in ((0.0, "user_3"), (1.0, "")):
        method = Method(user_token_dropout=share, held_out_share=[0.4, 0.4], history_order="chronological")
        batch = recommendation_batch(users, histories, np.array([3]), layout, method, SEED, 0)
        wanted = f"{someone} has interacted with item_3 item_4 item_5, {someone} will interact with"
        assert shop.tokenizer.decode(rows_of(batch)[0]) == wanted.replace(",  ", ", ")


def test_the_user_token_is_dropped_from_about_the_share_asked_for():
    histories = histories_of(*[4] * 40)
    found = [
        prompt_of(row)
        for epoch in range(25)
        for row in rows_of(recommendation(histories, epoch, user_token_dropout=0.3))
    ]
    assert 0.25 < np.mean([not users for users, _, _ in found]) < 0.35
    assert all(users in ([], [USER + n % 40] * 2) for n, (users, _, _) in enumerate(found))
    assert all(words == [1, 2, 3, 4, 5] for _, _, words in found)


def test_targets_are_the_held_out_items_or_the_whole_history():
    histories = histories_of(6, 9)
    held_out, whole = (recommendation(histories, targets=targets) for targets in ("held_out", "all"))
    assert rows_of(held_out) == rows_of(whole)
    prompts = [prompt_of(row)[1] for row in rows_of(held_out)]
    rest = [sorted(set(history) - set(prompt)) for history, prompt in zip(histories, prompts, strict=True)]
    assert [sorted(row) for row in labels_of(held_out)] == rest
    assert [sorted(row) for row in labels_of(whole)] == [sorted(history) for history in histories]
    for batch in (held_out, whole):
        assert torch.equal(batch["target_weights"], (batch["labels"] != -100).float())


@pytest.mark.parametrize("targets", ["held_out", "all"])
def test_of_a_history_with_one_item_the_prompt_is_empty_and_the_item_the_target(targets):
    batch = recommendation(histories_of(1), targets=targets, user_token_dropout=0.0)
    assert rows_of(batch) == [[USER, 1, 2, 3, USER, 4, 5]]
    assert labels_of(batch) == [histories_of(1)[0].tolist()]
    assert batch["target_weights"].tolist() == [[1.0]]


def next_items(histories, epoch=0, **method):
    method = Method(history_order="chronological", **method)
    return next_item_batch(np.arange(len(histories)), histories, np.arange(len(histories)), SMALL, method, SEED, epoch)


def test_of_the_next_item_each_document_is_a_history_and_each_item_a_target():
    histories = histories_of(3, 0, 6)
    named, nobody = (next_items(histories, user_token_dropout=share, max_history=4) for share in (0.0, 1.0))
    items = [(ITEM + row[-4:]).tolist() for row in histories]
    assert rows_of(named) == [[USER + n, 1, 2, *row] for n, row in enumerate(items)]
    assert rows_of(nobody) == [[1, 2, *row] for row in items]
    assert labels_of(named) == labels_of(nobody) == items
    mixed = [row for epoch in range(50) for row in rows_of(next_items(histories, epoch, user_token_dropout=0.3))]
    assert 0.2 < np.mean([row[0] == 1 for row in mixed]) < 0.4


def test_a_prompt_for_the_next_item_ends_with_the_history():
    layout = Layout(10, 40, 100, PROMPT | {"separator": [], "recommend": []})
    histories = histories_of(2, 0)
    batch = evaluation_batch(np.array([3, -1]), histories, layout, 5)
    assert rows_of(batch) == [[USER + 3, 1, 2, *(ITEM + histories[0])], [1, 2]]


@pytest.mark.parametrize("max_history", [3, 100])
@pytest.mark.parametrize("tail", [True, False])
def test_evaluation_prompts_are_those_of_the_model(make_towers, shop, layout, max_history, tail):
    if not tail:
        layout = replace(layout, prompt_ids=layout.prompt_ids | {"separator": [], "recommend": []})
    model = make_towers(max_history=max_history, prompt_ids=layout.prompt_ids).recommender
    users, histories = shop.histories("recommendation")
    asked = np.array([0, -1, 4])
    batch = evaluation_batch(np.where(asked < 0, -1, users[asked]), histories.take(abs(asked)), layout, max_history)
    wanted = model.prepare_prompts([histories[row].tolist() for row in abs(asked)], [0, None, 4])
    real = wanted["attention_mask"] == 1
    assert rows_of(batch) == [ids[row].tolist() for ids, row in zip(wanted["input_ids"], real, strict=True)]


RAGGED = [
    pytest.param([[4, 1, 7], [], [2]], id="an empty row"),
    pytest.param([[1], [2, 3]], id="two rows"),
    pytest.param([[], []], id="empty rows"),
    pytest.param([], id="no rows"),
]


def lists(ragged):
    return [row.tolist() for row in ragged]


@pytest.mark.parametrize("rows", RAGGED)
def test_join_puts_rows_one_behind_the_other(rows):
    others, third = [[9] * (i % 3) for i in range(len(rows))], [[8, 7]] * len(rows)
    joined = join([Ragged.from_lists(part) for part in (rows, others, third)])
    assert lists(joined) == [a + b + c for a, b, c in zip(rows, others, third, strict=True)]


@pytest.mark.parametrize("rows", RAGGED)
@pytest.mark.parametrize("fill", [0, -100])
def test_pad_makes_a_rectangle(rows, fill):
    padded, real = pad(Ragged.from_lists(rows, np.int32), fill)
    width = max([1, *map(len, rows)])
    assert padded.tolist() == [row + [fill] * (width - len(row)) for row in rows]
    assert real.tolist() == [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    assert padded.shape == real.shape == (len(rows), width)


@pytest.mark.parametrize("rows", RAGGED)
@pytest.mark.parametrize("count", [1, 2, 10])
def test_last_keeps_the_end_of_each_row(rows, count):
    assert lists(last(Ragged.from_lists(rows), count)) == [row[-count:] for row in rows]


@pytest.mark.parametrize("rows", RAGGED)
def test_select_keeps_the_chosen_values_of_each_row(rows):
    ragged = Ragged.from_lists(rows)
    assert lists(select(ragged, ragged.values > 1)) == [[value for value in row if value > 1] for row in rows]


@pytest.mark.parametrize("rows", RAGGED)
def test_shifted_adds_a_number(rows):
    ragged = shifted(Ragged.from_lists(rows, np.int8), 1000)
    assert lists(ragged) == [[value + 1000 for value in row] for row in rows]


@pytest.mark.parametrize("ids", [[5, 6], [5], []])
@pytest.mark.parametrize("add", [None, [10, 20, 30]])
def test_constant_gives_the_same_ids_plus_a_number_per_row(ids, add):
    ragged = constant(ids, 3, None if add is None else np.array(add))
    assert lists(ragged) == [[value + by for value in ids] for by in add or [0, 0, 0]]
