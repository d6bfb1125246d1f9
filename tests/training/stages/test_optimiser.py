"""Row-wise AdamW against torch's own, row by row; sparse gradients through the model, through clipping, through a checkpoint."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from training.stages.optimiser import (
    RowwiseAdamW,
    choose_sparse_tables,
    clip_gradients,
    looked_up_rows,
    nonzero_rows,
    reduce_rows,
)

FIELDS = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.05}
ROWS, WIDTH = 40, 3
# Of each step the rows that are looked up: row 7 twice in one step, row 2 in all, row 5 after the others.
STEPS = [[2, 7, 7], [2, 9], [5, 2, 7], [2], [5, 9, 2]]


def table(rows=ROWS, dtype=torch.float32, sparse=True):
    torch.manual_seed(0)
    weight = torch.randn(1000, WIDTH)[:rows].to(dtype)
    return nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=sparse)


def look_up(embedding, rows, step):
    """Give the looked-up rows a gradient that differs from step to step and from place to place."""
    scale = torch.arange(1, 1 + len(rows)).unsqueeze(1) * torch.tensor([1.0, -2.0, 0.5]) * (-1) ** step
    (embedding(torch.tensor(rows)) * (scale + step)).sum().backward()


def walk(embedding, steps=STEPS, optimizer=None, first=0, lr=lambda step: 0.1 / (1 + step)):
    optimizer = optimizer or RowwiseAdamW(embedding.parameters(), **FIELDS)
    for step, rows in enumerate(steps, first):
        optimizer.param_groups[0]["lr"] = lr(step)
        look_up(embedding, rows, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def rows_alone(steps=STEPS, dtype=torch.float32):
    """Each row as a parameter of its own that torch's AdamW steps when the row is touched."""
    start = table(dtype=dtype).weight.detach()
    values = [nn.Parameter(row.clone()) for row in start]
    optimizers = [torch.optim.AdamW([value], **FIELDS) for value in values]
    for step, rows in enumerate(steps):
        gradients = table(dtype=dtype, sparse=False)
        look_up(gradients, rows, step)
        for row in set(rows):
            optimizers[row].param_groups[0]["lr"] = 0.1 / (1 + step)
            values[row].grad = gradients.weight.grad[row]
            optimizers[row].step()
    return torch.stack([value.detach() for value in values])


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
def test_each_row_is_an_adamw_of_its_own(dtype, rtol):
    embedding = table(dtype=dtype)
    walk(embedding)
    torch.testing.assert_close(embedding.weight.detach(), rows_alone(dtype=dtype), rtol=rtol, atol=rtol)


def test_where_every_row_is_touched_every_time_it_is_torchs_adamw():
    everything = [list(range(ROWS))] * 6
    sparse, dense = table(), table(sparse=False)
    walk(sparse, everything)
    walk(dense, everything, torch.optim.AdamW(dense.parameters(), **FIELDS))
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-5, atol=1e-6)


def test_rows_that_nothing_touches_stay_bit_by_bit_and_have_no_moments():
    embedding = table()
    optimizer = walk(embedding)
    touched = {row for rows in STEPS for row in rows}
    rest = [row for row in range(ROWS) if row not in touched]
    assert torch.equal(embedding.weight[rest], table().weight[rest])
    assert all((embedding.weight[row] != table().weight[row]).all() for row in touched)
    state = optimizer.moments[embedding.weight]
    assert state.used == len(touched)
    assert (state.slots >= 0).nonzero().squeeze(1).tolist() == sorted(touched)


def test_moments_take_memory_for_touched_rows_whatever_the_size_of_the_table():
    sizes = []
    for rows in (ROWS, 1000):
        embedding = table(rows)
        state = walk(embedding, [*STEPS, list(range(20))]).moments[embedding.weight]
        sizes.append(state.exp_avg.numel() + state.exp_avg_sq.numel())
    assert sizes[0] == sizes[1] <= 2 * 2 * 20 * WIDTH  # grown by doubling


def test_no_table_has_more_places_than_rows():
    embedding = table(5)
    state = walk(embedding, [[0, 1, 2], [3], [4]]).moments[embedding.weight]
    assert len(state.exp_avg) == len(state.steps) == 5


def test_a_step_does_not_depend_on_the_number_of_rows():
    small, large = table(), table(1000)
    for embedding in (small, large):
        walk(embedding)
    assert torch.equal(small.weight, large.weight[:ROWS])


