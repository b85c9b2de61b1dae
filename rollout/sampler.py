"""Logits to tokens by the inverse of the cumulative distribution.

One uniform a draw, named by (path key, position, purpose), walks the cumulative probabilities in
order of token id. Probabilities are float64, cumulative ones exact integers
(``rollout.fixed_point``): a draw depends neither on the company it is made in nor on the device.

Nothing here waits for the device: what the host knows of a batch stands in Python values of
``SamplingParams``, and whether the logits were finite is part of the result. With fixed shapes and
the same Python values every operation can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rollout.fixed_point import BIAS, biased_weights, inverse_cdf
from rollout.penalties import Repetition, ban
from rollout.truncation import Truncation, truncate
from treepo.base.keys import Purpose, uniforms

# Elements of one piece of work: on a CPU what its cache holds, on a GPU what memory can spare.
_PIECE = {"cpu": 1 << 19, "cuda": 1 << 25}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingParams:
    """How a batch of rows is drawn; see ``rollout.extend.ExtendSpec``.

    Each part is done for all rows if it is there at all; a row that does not want it has a value
    that changes nothing, and pays the time.

    Attributes:
        temperature: float64 [N], 0 is greedy.
        is_scaled: whether a temperature is neither 0 nor 1.
        greedy: which rows are: "none", "some" or "all".
        truncation: top-p, top-k and min-p.
        banned: int64 [N, K], see ``rollout.penalties.ban``.
        repetition: the repetition penalty; drawing adds the token to its path.
        num_top_logprobs: how many of the likeliest tokens are reported.
        wants_entropy: whether the entropy is reported.
    """

    temperature: torch.Tensor
    is_scaled: bool = True
    greedy: str = "some"
    truncation: Truncation | None = None
    banned: torch.Tensor | None = None
    repetition: Repetition | None = None
    num_top_logprobs: int = 0
    wants_entropy: bool = False

    def rows(self, rows: slice) -> SamplingParams:
        """The same for some of the rows."""
        return SamplingParams(
            temperature=self.temperature[rows],
            is_scaled=self.is_scaled,
            greedy=self.greedy,
            truncation=self.truncation and self.truncation.rows(rows),
            banned=None if self.banned is None else self.banned[rows],
            repetition=self.repetition and self.repetition.rows(rows),
            num_top_logprobs=self.num_top_logprobs,
            wants_entropy=self.wants_entropy,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """Rows that need the same.

    Attributes:
        rows: int64 [n], which of the batch's rows; None: all.
    """

    params: SamplingParams
    rows: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingPlan:
    """A batch in groups, so that no row pays for what another needs.

    Attributes:
        order: int64 [N], where each row of the batch stands among the groups' rows, one group after
            the other; None for one group.
    """

    groups: tuple[Group, ...]
    order: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draws:
    """One drawn token a row, on the logits' device.

    Attributes:
        token_ids: int64 [N].
        logprobs, sampling_logprobs: float32 [N], as in ``rollout.extend.ExtendResult``.
        is_finite: bool [N], False where the logits are broken or all tokens banned; the rest of
            such a row means nothing.
        entropy: float32 [N], in nats, of softmax(logits / temperature); None if not asked for.
        top_token_ids: int64 [N, n], the likeliest tokens, likeliest first; None if not asked for.
        top_logprobs: float32 [N, n], theirs.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor
    is_finite: torch.Tensor
    entropy: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def to_host(self) -> HostDraws:
        """Numpy arrays of the same, in one transfer."""
        if self.token_ids.device.type != "cpu":
            return self.unpack(self.pack().cpu().numpy())
        arrays: list[Any] = [None if t is None else t.numpy() for t in self._parts()]
        return HostDraws(*arrays)

    def unpack(self, packed: np.ndarray) -> HostDraws:
        """What ``pack`` gave, apart again."""
        widths = [0 if t is None else 1 if t.dim() == 1 else t.shape[1] for t in self._parts()]
        columns = np.split(packed, np.cumsum(widths)[:-1], axis=1)
        parts = zip(self._parts(), columns, strict=True)
        arrays: list[Any] = [None if t is None else _unpacked(c, t) for t, c in parts]
        return HostDraws(*arrays)

    def pack(self) -> torch.Tensor:
        """int32 [N, C]: all of it, floats by their bits."""
        columns = [t if t.dim() == 2 else t.unsqueeze(1) for t in self._parts() if t is not None]
        return torch.cat(
            [c.view(torch.int32) if c.is_floating_point() else c.int() for c in columns], dim=1
        )

    def _parts(self) -> tuple[Any, ...]:
        return (
            self.token_ids,
            self.logprobs,
            self.sampling_logprobs,
            self.is_finite,
            self.entropy,
            self.top_token_ids,
            self.top_logprobs,
        )


