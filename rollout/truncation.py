"""Top-k, top-p and min-p on integer weights.

Truncation keeps a set of tokens: first the ``top_k`` likeliest, then of these the smallest set of
likeliest whose renormalised probability reaches ``top_p``, then those at least ``min_p`` times as
likely as the likeliest. Ties go to the lower token id, so the set is unique; weights are integers,
so it is the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Truncation:
    """Settings of each row, all [N]; see ``rollout.extend.ExtendSpec``.

    Attributes:
        top_p, min_p: float64; 1 and 0 keep all.
        top_k: int64, 0 keeps all.
        max_top_k: the largest of ``top_k`` (or more), known on the host.
    """

    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    max_top_k: int

    def rows(self, rows: slice) -> Truncation:
        """The same for some of the rows."""
        return Truncation(
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            min_p=self.min_p[rows],
            max_top_k=self.max_top_k,
        )


def truncate(
    weights: torch.Tensor, settings: Truncation
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights with the tokens outside the kept set at 0.

    Args:
        weights: int64 [N, V], >= 0, a row's sum below 2^53.

    Returns:
        int64 [N, K] weights and the token id of each; K is V and the ids are None unless the
        device lets the host look at results for free: there K is as large as is needed. Ids ascend
        in a row; columns that are not needed have weight 0.
    """
    top_k = torch.where(settings.top_k == 0, weights.shape[1], settings.top_k).unsqueeze(1)
    whole, least = _whole_and_least(weights, top_k, settings.max_top_k)
    token_ids = None
    if weights.device.type == "cpu":
        weights, token_ids = _candidates(weights, settings, whole, least)
    ranked, order = torch.sort(weights, dim=1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    ranked.masked_fill_(rank >= top_k, 0)
    before = ranked.cumsum(1) - ranked
    top_p, min_p = settings.top_p.unsqueeze(1), settings.min_p.unsqueeze(1)
    # A token stays while the ones before it do not reach top_p.
    keep = (top_p >= 1) | (before < top_p * whole)
    keep &= ranked >= min_p * ranked[:, :1]
    return torch.zeros_like(weights).scatter_(1, order, ranked.masked_fill_(~keep, 0)), token_ids


def _whole_and_least(
    weights: torch.Tensor, top_k: torch.Tensor, max_top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [N, 1] each: what the ``top_k`` likeliest weigh together, and the least of them."""
    whole = weights.sum(1, keepdim=True)
    max_top_k = min(max_top_k, weights.shape[1])
    if not max_top_k:
        return whole, torch.zeros_like(whole)
    largest = torch.topk(weights, max_top_k, dim=1).values
    place = (top_k - 1).clamp(max=max_top_k - 1)
    limited = top_k <= max_top_k
    return (
        torch.where(limited, largest.cumsum(1).gather(1, place), whole),
        torch.where(limited, largest.gather(1, place), 0),
    )


def _candidates(
    weights: torch.Tensor, settings: Truncation, whole: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Only the tokens that can be kept, so that few need sorting."""
    peak = weights.amax(1, keepdim=True)
    bound = torch.maximum(least, (settings.min_p.unsqueeze(1) * peak).ceil().long()).clamp_(min=1)
    if (settings.top_p < 1).any():
        nucleus = _nucleus_bound(weights, settings.top_p.unsqueeze(1) * whole)
        bound = torch.maximum(bound, nucleus)
    is_candidate = weights >= bound
    rows, columns = is_candidate.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(weights))
    widest = int(counts.max())
    if 2 * widest > weights.shape[1]:
        return weights, None
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    token_ids = torch.zeros(len(weights), widest, dtype=torch.int64)
    token_ids[rows, place] = columns
    chosen = torch.zeros_like(token_ids)
    chosen[rows, place] = weights[rows, columns]
    return chosen, token_ids


def _nucleus_bound(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """int64 [N, 1]: the largest power of two such that the tokens of at least this weight have
    ``wanted`` [N, 1] together; 1 where no tokens have.
    """
    exact = weights.double()
    exponent = exact.view(torch.int64) >> 52  # 1023 for weight 1, 0 for weight 0
    rows = torch.arange(len(weights)).unsqueeze(1) << 11
    masses = torch.bincount(
        (exponent + rows).flatten(), weights=exact.flatten(), minlength=len(weights) << 11
    )
    masses = masses.unflatten(0, (-1, 1 << 11))[:, 1023:1076]
    at_least = masses.flip(1).cumsum(1).flip(1)
    power = (at_least >= wanted).sum(1, keepdim=True) - 1
    return torch.ones_like(power) << power.clamp_(min=0)
