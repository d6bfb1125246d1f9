"""The benchmarks of a step: both sides take the same documents, the limit the same tokens, and what is timed is what is said."""

import inspect
import json
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import all as collected
from benchmarks import catalogue, parts, speed, steps
from benchmarks.claims import Claim, write_claims
from benchmarks.sets import make_backbone, make_corpora, set_recipe
from benchmarks.steps import Steps
from modeling_cllm4rec.packing_cllm4rec import PACKED_SDPA
from training.data.corpora import open_corpora
from training.evaluation.ranking import evaluate_scores
from training.evaluation.scoring import split_matrix

EPOCH = "epoch 1/2  loss: recommendation 6.6  validation NDCG@100 0.1"
LOGGED = [EPOCH, "data: 3 users", EPOCH, EPOCH, EPOCH, EPOCH, "user offsets"]  # the first of an earlier run
STAGES = ("content", "collaborative", "recommendation")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Folder, backbone, corpora and recipe of the sample on a tiny backbone."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.sets.NUM_WORDS", 400)
        patch.setenv("CLLM4REC_DATA", str(folder / "none"))
        patch.setattr("benchmarks.sets.make_backbone", lambda where: make_backbone(where, layers=1, width=8, heads=2))
        corpora = make_corpora("sample", folder)
        words = ("pretrain.batch_size=20", "finetune.batch_size=20")
        yield folder / "gpt2-1x8", corpora, set_recipe("sample", folder, *words)


@pytest.mark.parametrize("stage", STAGES)
def test_both_sides_take_the_same_documents(sample, stage):
    backbone, corpora, _ = sample
    opened = open_corpora(corpora)
    documents = steps.Documents.of(opened, backbone)
    keys = next(steps.endless(documents, stage))
    mine = steps.published_order(stage, corpora, backbone)[0]
    if stage == "content":
        texts = opened.texts("content")
        for key, document in zip(keys, mine, strict=True):
            kind, user, item, _ = documents.texts[key]
            assert (texts.kind[document], texts.user[document], texts.item[document]) == (kind, user, item)
    else:
        users, histories = opened.histories("recommendation")
        assert users[mine].tolist() == keys
        assert [sorted(row.tolist()) for row in histories.take(mine)] == [sorted(documents.histories[k]) for k in keys]


@pytest.mark.parametrize("stage", STAGES)
def test_a_repeat_counts_its_documents_and_goes_on(sample, stage, monkeypatch):
    backbone, corpora, recipe = sample
    taken = []
    step = steps.loop.train_step
    monkeypatch.setattr(
        steps.loop, "train_step", lambda *given, **options: taken.append(given[2].tolist()) or step(*given, **options)
    )
    repeat = steps.ours(stage, recipe, corpora, 2, steps.published_order(stage, corpora, backbone))
    assert repeat() == repeat() == 40
    assert len({tuple(documents) for documents in taken}) == 4


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_the_limit_computes_the_tokens_of_our_steps_and_pays_where_they_do(sample, stage, half, monkeypatch):
    backbone, corpora, recipe = sample
    precision = "bf16" if half else "no"
    for name in ("pretrain", "finetune"):
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), mixed_precision=precision)})
    seen = []
    bare = steps.bare_inputs
    monkeypatch.setattr(steps, "bare_inputs", lambda *given: seen.append((given[1], bare(*given))) or seen[-1][1])
    monkeypatch.setattr(steps, "MOST_STEPS", 3)
    assert steps.limit(stage, recipe, corpora, 3, steps.published_order(stage, corpora, backbone))() == 60
    for batch, (embeds, arguments, places, targets, documents) in seen:
        assert embeds.shape[:2] == batch["input_ids"].shape
        assert arguments()["packing"].lengths == batch["document_lengths"]
        paid = documents if stage == "recommendation" else int((batch["labels"][:, 1:] != -100).sum())
        assert len(places) == len(targets) == paid
        assert documents == len(batch["document_lengths"]) == 20