def test_a_masked_position_that_looks_row_0_up_is_no_step_of_row_0():
    embedding = table()
    walk(embedding, [[0]])
    before = embedding.weight[0].clone()
    optimizer = RowwiseAdamW(embedding.parameters(), **FIELDS)
    mask = torch.tensor([[0.0], [1.0]])
    (embedding(torch.tensor([0, 4])) * mask).sum().backward()
    optimizer.step()
    assert torch.equal(embedding.weight[0], before)
    assert optimizer.moments[embedding.weight].used == 1


def test_a_bias_has_scalars_for_rows():
    bias, whole = (nn.Parameter(torch.arange(6.0)) for _ in range(2))
    index = torch.tensor([[4, 1]])
    ours, theirs = RowwiseAdamW([bias], **FIELDS), torch.optim.AdamW([whole], **FIELDS)
    bias.grad = torch.sparse_coo_tensor(index, torch.tensor([1.0, -3.0]), (6,), check_invariants=True)
    whole.grad = bias.grad.to_dense()
    ours.step()
    theirs.step()
    torch.testing.assert_close(bias[[1, 4]], whole[[1, 4]])
    assert torch.equal(bias[[0, 2, 3, 5]], torch.tensor([0.0, 2.0, 3.0, 5.0]))
    assert ours.moments[bias].exp_avg.shape == (2,)


def test_dense_gradients_beside_sparse_ones_are_stepped_by_torch():
    embedding, layer, same = table(), nn.Linear(2, 2), nn.Linear(2, 2)
    same.load_state_dict(layer.state_dict())
    ours = RowwiseAdamW([*embedding.parameters(), *layer.parameters()], **FIELDS)
    theirs = torch.optim.AdamW(same.parameters(), **FIELDS, fused=True)
    for step in range(4):
        look_up(embedding, [3], step)
        for module in (layer, same):
            module(torch.ones(2) * step).square().sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(layer.weight, same.weight)
    assert ours.param_groups[0]["fused"]
    assert list(ours.moments) == [embedding.weight]
    assert embedding.weight not in ours.state


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_a_table_keeps_to_the_kind_of_gradient_it_got_first(first):
    embedding, same = table(sparse=first == "sparse"), table(sparse=first == "sparse")
    optimizer, expected = walk(embedding, STEPS[:2]), walk(same, STEPS[:2])
    embedding.sparse = not embedding.sparse
    walk(embedding, STEPS[2:], optimizer, first=2)
    walk(same, STEPS[2:], expected, first=2)
    torch.testing.assert_close(embedding.weight, same.weight, rtol=1e-6, atol=1e-7)


