"""How rewards become advantages: a plain dataclass, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass

NORMALISATIONS = ("tree", "batch", "release", "none")
LOSS_WEIGHTINGS = ("token_mean", "sequence_mean")
FILTER_METRICS = ("score", "acc")


@dataclass
class AdvantageSettings:
    """The algorithm's part between rewards and loss."""

    adv_estimator: str = "treepo"  # name in treepo.advantages.ADVANTAGES, or your own
    # what advantages are divided by. 'tree': their standard deviation in their own tree; 'batch':
    # in the whole batch; 'release': shifted and scaled to mean 0 and variance 1 over the batch's
    # trained tokens, counted once a response, so that long responses weigh more; 'none': 1
    normalisation: str = "tree"
    norm_adv_by_std_in_grpo: bool = True  # false: grpo and rloo don't divide (Dr.GRPO)
    adv_eps: float = 1e-6  # added to the standard deviation of 'tree' and 'batch'
    # 'token_mean': every trained token of a response weighs the same; 'sequence_mean': every
    # response does
    loss_weighting: str = "token_mean"
    filter_groups: bool = False  # drop prompts whose responses all score the same (DAPO)
    filter_groups_metric: str = "score"  # the same what: 'score' (reward) or 'acc' (correctness)

    def __post_init__(self) -> None:
        self._choice("normalisation", NORMALISATIONS)
        self._choice("loss_weighting", LOSS_WEIGHTINGS)
        self._choice("filter_groups_metric", FILTER_METRICS)
        if not self.adv_eps > 0:
            raise ValueError(f"adv_eps={self.adv_eps!r}: it must be > 0, such as 1e-6")
        if not self.norm_adv_by_std_in_grpo and self.adv_estimator == "treepo":
            raise ValueError(
                "norm_adv_by_std_in_grpo=False would not be used by adv_estimator='treepo': set "
                "normalisation='none' instead"
            )
        if not self.norm_adv_by_std_in_grpo and self.normalisation in ("batch", "release"):
            raise ValueError(
                f"norm_adv_by_std_in_grpo=False leaves no use for normalisation="
                f"{self.normalisation!r}: drop one of them"
            )

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
            )
