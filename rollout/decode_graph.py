"""Decode steps with static buffers, captured as CUDA graphs.

While segments only grow, one step differs from the next in nothing but the tokens. Then the inputs
stay on the device: a step writes keys and values where the plan says, moves plan and positions one
token on, and takes the token ids that were drawn from its logits as the next input. The host
transfers something only when segments start, end or get more slots.

On a GPU a step is captured once for each bucket of rows and work, and replayed. Elsewhere the same
step runs operation by operation.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.attention.base import AttentionContext, LayerVariant, Plan
from rollout.attention.tree_plan import Capacity, DeviceWork, TreePlan
from rollout.attention.work_list import SpanTable, WorkList, work_list
from rollout.model_runner import ModelRunner

_LOG = logging.getLogger(__name__)
_BUCKET = 64  # above, numbers of rows are rounded up to its multiples; below, to powers of two


# In inference mode an operation may be seen as what it is made of or by its own name.
_WAITS = set(
    "_local_scalar_dense item is_nonzero equal nonzero nonzero_numpy argwhere masked_select "
    "unique _unique _unique2 unique_dim unique_consecutive bincount".split()
)


class HostWaits(TorchDispatchMode):
    """Looks for operations for which the host waits for the device: it reads a value, or the size
    of a result depends on values. A CUDA graph can contain none.

    Attributes:
        found: the first one's name and what called it; None if there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.found is None and _waits(name, func._overloadname, args):
            files = [frame.filename for frame in traceback.extract_stack()]
            callers = [f for f in files if "/torch/" not in f and f != __file__]
            self.found = f"{name} in {Path(callers[-1]).name}"
        return func(*args, **(kwargs or {}))


def _waits(name: str, overload: str, args: tuple) -> bool:
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":
        return overload != "self_int"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in _WAITS


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Content:
    """What a step's buffers are filled with; ``positions`` and ``token_ids`` are [N]."""

    table: SpanTable
    work: WorkList
    positions: np.ndarray
    token_ids: np.ndarray


class StaticStep:
    """The buffers of a bucket and the step over them; the plan of its own attention.

    Attributes:
        token_ids: int64 [rows], the tokens a step forwards.
    """

    def __init__(self, runner: ModelRunner, capacity: Capacity) -> None:
        self.runner = runner
        self.work = DeviceWork(capacity, runner.device)
        self.token_ids = torch.zeros(capacity.rows, dtype=torch.int64, device=runner.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    def load(self, content: _Content) -> None:
        """Fill the buffers; the transfers follow each other on the device's stream."""
        self.work.load(content.table, content.work, content.positions)
        ids = torch.from_numpy(content.token_ids.astype(np.int64))
        if self.token_ids.is_cuda:
            ids = ids.pin_memory()
        self.token_ids[: len(ids)].copy_(ids, non_blocking=True)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> torch.Tensor:
        """See ``rollout.attention.base.Plan``."""
        from rollout.attention import triton_tree

        return triton_tree.attend(query, keys, values, self.work.work, variant)

    def run(self) -> torch.Tensor:
        """Logits [rows, V] of the tokens in the buffers, which then stand one token on. The next
        run writes over them.
        """
        if self._graph is None:
            return self._step()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def try_out(self) -> str | None:
        """Run once, which compiles kernels; what it does for which the host waits, or None. The
        buffers have to be loaded again.
        """
        with HostWaits() as waits:
            self._step()
        return waits.found

    def capture(self, memory: Any) -> None:
        """Record the step, after it was tried out. The buffers have to be loaded again.

        Args:
            memory: of ``torch.cuda.graph_pool_handle``, shared with other steps, as one runs at a
                time.
        """
        graph = torch.cuda.CUDAGraph()
        # The outer context gives the stream back where recording fails. Other threads may use the
        # device meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"),
        ):
            self._logits = self._step()
        self._graph = graph

    def _step(self) -> torch.Tensor:
        runner, work = self.runner, self.work
        slots = work.last_slots(runner.pool.trash_slot)
        context = AttentionContext(runner.pool, self, slots, len(self.token_ids))
        logits = runner.run(self.token_ids, work.work.positions.long(), context)
        work.advance()
        return logits


@dataclass(kw_only=True, slots=True, eq=False)
class _Loaded:
    """What the buffers hold: ``plan`` as it was after ``num_changes`` changes and ``num_steps``
    advances.
    """

    step: StaticStep
    plan: TreePlan
    num_changes: int
    num_steps: int

    def is_of(self, plan: TreePlan) -> bool:
        state = self.num_changes, self.num_steps
        return plan is self.plan and state == (plan.num_changes, plan.num_steps)