@pytest.mark.parametrize("stage", STAGES)
def test_the_limit_runs_the_backbone_of_our_step(sample, stage, monkeypatch):
    backbone, corpora, recipe = sample
    made = []
    monkeypatch.setattr(steps, "MOST_STEPS", 1)
    monkeypatch.setattr(steps, "Steps", lambda *given: made.append(Steps(*given)) or made[-1])
    repeat = steps.limit(stage, recipe, corpora, 1, steps.published_order(stage, corpora, backbone))
    inside, mine = inspect.getclosurevars(repeat).nonlocals, made[0].towers.base.backbone
    bare, base = inside["bare"], made[0].towers.base
    rows = base.item_embeddings.weight if stage != "content" else mine.get_input_embeddings().weight
    assert torch.equal(inside["head"], rows)
    assert bare is not mine
    assert bare.training
    assert [type(module) for module in bare.modules()] == [type(module) for module in mine.modules()]
    shares = [[m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] for model in (bare, mine)]
    assert shares[0] == shares[1]
    for name, weight in mine.state_dict().items():
        assert torch.equal(bare.state_dict()[name], weight), name
    made[0](0)  # only then is ours switched to packed rows
    assert bare.config._attn_implementation == mine.config._attn_implementation == PACKED_SDPA


@pytest.mark.parametrize("stage", STAGES)
def test_a_document_of_the_limit_does_not_attend_to_those_before_it(sample, stage, monkeypatch):
    backbone, corpora, recipe = sample
    monkeypatch.setattr(steps, "MOST_STEPS", 1)
    inside = inspect.getclosurevars(
        steps.limit(stage, recipe, corpora, 1, steps.published_order(stage, corpora, backbone))
    ).nonlocals
    embeds, arguments, *_ = inside["prepared"][0]
    bare, first = inside["bare"].eval(), arguments()["packing"].lengths[0]
    changed = embeds.clone()
    changed[:, :first] = torch.randn_like(changed[:, :first])  # a layer norm would undo a shift
    with torch.no_grad():
        one, two = (bare(inputs_embeds=given, use_cache=False, **arguments())[0] for given in (embeds, changed))
    assert not torch.equal(one[:, :first], two[:, :first])
    torch.testing.assert_close(one[:, first:], two[:, first:])


def test_ours_ranks_as_evaluation_does(sample, monkeypatch):
    _, corpora, recipe = sample
    best, ranked, made = steps.best_items, {}, []

    def noted(scores, seen, users, k):
        found = best(scores, seen, users, k)
        ranked.update(zip(users.tolist(), found.items.tolist(), strict=True))
        return found

    make = steps.make_model
    monkeypatch.setattr(steps, "best_items", noted)
    # In float32 two scores that differ by a rounding change places from one batch to another.
    monkeypatch.setattr(steps, "make_model", lambda *given: made.append(make(*given).double()) or made[-1])
    opened = open_corpora(corpora)
    steps.ours("predict", recipe, corpora, 2)()
    users, histories = opened.histories("recommendation")
    scores = steps.ModelScores(made[0], users, histories, steps.layout_of(opened), made[0].config.max_history)
    top = {}
    evaluate_scores(
        scores, users, split_matrix(opened, "recommendation"), split_matrix(opened, "test"),
        batch_size=7, k=recipe.evaluation.top_k,
        read_block=lambda block, items: top.update(zip(block.tolist(), items.tolist(), strict=True)),
    )  # fmt: skip
    assert ranked == top


def test_ours_ranks_every_user_once_as_predict_does(sample, monkeypatch):
    _, corpora, recipe = sample
    ranked = []
    best = steps.best_items
    monkeypatch.setattr(
        steps, "best_items", lambda scores, seen, users, k: ranked.append((users, best(scores, seen, users, k).items))
    )
    opened = open_corpora(corpora)
    count = steps.ours("predict", recipe, corpora, 2)()
    users, histories = opened.histories("recommendation")
    assert count == len(users)
    assert sorted(np.concatenate([users for users, _ in ranked])) == users.tolist()
    seen = dict(zip(users.tolist(), (set(row.tolist()) for row in histories), strict=True))
    for some, items in ranked:
        assert items.shape[1] == recipe.evaluation.top_k
        assert not any(seen[user] & set(row) for user, row in zip(some.tolist(), items.tolist(), strict=True))