class Workspace:
    """Memory that draws write over. A CPU spends more on fresh pages than on what is written in
    them, so a caller that draws again and again keeps one. Not for a GPU, whose allocator keeps
    memory itself.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(2, 0, dtype=torch.float64)
        self._pair = self._memory[0], self._memory[1]

    def pair(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of float64 [N, V], not initialised, for ``like`` [N, V]."""
        if like.device.type != "cpu":
            first = torch.empty_like(like, dtype=torch.float64)
            return first, torch.empty_like(first)
        if self._pair[0].shape != like.shape:
            if self._memory.shape[1] < like.numel():
                self._memory = torch.empty(2, like.numel(), dtype=torch.float64)
            both = self._memory[:, : like.numel()].unflatten(1, like.shape)
            self._pair = both[0], both[1]
        return self._pair


@dataclass(frozen=True, slots=True, eq=False)
class HostDraws:
    """``Draws`` as numpy arrays."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    is_finite: np.ndarray
    entropy: np.ndarray | None
    top_token_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


def sample(
    logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, positions: torch.Tensor
) -> Draws:
    """Draw one token a row.

    Args:
        logits: [N, V], any float dtype.
        keys, positions: int64 [N], see ``treepo.base.keys.uniforms``.
    """
    return sample_at(logits, params, uniforms(keys, positions, Purpose.TOKEN))


def sample_at(
    logits: torch.Tensor,
    params: SamplingParams,
    uniform: torch.Tensor,
    workspace: Workspace | None = None,
) -> Draws:
    """``sample`` with the uniforms (float64 [N] in (0, 1)) at hand."""
    workspace = workspace or Workspace()
    num_rows, vocabulary = logits.shape
    step = max(1, _PIECE.get(logits.device.type, 1 << 25) // vocabulary)
    if num_rows <= step:
        return _sample(logits, params, uniform, workspace)
    pieces = [slice(lo, lo + step) for lo in range(0, num_rows, step)]
    return _join(
        [_sample(logits[rows], params.rows(rows), uniform[rows], workspace) for rows in pieces]
    )


def sample_plan(
    logits: torch.Tensor, plan: SamplingPlan, uniform: torch.Tensor, workspace: Workspace
) -> Draws:
    """``sample_at`` where rows need different things: each group by itself."""
    if plan.order is None:
        return sample_at(logits, plan.groups[0].params, uniform, workspace)
    parts = [
        sample_at(logits[group.rows], group.params, uniform[group.rows], workspace)
        for group in plan.groups
    ]
    return _join(parts, plan.order)


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """float32 [N]: log-probs of ``token_ids`` under softmax(logits / temperature) (softmax(logits)
    at 0), computed in float64 as the sampler does.
    """
    scaled = logits.to(torch.float64) / (temperature or 1.0)
    chosen = scaled.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return (chosen - torch.logsumexp(scaled, dim=1)).to(torch.float32)


def _sample(
    logits: torch.Tensor, params: SamplingParams, uniform: torch.Tensor, workspace: Workspace
) -> Draws:
    exact, probs = workspace.pair(logits)
    exact.copy_(logits)
    sampled = probs
    if params.banned is not None or params.repetition is not None:
        changed = exact
        if params.banned is not None:
            changed = ban(changed, params.banned)
        if params.repetition is not None:
            changed = params.repetition.apply(changed)
        sampled = _softmax(changed, params, out=torch.empty_like(probs))
    _softmax(exact, params, out=probs)
    token_ids, behaviour = _draw(sampled, params, uniform, spare=exact)
    if params.repetition is not None:
        params.repetition.note(token_ids)
    logprobs = torch.log(_at(probs, token_ids)).float()
    # One value that is not finite makes its whole row NaN, which does not equal itself.
    is_finite = logprobs == logprobs
    changed_logprobs = logprobs
    if sampled is not probs:
        changed_logprobs = torch.log(_at(sampled, token_ids)).float()
        is_finite &= changed_logprobs == changed_logprobs
    if behaviour is None:
        behaviour = changed_logprobs
    if params.greedy != "none":
        behaviour = torch.where(params.temperature == 0, 0.0, behaviour)
    top = torch.topk(probs, params.num_top_logprobs, dim=1) if params.num_top_logprobs else None
    return Draws(
        token_ids=token_ids,
        logprobs=logprobs,
        sampling_logprobs=behaviour,
        is_finite=is_finite,
        entropy=torch.special.entr(probs).sum(1).float() if params.wants_entropy else None,
        top_token_ids=None if top is None else top.indices,
        top_logprobs=None if top is None else torch.log(top.values).float(),
    )


def _softmax(logits: torch.Tensor, params: SamplingParams, *, out: torch.Tensor) -> torch.Tensor:
    """softmax(logits / temperature), softmax(logits) where greedy; all float64 [N, V]. ``logits``
    are scaled in place.
    """
    if params.is_scaled:
        factor = torch.where(params.temperature == 0, 1.0, 1 / params.temperature)
        logits.mul_(factor.unsqueeze(1))
    return torch.softmax(logits, dim=1, out=out)


def _draw(
    probs: torch.Tensor, params: SamplingParams, uniform: torch.Tensor, *, spare: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids, int64 [N], and their log-probs after truncation, float32 [N] (None without).

    Args:
        spare: float64 [N, V], memory that may be overwritten.
    """
    if params.greedy == "all":
        return torch.argmax(probs, dim=1), None
    weights = biased_weights(probs, out=spare)
    behaviour = None
    if params.truncation is None:
        token_ids = inverse_cdf(weights, uniform, bias=BIAS)
    else:
        kept, kept_ids = truncate(weights - BIAS, params.truncation)
        column = inverse_cdf(kept, uniform)
        token_ids = column if kept_ids is None else _at(kept_ids, column)
        behaviour = torch.log(_at(kept, column).double() / kept.sum(1)).float()
    if params.greedy == "some":
        token_ids = torch.where(params.temperature == 0, torch.argmax(probs, dim=1), token_ids)
    return token_ids, behaviour


