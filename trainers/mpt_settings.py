"""Settings of MPT masking: a plain dataclass of the standard library, parsed before torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainers.checks_of_settings import check, one_of, unused
from treepo.base.typed import check_types

GATES = ("never", "response", "batch", "always")
POLICIES = ("current", "old")


@dataclass
class MPTSettings:
    """UloRL's dynamic masking of well-mastered positive tokens (arXiv 2507.19766): tokens of a
    positive response that the policy draws almost surely are left out of the policy loss while
    entropy is low, so that it does not fall further.
    """

    # when they are masked: never | response (its mean entropy is below max_entropy) | batch (that
    # of the whole update is; one more forward of every row) | always
    gate: str = "never"
    min_prob: float = 0.99  # tau: a token of at least this probability is well mastered
    max_entropy: float = 0.2  # sigma, nats a token
    min_reward: float = 1.0  # a response with at least this reward is positive
    policy: str = "current"  # whose probability: current (being trained) | old (of the ratio)
    masked_in_denominator: bool = True  # whether masked tokens count in what the loss is divided by

    def __post_init__(self) -> None:
        check_types(self, "trainer.learner.mpt.")
        one_of("mpt.gate", self.gate, GATES)
        one_of("mpt.policy", self.policy, POLICIES)
        check("mpt.min_prob", self.min_prob, 0 < self.min_prob <= 1, "in (0, 1]")
        check("mpt.max_entropy", self.max_entropy, self.max_entropy > 0, "> 0")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            unread = name != "gate" if self.gate == "never" else name == "max_entropy"
            if self.gate in ("never", "always") and unread and value != field.default:
                raise unused(
                    f"mpt.{name}",
                    value,
                    f"mpt.gate={self.gate!r}",
                    "set mpt.gate to response or batch, or leave it out",
                )