def test_of_many_users_some_are_ranked_the_shortest_and_the_longest_histories_too(sample, monkeypatch):
    _, corpora, recipe = sample
    taken, best = [], steps.best_items
    monkeypatch.setattr(
        steps, "best_items", lambda scores, seen, users, k: taken.extend(users) or best(scores, seen, users, k)
    )
    users, histories = open_corpora(corpora).histories("recommendation")
    count = steps.ours("predict", recipe, corpora, 1)()
    assert count == len(taken) == len(set(taken)) < len(users)
    lengths = dict(zip(users.tolist(), histories.lengths.tolist(), strict=True))
    assert {min(lengths.values()), max(lengths.values())} <= {lengths[user] for user in taken}


def test_the_time_until_a_figure_counts_what_comes_before_and_not_what_comes_after(tmp_path):
    for stage, values in (("pretrain", [0.1, 0.2]), ("finetune", [0.25, 0.4])):
        epochs = [{"seconds": 2.0, "ndcg_at_100": value} for value in values]
        (tmp_path / "checkpoints" / stage).mkdir(parents=True)
        (tmp_path / "checkpoints" / stage / "progress.json").write_text(json.dumps({"epochs": epochs}))
    lines = [f"2026-01-01 00:00:{second:02},500 {said}" for second, said in enumerate(LOGGED)]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    started = datetime(2026, 1, 1)
    assert speed.time_to_reach(tmp_path, 0.24, started) == (4.5, 0.25)
    assert speed.time_to_reach(tmp_path, 0.3, started) == (5.5, 0.4)
    with pytest.raises(ValueError, match="no epoch"):
        speed.time_to_reach(tmp_path, 0.5, started)


@pytest.mark.parametrize(
    ("stage", "without"),
    [
        *(("content", part) for part in ("", "packing", "gelu", "chunks", "positions")),
        ("collaborative", "rows"),
        ("recommendation", "rows"),
        ("collaborative", "frozen"),
    ],
)
def test_a_step_without_an_optimisation_computes_the_same(sample, stage, without, monkeypatch):
    _, corpora, recipe = sample
    losses = []
    step = steps.loop.train_step
    monkeypatch.setattr(
        steps.loop, "train_step", lambda *given, **options: losses.append(step(*given, **options).item())
    )
    for owner, attribute in (
        (parts.modeling, "next_token_loss"),
        (parts.modeling.CLLM4RecModel, "forward_packed"),
        (torch.nn.functional, "linear_cross_entropy"),
        (parts.loop, "looked_up_rows"),
    ):
        if hasattr(owner, attribute):
            monkeypatch.setattr(
                owner, attribute, getattr(owner, attribute)
            )  # put back at the end what `trains` patches
    monkeypatch.setattr(parts, "steps_of", lambda *given: still(Steps(*given[:2], open_corpora(given[2]))))
    assert parts.trains(stage, recipe, corpora, 2, "")() == 40
    assert parts.trains(stage, recipe, corpora, 2, without)() == 40
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-4)


def still(prepared):
    """Steps without dropout."""
    for module in prepared.towers.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return prepared


def test_made_up_catalogues_have_histories_of_the_same_lengths():
    few, many = (catalogue.MadeUp(items, num_users=50).histories("")[1] for items in (10_000, 1_000_000))
    assert few.offsets.tolist() == many.offsets.tolist()
    assert few.values.max() < 10_000
    assert many.values.max() > 100_000
    assert all(len(set(row.tolist())) == len(row) for row in many)


@pytest.mark.parametrize(("sets", "measured"), [(("sample",), ["sample"]), ((), ["ml-100k", "amazon-beauty"])])
def test_the_sample_is_measured_where_it_is_asked_for_and_not_otherwise(sets, measured, monkeypatch):
    monkeypatch.setattr(speed, "Worker", lambda _: nullcontext(SimpleNamespace(peak_memory=0)))
    monkeypatch.setattr(speed, "set_at_hand", lambda name: name)
    monkeypatch.setattr(speed, "stage_claims", lambda name, stage, at_least, *_: iter([(name, stage, at_least)]))
    found = list(speed.claims(False, sets=sets, stages=("predict",)))
    assert found == [(name, "predict", least) for name, least in zip(measured, (6, 5), strict=False)]