def test_a_closure_is_called_with_gradients_on():
    embedding = table()
    optimizer = RowwiseAdamW(embedding.parameters(), **FIELDS)

    def closure():
        loss = embedding(torch.tensor([1])).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(table().weight[1].sum().item())
    assert not torch.equal(embedding.weight[1], table().weight[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_that_was_saved_goes_on_bit_by_bit(tmp_path, dtype):
    whole, broken = table(dtype=dtype), table(dtype=dtype)
    walk(whole, STEPS)
    torch.save([walk(broken, STEPS[:3]).state_dict(), broken.state_dict()], tmp_path / "state.pt")
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = table(dtype=dtype)
    resumed.load_state_dict(weights)
    optimizer = RowwiseAdamW(resumed.parameters(), lr=1.0)
    optimizer.load_state_dict(state)
    assert optimizer.moments[resumed.weight].steps.dtype == torch.int32
    walk(resumed, STEPS[3:], optimizer, first=3)
    assert torch.equal(resumed.weight, whole.weight)


def test_a_saved_state_holds_touched_rows_alone():
    embedding = table(1000)
    optimizer = walk(embedding, [*STEPS, [30]])
    state = optimizer.state_dict()["rows"][0]
    assert len(optimizer.moments[embedding.weight].steps) == 8
    assert state["rows"].tolist() == [2, 7, 9, 5, 30]
    assert sum(value.untyped_storage().nbytes() for value in state.values()) == 5 * (8 + 2 * 4 * WIDTH + 4)


def test_loading_a_state_leaves_the_one_that_was_saved_alone():
    embedding, other = table(), table()
    saved = walk(embedding).state_dict()
    kept = copy.deepcopy(saved)
    optimizer = RowwiseAdamW(other.parameters(), **FIELDS)
    optimizer.load_state_dict(saved)
    walk(other, STEPS, optimizer)
    for name, value in saved["rows"][0].items():
        assert torch.equal(value, kept["rows"][0][name])


def test_a_dense_optimiser_saves_what_torchs_saves():
    embedding = table(sparse=False)
    optimizer = walk(embedding)
    assert optimizer.state_dict().keys() == torch.optim.AdamW(embedding.parameters()).state_dict().keys()


def test_accelerate_saves_and_loads_it(tmp_path, make_accelerator):
    def prepared():
        accelerator = make_accelerator("no")
        embedding = table()
        optimizer = RowwiseAdamW(embedding.parameters(), **FIELDS)
        return accelerator, *accelerator.prepare(embedding, optimizer)

    _, whole, optimizer = prepared()
    walk(whole, STEPS, optimizer)
    accelerator, broken, optimizer = prepared()
    walk(broken, STEPS[:3], optimizer)
    accelerator.save_state(str(tmp_path))
    accelerator, resumed, optimizer = prepared()
    accelerator.load_state(str(tmp_path))
    walk(resumed, STEPS[3:], optimizer, first=3)
    assert torch.equal(resumed.weight, whole.weight)


def test_rows_of_zeros_are_left_out_and_those_given_twice_are_added():
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[5, 0, 5, 3]]), torch.tensor([[1.0], [0.0], [2.0], [4.0]]), (8, 1), check_invariants=True
    )
    for given in (gradient, gradient.to_dense()):
        rows, values = nonzero_rows(given)
        assert rows.tolist() == [3, 5]
        assert values.tolist() == [[4.0], [3.0]]


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_a_sparse_gradient_is_clipped_as_a_dense_one(make_accelerator, max_norm):
    accelerator, grads, norms = make_accelerator("no"), [], []
    for sparse in (True, False):
        embedding, layer = table(sparse=sparse), nn.Linear(WIDTH, 1)
        nn.init.ones_(layer.weight)
        layer(embedding(torch.tensor([3, 3, 8]))).square().sum().backward()
        unused = nn.Parameter(torch.ones(2))
        norms.append(clip_gradients(accelerator, [embedding.weight, *layer.parameters(), unused], max_norm))
        grads.append([embedding.weight.grad.to_dense(), layer.weight.grad])
    torch.testing.assert_close(norms[0], norms[1])
    assert 0.5 < norms[0] < 100
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sparse_gradients_in_half_precision_are_unscaled_before_they_are_clipped(make_accelerator, monkeypatch):
    accelerator, order = make_accelerator("no"), []
    embedding = table()
    look_up(embedding, [1], 0)
    embedding.weight.grad = embedding.weight.grad * 1024

    def unscale():
        order.append("unscaled")
        embedding.weight.grad = embedding.weight.grad / 1024

    monkeypatch.setattr(accelerator, "unscale_gradients", unscale)
    norm = clip_gradients(accelerator, embedding.parameters(), 1.0)
    assert order == ["unscaled"]
    assert norm == pytest.approx((1 + 4 + 0.25) ** 0.5)


