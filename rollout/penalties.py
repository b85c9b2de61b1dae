"""What changes logits before they are sampled: banned tokens, then the repetition penalty.

The penalty (Keskar et al. 2019, "CTRL", section 4.1, as in transformers'
``RepetitionPenaltyLogitsProcessor``) is for every token that stands anywhere in the path, prompt
included: a positive logit is divided by it, a negative one multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Repetition:
    """Penalty of each row and the tokens of its path.

    Attributes:
        penalty: float64 [N], 1 changes nothing.
        seen: bool [P, V], one row for each path: the tokens in it.
        paths: int64 [N], row of ``seen`` of each row.
    """

    penalty: torch.Tensor
    seen: torch.Tensor
    paths: torch.Tensor

    def rows(self, rows: slice) -> Repetition:
        """The same for some of the rows."""
        return Repetition(penalty=self.penalty[rows], seen=self.seen, paths=self.paths[rows])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` [N, V] with the penalty."""
        penalty = self.penalty.unsqueeze(1)
        changed = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self.seen.index_select(0, self.paths), changed, logits)

    def note(self, token_ids: torch.Tensor) -> None:
        """Add a drawn token (int64 [N]) to each row's path."""
        self.seen[self.paths, token_ids] = True


def ban(logits: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """``logits`` [N, V] with -inf at each row's banned tokens.

    Args:
        banned: int64 [N, K], filled up with ``NO_TOKEN``.
    """
    floor = torch.where(banned == NO_TOKEN, torch.inf, -torch.inf).to(logits.dtype)
    return logits.scatter_reduce(1, banned.clamp(min=0), floor, reduce="amin")