@pytest.mark.parametrize("stage", ["collaborative", "recommendation"])
def test_a_step_on_a_made_up_catalogue_leaves_most_rows_alone(stage, monkeypatch):
    monkeypatch.setattr(catalogue, "USERS", 100)
    prepared = Steps(stage, catalogue.catalogue_recipe(), catalogue.MadeUp(100_000, num_users=100))
    table = prepared.towers.base.item_embeddings.weight
    before = table.detach().clone()
    assert prepared(0) == 64
    moved = int((table != before).any(1).sum())
    assert 0 < moved < 10_000
    assert table.shape[1] == 64


def test_every_group_is_measured_written_and_drawn(tmp_path, monkeypatch):
    rows = [
        Claim("ours", "sample", 4.0, 2.0, "users/s", 2.0, at_least=1.5, runs=[[4.0, 2.0]], command="python benchmarks/speed.py"),
        Claim("memory", "sample", 4.0, 2.0, "MB", 2.0, at_most=1.5, runs=[[4.0, 2.0]], command="python benchmarks/memory.py"),
    ]  # fmt: skip
    write_claims(rows, tmp_path / "speed.json")
    collected.draw_all(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed-memory.png", "speed-speed.png", "speed.json"]
    assert (tmp_path / "speed-speed.png").read_bytes()[:4] == b"\x89PNG"
    assert set(collected.groups(None, None, True)) == {
        "speed", "parts", "catalogue", "memory", "prediction", "serving", "vectors",
    }  # fmt: skip


def test_the_same_epochs_on_both_sides_give_figures_of_the_same_users(sample, monkeypatch, tmp_path):
    """One epoch of each: the engine trains the published method on the same documents, so that neither is far from the other."""
    backbone, corpora, _ = sample
    monkeypatch.setattr(speed, "make_backbone", lambda folder: backbone)
    monkeypatch.setattr("benchmarks.sets.make_backbone", lambda folder: backbone)
    monkeypatch.setattr(speed, "make_corpora", lambda name, folder: corpora)
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path / "none"))
    quality, time = speed.same_epochs("sample", tmp_path, 1, 1)
    reached, published = quality.runs[0]
    assert 0.5 < reached / published < 2
    assert 0 < 1 - quality.at_least < 0.2
    stages = [speed.epochs_of(tmp_path / "sample-published", stage) for stage in ("pretrain", "finetune")]
    assert [len(records) for records in stages] == [1, 1]
    assert reached == stages[1][0]["ndcg_at_100"]
    assert time.runs[0][0] == sum(records[0]["seconds"] for records in stages)


@pytest.mark.parametrize("what", ["until_best", "same_epochs"])
def test_sets_that_are_not_at_hand_are_the_sample_once(what, monkeypatch, tmp_path, capsys):
    names = []
    monkeypatch.setenv("CLLM4REC_DATA", str(tmp_path / "none"))
    monkeypatch.setattr(speed, what, lambda name, *given, **options: names.append(name) or [])
    monkeypatch.setattr("sys.argv", ["speed.py", f"--{what.replace('_', '-')}", "--set", "ml-100k", "amazon-beauty"])
    speed.main()
    assert names == ["sample"]
    assert "the embedded sample is measured instead" in capsys.readouterr().out


def test_making_batches_counts_their_documents_and_trains_nothing(sample, monkeypatch):
    _, corpora, recipe = sample
    monkeypatch.setattr(steps.loop, "train_step", lambda *given, **options: pytest.fail("a step was made"))
    make = parts.makes_batches("collaborative", recipe, corpora, 2)
    assert make() == make() == 40


def test_what_needs_a_compiler_is_left_out_in_so_many_words_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(parts.shutil, "which", lambda name: None)
    assert list(parts.claims(False, only=["compile"])) == []
    assert "not measured, it is no part of the short form and needs g++" in capsys.readouterr().out


def test_parts_are_measured_by_name(monkeypatch):
    claims = []
    monkeypatch.setattr(parts, "Worker", lambda *given: claims.append(given[0]))
    monkeypatch.setattr(parts, "together", lambda *workers: nullcontext(workers))
    monkeypatch.setattr(parts, "alternate", lambda claim, *given, **options: claim)
    assert list(parts.claims(True, only=["adamw"])) == ["row-wise AdamW, ÷ dense"]
    assert claims == [parts.row_steps, parts.row_steps]