def test_a_scaler_leaves_a_step_out_whose_gradients_overflow():
    embedding = table()
    optimizer = RowwiseAdamW(embedding.parameters(), **FIELDS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        scaler.scale(embedding(torch.tensor([1])).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (not torch.equal(embedding.weight, table().weight)) is moves
    expected = walk_once_with_a_gradient_of_ones()
    torch.testing.assert_close(embedding.weight, expected)


def walk_once_with_a_gradient_of_ones():
    embedding = table()
    embedding(torch.tensor([1])).sum().backward()
    RowwiseAdamW(embedding.parameters(), **FIELDS).step()
    return embedding.weight


def sparse_names(towers):
    return {name for name, module in towers.base.named_children() if getattr(module, "sparse", False)}


LOOKED_UP = {"user_embeddings", "content_user_embeddings", "content_item_embeddings"}


@pytest.mark.parametrize(("sampled", "names"), [(False, LOOKED_UP), (True, LOOKED_UP | {"item_embeddings"})])
def test_tables_that_are_only_looked_up_have_sparse_gradients(make_towers, make_accelerator, sampled, names):
    towers = make_towers()
    chosen = choose_sparse_tables(towers, make_accelerator("no"), sampled=sampled)
    assert sparse_names(towers) == names
    assert {id(one) for one in chosen} == {id(getattr(towers.base, name)) for name in names}


def gradients_of_items(towers, rows):
    """Of two parts of a step, which look some items up twice and rank all; `rows` is what takes the look-ups."""
    towers = copy.deepcopy(towers)
    base = towers.base
    first_item = base.config.num_words + base.config.num_users
    with rows(towers) as add:
        for items in ([1, 3, 3], [3, 0]):
            input_ids = torch.tensor([[0, *(first_item + item for item in items)]])
            states = base(input_ids).last_hidden_state[:, -1]
            pulled = base.item_embeddings(torch.tensor(items[:2])).square().sum()
            (towers.recommender.item_logits(states).logsumexp(-1).sum() + pulled).backward()
            add()
    return base.item_embeddings.weight.grad


def by_autograd(towers):
    return nullcontext(lambda: None)


class TablesMade(TorchDispatchMode):
    """Counts the tables of so many rows, all zeros but for a few, that look-ups with dense gradients make."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.count = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.embedding_dense_backward.default and args[2] == self.rows
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_are_added_to_the_gradient_of_the_head_in_place(make_towers, make_accelerator, dtype):
    towers, accelerator = make_towers().to(dtype), make_accelerator("no")
    counts, found = [], []
    for rows in (by_autograd, lambda towers: looked_up_rows(towers, accelerator)):
        with TablesMade(towers.base.config.num_items) as seen:
            found.append(gradients_of_items(towers, rows))
        counts.append(seen.count)
    expected, gradients = found
    assert expected.abs().sum(1).gt(0).all()
    assert gradients.dtype == dtype
    tolerance = 0.02 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)
    assert counts == [4, 0]


def test_rows_of_an_item_that_is_looked_up_often_are_summed_precisely(make_towers, make_accelerator):
    towers = make_towers().to(torch.bfloat16)
    table = towers.base.item_embeddings
    with looked_up_rows(towers, make_accelerator("no")) as add:
        (table(torch.full((2000,), 2)) * 0.01).sum().backward()
        add()
    assert table.weight.grad[2, 0].item() == pytest.approx(20, rel=0.01)


def test_rows_that_no_head_ranks_have_a_gradient_too(make_towers, make_accelerator):
    towers = make_towers()
    table = towers.base.item_embeddings
    with looked_up_rows(towers, make_accelerator("no")) as add:
        table(torch.tensor([2, 2])).sum().backward()
        add()
    assert table.weight.grad[:, 0].tolist() == [0, 0, 2] + [0] * (len(table.weight) - 3)


def test_rows_are_cut_off_within_a_step_alone(make_towers, make_accelerator):
    towers, accelerator = make_towers(), make_accelerator("no")
    table = towers.base.item_embeddings
    with looked_up_rows(towers, accelerator):
        assert table(torch.tensor([1])).is_leaf
        with torch.no_grad():
            assert not table(torch.tensor([1])).requires_grad
    with pytest.raises(IndexError), looked_up_rows(towers, accelerator):
        table(torch.tensor([len(table.weight)]))
    assert not table._forward_hooks
    table(torch.tensor([1])).sum().backward()
    assert table.weight.grad[1].eq(1).all()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_where_processes_share_a_gradient_it_is_made_by_autograd(make_towers, kind):
    towers = make_towers()
    with looked_up_rows(towers, SimpleNamespace(distributed_type=kind)):
        assert not towers.base.item_embeddings(torch.tensor([1])).is_leaf


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_of_a_sampled_softmax_stay_sparse(make_towers, make_accelerator, sampled):
    towers, accelerator = make_towers(), make_accelerator("no")
    choose_sparse_tables(towers, accelerator, sampled=sampled)
    with looked_up_rows(towers, accelerator):
        assert towers.base.item_embeddings(torch.tensor([1])).is_leaf is not sampled


def test_a_table_without_rows_is_left_alone(make_towers, make_accelerator):
    towers = make_towers()
    towers.base.user_embeddings = nn.Embedding(0, 8)
    choose_sparse_tables(towers, make_accelerator("no"))
    assert sparse_names(towers) == LOOKED_UP - {"user_embeddings"}


def test_what_is_frozen_has_no_sparse_gradients(make_towers, make_accelerator):
    towers = make_towers()
    for content in towers.base.tables("content"):
        content.requires_grad_(False)
    choose_sparse_tables(towers, make_accelerator("no"))
    assert sparse_names(towers) == {"user_embeddings"}


@pytest.mark.parametrize(("device", "names"), [("cpu", set()), ("cuda", LOOKED_UP)])
def test_in_float16_gradients_are_sparse_only_where_torch_adds_them_up(make_towers, device, names):
    towers = make_towers().to(torch.float16)
    choose_sparse_tables(towers, SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device(device)))
    assert sparse_names(towers) == names
    if device == "cpu":
        for _ in range(2):
            towers.base.user_embeddings(torch.tensor([1, 2])).sum().backward()
        assert towers.base.user_embeddings.weight.grad[1].tolist() == [2.0] * towers.base.config.hidden_size


@pytest.mark.parametrize(
    ("kind", "able"),
    [
        (DistributedType.FSDP, False),
        (DistributedType.MULTI_GPU, True),
        (DistributedType.MULTI_CPU, True),
        (DistributedType.DEEPSPEED, False),
    ],
)
def test_what_shards_gradients_gets_dense_ones(make_towers, kind, able):
    towers = make_towers()
    towers.base.user_embeddings.sparse = True  # left from a run of another kind
    choose_sparse_tables(towers, SimpleNamespace(distributed_type=kind, device=torch.device("cpu")))
    assert sparse_names(towers) == (LOOKED_UP if able else set())


def test_ddp_leaves_sparse_tables_alone(make_towers):
    towers = make_towers()
    several = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, device=torch.device("cpu"))
    tables = {id(table.weight) for table in choose_sparse_tables(towers, several)}
    left_alone = towers._ddp_params_and_buffers_to_ignore
    # As DDP looks: every parameter of every module, by the module's name.
    seen = {
        f"{path}.{name}": id(parameter)
        for path, module in towers.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    assert {seen[name] for name in left_alone} == tables
    assert {name for name, one in seen.items() if one in tables} == set(left_alone)


class OtherProcess:
    """An accelerator of two processes, of which the other one touched the given rows."""

    num_processes = 2

    def __init__(self, rows, values):
        self.theirs = [torch.tensor([*rows, -1]), torch.cat([values, torch.zeros(1, values.shape[1])])]

    def pad_across_processes(self, mine, pad_index=0):
        missing = max(len(self.theirs[0]) - len(mine), 0)
        return torch.cat([mine, mine.new_full((missing, *mine.shape[1:]), pad_index)])

    def gather(self, mine):
        theirs = self.theirs.pop(0)
        padding = theirs.new_full((len(mine) - len(theirs), *theirs.shape[1:]), 0 if theirs.ndim > 1 else -1)
        return torch.cat([mine, theirs, padding])


@pytest.mark.parametrize("mine", [[], [3], [1, 3, 3, 0]], ids=["none", "fewer", "more"])
def test_rows_of_all_processes_are_averaged(make_towers, make_accelerator, mine):
    towers = make_towers()
    choose_sparse_tables(towers, make_accelerator("no"))
    for name in LOOKED_UP - {"user_embeddings"}:
        getattr(towers.base, name).sparse = False
    table = towers.base.user_embeddings
    if mine:
        table(torch.tensor(mine)).sum().backward()
    theirs = torch.arange(2.0 * table.weight.shape[1]).view(2, -1) + 1
    expected = torch.zeros_like(table.weight).index_add_(0, torch.tensor([1, 2]), theirs)
    for row in mine:
        expected[row] += 1
    reduce_rows(towers, OtherProcess([1, 2], theirs))
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), expected / 2)


def test_one_process_keeps_its_gradient(make_towers, make_accelerator):
    towers = make_towers()
    accelerator = make_accelerator("no")
    (table, *_) = choose_sparse_tables(towers, accelerator)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.grad
    reduce_rows(towers, accelerator)
    assert table.weight.grad is before


@pytest.mark.parametrize("objective", ["content", "collaborative"])
def test_the_models_sparse_gradients_are_its_dense_ones(make_towers, make_accelerator, objective):
    towers, same = make_towers(), make_towers()
    choose_sparse_tables(towers, make_accelerator("no"))
    config = towers.base.config
    user, item = config.num_words, config.num_words + config.num_users
    ids = torch.tensor([[user + 2, 5, item + 1, item + 3]])
    labels = ids if objective == "collaborative" else torch.full_like(ids, 5)
    batch = {"input_ids": ids, "labels": labels.masked_fill(ids < item, -100) if labels is ids else labels}
    for each in (towers, same):
        losses = each.eval()(objective, batch, (torch.tensor([2]), torch.tensor([1, 4])))
        (losses["likelihood"] + losses["regularisation"]).backward()
    found = 0
    for name, parameter in towers.named_parameters():
        expected, gradient = same.get_parameter(name).grad, parameter.grad
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.to_dense() if gradient.is_sparse else gradient, expected)
            found += gradient.is_sparse
    assert found == (2 if objective == "content" else 1)