class DecodeSteps:
    """Steps by bucket.

    Args:
        captures: record them as CUDA graphs.

    Attributes:
        why_not: why this model's steps cannot be captured; None if they can as far as is known.
    """

    def __init__(self, runner: ModelRunner, *, captures: bool) -> None:
        self.runner = runner
        self.why_not: str | None = None
        self._captures = captures
        self._groups: int | None = None  # query heads of a KV head
        self._steps: dict[tuple[int, ...], StaticStep] = {}
        self._memory: Any = None  # of ``torch.cuda.graph_pool_handle``, for all steps
        self._keys: torch.Tensor | None = None  # the pool's, to see that they are still the same
        self._loaded: _Loaded | None = None

    def run(self, plan: Plan, token_ids: np.ndarray) -> torch.Tensor | None:
        """Logits [N, V] of rows that are the last tokens of open nodes, or None if they have to be
        computed in the plain way: the model cannot be captured, or this is its first step.

        Args:
            token_ids: [N]; not read where ``feed`` has been given them.
        """
        if not isinstance(plan, TreePlan) or not self._knows(plan):
            self._loaded = None
            return None
        if self._loaded is None or not self._loaded.is_of(plan):
            self._loaded = self._load(plan, token_ids)
            if self._loaded is None:
                return None
        self._loaded.num_steps += 1
        return self._loaded.step.run()[: len(token_ids)]

    def feed(self, token_ids: torch.Tensor) -> None:
        """The tokens (int64 [N], on the device) that were drawn from the last step's logits."""
        if self._loaded is not None:
            self._loaded.step.token_ids[: len(token_ids)].copy_(token_ids)

    def release_memory(self) -> None:
        """Drop all steps with their graphs."""
        self._steps.clear()
        self._keys = self._loaded = self._memory = None

    def _knows(self, plan: TreePlan) -> bool:
        """Whether steps can be made: how many query heads share a KV head is seen in a first, plain
        forward.
        """
        if self._groups is None and len(plan.groups) > 1:
            self._give_up("its layers differ in their numbers of heads")
        if self._groups is None and len(plan.groups) == 1:
            self._groups = plan.groups[0]
        return self.why_not is None and self._groups is not None

    def _load(self, plan: TreePlan, token_ids: np.ndarray) -> _Loaded | None:
        """The step of the plan's bucket, loaded; None if it cannot be captured."""
        assert self._groups is not None
        plan.release()
        table, positions = plan.table, plan.positions
        work = work_list(table, positions, self._groups)
        content = _Content(table=table, work=work, positions=positions, token_ids=token_ids)
        needed = Capacity.of(table, work)
        num_slots = self.runner.pool.num_slots
        capacity = needed.rounded(_bucket(needed.rows), self._groups, num_slots)
        assert capacity.holds(needed), (capacity, needed)
        step = self._find(capacity, content)
        if step is None:
            return None
        step.load(content)
        return _Loaded(step=step, plan=plan, num_changes=plan.num_changes, num_steps=plan.num_steps)

    def _find(self, capacity: Capacity, content: _Content) -> StaticStep | None:
        keys = next(iter(self.runner.pool.keys.values()))
        if keys is not self._keys:  # the pool's memory was given up: graphs point into the old one
            self._steps.clear()
            self._keys = keys
        key = astuple(capacity)
        if key not in self._steps:
            step = StaticStep(self.runner, capacity)
            if self._captures and not self._capture(step, content):
                return None
            self._steps[key] = step
        return self._steps[key]

    def _capture(self, step: StaticStep, content: _Content) -> bool:
        with torch.cuda.device(self.runner.device):
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            step.load(content)
            wait = step.try_out()
            if wait is not None:
                self._give_up(f"the host has to wait for {wait}")
                return False
            step.load(content)
            try:
                step.capture(self._memory)
            except RuntimeError as error:  # whatever else cannot be recorded
                self._give_up(str(error).partition("\n")[0])
                return False
        return True

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        name = type(self.runner.model).__name__
        _LOG.warning("%s decodes without CUDA graphs: %s", name, reason)


def _bucket(num_rows: int) -> int:
    if num_rows > _BUCKET:
        return -(-num_rows // _BUCKET) * _BUCKET
    return max(8, 1 << (num_rows - 1).bit_length())
