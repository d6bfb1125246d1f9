"""AdamW that steps only the rows of an ID table that a batch touched: time and memory follow the batch, not the catalogue.

Here too: which tables get gradients of rows alone, their sum over processes, rows that are added to the gradient of a head, and
clipping over sparse gradients and ordinary ones.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import ParamsT

from training.stages.towers import Towers


@dataclass
class RowMoments:
    """Adam's state of the rows of one table that a gradient has touched so far.

    Attributes:
        slots: `(rows,)` int32, where a row's moments stand; -1: untouched.
        exp_avg: `(capacity, ...)` in the parameter's dtype, first moments; only the first `used` mean something.
        exp_avg_sq: `(capacity, ...)`, second moments.
        steps: `(capacity,)` int32, how often each row was touched.
        used: How many rows were touched so far.
    """

    slots: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    steps: torch.Tensor
    used: int = 0

    @classmethod
    def of(cls, table: torch.Tensor) -> "RowMoments":
        """The state of a table that nothing has touched."""
        slots = torch.full(table.shape[:1], -1, dtype=torch.int32, device=table.device)
        nothing = torch.empty_like(table[:0])
        return cls(slots, nothing, nothing, torch.empty(0, dtype=torch.int32, device=table.device))

    def find(self, rows: torch.Tensor) -> torch.Tensor:
        """Slots `(touched,)` int64 of distinct rows `(touched,)`; those seen for the first time get one with zero moments."""
        slots = self.slots[rows]
        fresh = rows[slots < 0]
        if len(fresh):
            first, self.used = self.used, self.used + len(fresh)
            if self.used > len(self.steps):
                self.grow(min(max(self.used, 2 * len(self.steps)), len(self.slots)))
            self.slots[fresh] = torch.arange(first, self.used, dtype=torch.int32, device=rows.device)
            for state in (self.exp_avg, self.exp_avg_sq, self.steps):
                state[first : self.used].zero_()
            slots = self.slots[rows]
        return slots.long()

    def grow(self, capacity: int) -> None:
        """Make room for so many rows; what is not used yet stays unwritten, which on the CPU takes no memory."""
        for name in ("exp_avg", "exp_avg_sq", "steps"):
            state = getattr(self, name)
            larger = state.new_empty(capacity, *state.shape[1:])
            larger[: len(state)] = state
            setattr(self, name, larger)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, for touched rows only: `rows` `(used,)` int64 in the order of their slots, moments, steps."""
        touched = torch.nonzero(self.slots >= 0).squeeze(1)
        rows = torch.empty_like(touched)
        rows[self.slots[touched].long()] = touched
        states = {name: getattr(self, name) for name in ("exp_avg", "exp_avg_sq", "steps")}
        if self.used < len(self.steps):
            # Copies, since a view is saved with all that it is a view of.
            states = {name: state[: self.used].clone() for name, state in states.items()}
        return {"rows": rows} | states

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], table: torch.Tensor) -> "RowMoments":
        """The state that was saved, bit by bit, on the table's device."""
        made, rows = cls.of(table), state["rows"].to(table.device)
        made.slots[rows] = torch.arange(len(rows), dtype=torch.int32, device=table.device)
        made.used = len(rows)
        for name in ("exp_avg", "exp_avg_sq", "steps"):
            setattr(made, name, state[name].to(table.device, copy=True))
        return made


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW whose tables with sparse gradients have moments of touched rows only; all else is torch's own, fused.

    A step with T touched rows of a table `(rows, width)` takes time and memory in T·width, where dense gradients take rows·width;
    what follows the table is its map of slots, 4 bytes a row (`python benchmarks/parts.py` prints what that buys). Each row is an Adam of its own: its bias correction counts its own
    steps, and a row that a step does not touch neither moves nor decays.

    A table keeps to the kind of gradient it got first: a later one of the other kind is turned into it.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, on touched rows only where gradients are sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        # fp16: the scaler unscales all gradients before the step and leaves it out on overflow, as for an optimiser that is not fused.
        self._step_supports_amp_scaling = False
        self.moments: dict[torch.Tensor, RowMoments] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; sparse gradients are gone after it, whatever `zero_grad` would do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or not (gradient.is_sparse or parameter in self.moments):
                    continue
                if self.state.get(parameter):
                    parameter.grad = gradient.to_dense()
                    continue
                self.step_rows(parameter, *nonzero_rows(gradient), group)
                parameter.grad = None
        super().step()
        return loss

    def step_rows(
        self, parameter: torch.Tensor, rows: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]
    ) -> None:
        """Step `rows` `(touched,)`, all distinct, of a parameter by their gradients `(touched, ...)`."""
        if parameter not in self.moments:
            self.moments[parameter] = RowMoments.of(parameter)
        state, (beta1, beta2), lr = self.moments[parameter], group["betas"], float(group["lr"])
        slots = state.find(rows)
        precise = torch.promote_types(parameter.dtype, torch.float32)
        gradient = gradient.to(precise)
        steps = state.steps[slots] + 1
        exp_avg = state.exp_avg[slots].to(precise).lerp_(gradient, 1 - beta1)
        exp_avg_sq = state.exp_avg_sq[slots].to(precise).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for kept, new in ((state.steps, steps), (state.exp_avg, exp_avg), (state.exp_avg_sq, exp_avg_sq)):
            kept.index_copy_(0, slots, new.to(kept.dtype))
        # (touched, 1, …), to go with the rows.
        count = steps.double().reshape(-1, *[1] * (gradient.ndim - 1))
        step_size = (lr / (1 - beta1**count)).to(precise)
        root = (1 - beta2**count).sqrt().to(precise)
        values = parameter[rows].to(precise).mul_(1 - lr * group["weight_decay"])
        values -= step_size * exp_avg / exp_avg_sq.sqrt_().div_(root).add_(group["eps"])
        parameter.index_copy_(0, rows, values.to(parameter.dtype))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `rows`: the moments of touched rows by the parameter's number."""
        moments = {
            number: self.moments[parameter].state_dict()
            for number, parameter in enumerate(self.parameters())
            if parameter in self.moments
        }
        return super().state_dict() | ({"rows": moments} if moments else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over, on the parameters' devices."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "rows"})
        # Past torch's own way of loading, which would make the parameter's dtype of every tensor, integers included.
        parameters, moments = list(self.parameters()), state_dict.get("rows", {})
        self.moments = {
            parameters[number]: RowMoments.from_state_dict(state, parameters[number])
            for number, state in moments.items()
        }

    def parameters(self) -> Iterable[torch.Tensor]:
        """All parameters, in the order that a state dict numbers them."""
        return (parameter for group in self.param_groups for parameter in group["params"])


def nonzero_rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows `(touched,)` int64 of a gradient that are not all zeros, and what stands there `(touched, ...)`.

    Masked positions look row 0 up and give it a zero gradient, which must not count as a step of that row.
    """
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    else:
        rows, values = torch.arange(len(gradient), device=gradient.device), gradient
    touched = values.flatten(1).any(1) if values.ndim > 1 else values != 0
    return rows[touched], values[touched]


def choose_sparse_tables(towers: Towers, accelerator: Accelerator, *, sampled: bool = False) -> list[nn.Embedding]:
    """Let those ID tables have sparse gradients that are only ever looked up; to be called before `accelerator.prepare`.

    DDP leaves them alone, [`reduce_rows`] does not: of torch's backends gloo alone reduces sparse gradients, and not reliably. On a
    CPU torch does not add up sparse gradients in float16, so that tables in it keep dense ones.

    Args:
        towers: Their tables' `sparse` is set.
        accelerator: FSDP2 shards dense gradients alone.
        sampled: Whether the item head draws its negatives, so that the item table is only looked up as well.

    Returns:
        The tables whose gradients will be sparse.
    """
    alone = accelerator.distributed_type == DistributedType.NO
    by_ddp = accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    able = (alone or by_ddp) and accelerator.device.type in ("cpu", "cuda")
    tables = {name: module for name, module in towers.base.named_children() if name.endswith("_embeddings")}
    for name, table in tables.items():
        if isinstance(table, nn.Embedding):
            looked_up = name != "item_embeddings" or sampled
            addable = accelerator.device.type != "cpu" or table.weight.dtype != torch.float16
            table.sparse = able and addable and looked_up and table.weight.requires_grad and len(table.weight) > 0
    chosen = sparse_tables(towers)
    if chosen and by_ddp:
        ids = {id(table) for table in chosen}
        names = [f"{name}.weight" for name, module in towers.named_modules() if id(module) in ids]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(towers, names)
    return chosen


def sparse_tables(towers: Towers) -> list[nn.Embedding]:
    """The ID tables whose gradients are sparse."""
    return [table for table in towers.base.children() if isinstance(table, nn.Embedding) and table.sparse]


@contextmanager
def looked_up_rows(towers: Towers, accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Cut look-ups of the item table off from it, where its head makes its gradient dense and one process has it all.

    Autograd itself makes a table of zeros for each look-up and adds it to the head's gradient: the memory of a whole table for some
    hundred rows. `python benchmarks/memory.py` prints what is left, `python benchmarks/parts.py` what it is in time. (DDP sends a dense gradient as soon as the backward pass has
    made it, and FSDP2 shards it.)

    Args:
        towers: In a step.
        accelerator: Of the step.

    Returns:
        What is to be called after each backward pass: it adds the gradients of the rows to the table's.
    """
    table = towers.base.item_embeddings
    alone = accelerator.distributed_type == DistributedType.NO
    looked_up: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(table: nn.Module, inputs: tuple[torch.Tensor], rows: torch.Tensor) -> torch.Tensor | None:
        if not rows.requires_grad:
            return None
        leaf = rows.detach().requires_grad_()
        looked_up.append((inputs[0], leaf))
        return leaf

    @torch.no_grad()
    def add() -> None:
        weight = table.weight
        given = [(rows.flatten(), leaf.grad.flatten(0, -2)) for rows, leaf in looked_up if leaf.grad is not None]
        looked_up.clear()
        if not given:
            return
        if weight.grad is None:  # no head had a part in it
            weight.grad = torch.zeros_like(weight)
        rows, values = (torch.cat(parts) for parts in zip(*given, strict=True))
        # Each row once: the same sum in the same order on every device, and not in half precision.
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        rows, values = nonzero_rows(torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=False))
        weight.grad.index_add_(0, rows, values.to(weight.dtype))

    handle = None
    if alone and not table.sparse and table.weight.requires_grad and table.weight.device.type in ("cpu", "cuda"):
        handle = table.register_forward_hook(cut)
    try:
        yield add
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def reduce_rows(towers: Towers, accelerator: Accelerator) -> None:
    """Average the sparse gradients of ID tables over processes, as DDP does with the others: each sends the rows it touched.

    Args:
        towers: After the backward pass.
        accelerator: Gathers the rows, by whatever backend its processes talk.
    """
    processes = accelerator.num_processes
    if processes == 1:
        return
    for table in sparse_tables(towers):
        weight = table.weight
        gradient = weight.new_empty(0, *weight.shape[1:]) if weight.grad is None else weight.grad
        rows, values = nonzero_rows(gradient)
        # The row -1 at the end is nobody's: it lets a process without a row send one.
        rows, values = (
            torch.cat([rows, rows.new_full((1,), -1)]),
            torch.cat([values, values.new_zeros(1, *values.shape[1:])]),
        )
        rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=-1))
        values = accelerator.gather(accelerator.pad_across_processes(values))
        theirs = rows >= 0
        weight.grad = torch.sparse_coo_tensor(
            rows[theirs][None], values[theirs] / processes, weight.shape, check_invariants=True
        )


def clip_gradients(accelerator: Accelerator, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients down to a norm, dense and sparse ones as one vector, in place.

    Args:
        accelerator: Its own clipping is used where no gradient is sparse (FSDP2's are shards).
        parameters: Whose gradients; those without are left out.
        max_norm: The largest norm.

    Returns:
        The norm before, a scalar.
    """
    parameters = list(parameters)
    sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    if not sparse:
        return accelerator.clip_grad_norm_(parameters, max_norm)
    accelerator.unscale_gradients()
    for parameter in sparse:
        # A row that was looked up twice counts by the sum of its gradients.
        parameter.grad = parameter.grad.coalesce()  # type: ignore[union-attr]
    gradients = [p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share.to(gradient.device))
    return norm