def _at(table: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[N]: one column of each row."""
    return table.gather(1, columns.unsqueeze(1)).squeeze(1)


def _join(parts: Sequence[Draws], order: torch.Tensor | None = None) -> Draws:
    """The rows of all parts, one part after the other, then in ``order``. What a part does not
    report is NaN, or 0 for token ids.
    """
    counts = [len(p.token_ids) for p in parts]
    joined = [_cat(tensors, counts) for tensors in zip(*(p._parts() for p in parts), strict=True)]
    if order is not None:
        joined = [None if tensor is None else tensor[order] for tensor in joined]
    token_ids, logprobs, sampling_logprobs, is_finite, entropy, top_token_ids, top_logprobs = joined
    assert token_ids is not None and logprobs is not None
    assert sampling_logprobs is not None and is_finite is not None
    return Draws(
        token_ids=token_ids,
        logprobs=logprobs,
        sampling_logprobs=sampling_logprobs,
        is_finite=is_finite,
        entropy=entropy,
        top_token_ids=top_token_ids,
        top_logprobs=top_logprobs,
    )


def _cat(tensors: Sequence[torch.Tensor | None], counts: Sequence[int]) -> torch.Tensor | None:
    present = [t for t in tensors if t is not None]
    if not present:
        return None
    shape = max(t.shape[1:] for t in present)
    if len(present) == len(tensors) and all(t.shape[1:] == shape for t in present):
        return torch.cat(present)
    filler = torch.nan if present[0].is_floating_point() else 0
    whole = present[0].new_full((sum(counts), *shape), filler)
    for tensor, lo in zip(tensors, [sum(counts[:i]) for i in range(len(counts))], strict=True):
        if tensor is not None:
            rows = whole[lo : lo + len(tensor)]
            (rows[:, : tensor.shape[1]] if tensor.dim() == 2 else rows).copy_(tensor)
    return whole


def _unpacked(column: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
    """A part of the packed array in the form of ``tensor``."""
    column = np.ascontiguousarray(column)
    if tensor.is_floating_point():
        column = column.view(np.float32)
    elif tensor.dtype == torch.bool:
        column = column.astype(bool)
    else:
        column = column.astype(np.int64)
    return column if tensor.dim() == 2 else column[:, 0]
