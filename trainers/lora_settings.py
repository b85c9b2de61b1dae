"""Settings of LoRA adapters: plain dataclasses of the standard library, parsed before torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from trainers.checks_of_settings import check, unused
from treepo.base.typed import check_types

ALL_LINEAR = "all-linear"


@dataclass
class LoraSettings:
    """Low-rank adapters in place of full training: W + scale * B A with W frozen; see
    ``trainers/lora.py``.
    """

    rank: int = 0  # of B A; 0: no adapters, every weight is trained
    alpha: float = 32.0  # scale = alpha / rank
    use_rslora: bool = False  # scale = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)
    # names of the layers that get one, e.g. [q_proj, v_proj]; all-linear: all but the head
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    seed: int = 0  # of A's first values; B begins at 0, so that training starts at the model
    dropout: float = 0.0  # must be 0: a policy gradient compares probabilities of one function

    def __post_init__(self) -> None:
        check_types(self, "trainer.learner.lora.")
        check("lora.rank", self.rank, self.rank >= 0, ">= 0 (0: full training)")
        check("lora.alpha", self.alpha, 0 < self.alpha < math.inf, "> 0")
        check("lora.seed", self.seed, self.seed >= 0, ">= 0")
        check(
            "lora.dropout",
            self.dropout,
            self.dropout == 0,
            "0: with dropout every forward is another policy, and its ratio to the sampled "
            "probabilities is noise. Use a smaller rank or optimizer.weight_decay instead",
        )
        check(
            "lora.target_modules",
            self.target_modules,
            bool(self.target_modules) and all(self.target_modules),
            f"[{ALL_LINEAR}] or a list of names of linear layers, such as [q_proj, v_proj]",
        )
        check(
            "lora.target_modules",
            self.target_modules,
            ALL_LINEAR not in self.target_modules or len(self.target_modules) == 1,
            f"[{ALL_LINEAR}] alone, or names of layers alone",
        )
        if not self.is_on:
            self._refuse_unused()

    @property
    def is_on(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def _refuse_unused(self) -> None:
        for field_ in fields(self):
            name, value = field_.name, getattr(self, field_.name)
            if value not in (field_.default, [ALL_LINEAR]):
                mend = "set lora.rank (such as 32), or leave it out"
                raise unused(f"lora.{name}", value, "lora.rank=0", mend)
