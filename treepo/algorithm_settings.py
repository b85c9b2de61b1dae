"""How rewards become advantages: a plain dataclass, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treepo.base.registry import Registry
from treepo.base.typed import check_types
from treepo.checks_of_settings import require_one_of

NORMALISATIONS = ("auto", "tree", "batch", "leaves", "tokens", "release", "none")
LOSS_WEIGHTINGS = ("token_mean", "sequence_mean", "fixed_length")
FILTER_METRICS = ("score", "acc")
OVERLONG_RULES = ("keep", "zero", "mask")

_OF_LEAVES = ("tree", "batch", "leaves", "tokens", "release", "none")
_OF_SEGMENTS = ("tree", "batch", "tokens", "release", "none")
_OF_BATCHES = ("leaves", "batch", "tokens", "release")


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorTraits:
    """What can be known of an advantage estimator without numpy.

    Attributes:
        auto: the normalisation of its paper.
        uses: the normalisations that it can be given.
        is_node_level: its advantages differ along a response, from segment to segment.
        needs_forks: a tree whose responses share no more than the prompt gives it nothing but 0.
    """

    auto: str
    uses: tuple[str, ...]
    is_node_level: bool = False
    needs_forks: bool = False


def _by_leaf(auto: str, uses: tuple[str, ...] = _OF_LEAVES) -> EstimatorTraits:
    return EstimatorTraits(auto=auto, uses=uses)


def _by_segment(auto: str) -> EstimatorTraits:
    return EstimatorTraits(auto=auto, uses=_OF_SEGMENTS, is_node_level=True)


ESTIMATOR_TRAITS = {
    "treepo": _by_leaf("tree"),
    "treepo_size_weighted": _by_leaf("tree"),
    "treepo_drop_degenerate": _by_leaf("tree"),
    "treepo_no_root": EstimatorTraits(auto="tree", uses=_OF_LEAVES, needs_forks=True),
    "treepo_loo": _by_leaf("tree"),
    "tree_grpo": _by_leaf("tree", ("tree", "none")),
    "treerl": _by_segment("none"),
    "spo": _by_segment("none"),
    "child_minus_parent": _by_segment("none"),
    "sibling": _by_segment("tree"),
    "treerpo": _by_segment("tree"),
    "grpo": _by_leaf("tree"),
    "dr_grpo": _by_leaf("none", ("none",)),
    "rloo": _by_leaf("none"),
    "reinforce_pp": _by_leaf("leaves", _OF_BATCHES),
    "reinforce_pp_baseline": _by_leaf("leaves", _OF_BATCHES),
}
# Names are known here; the functions are imported when one is used. An entry is an ``Estimator``
# of treepo/advantages/records.py.
ADVANTAGES: Registry[Any] = Registry(
    "advantage estimator", {name: f"treepo.advantages.{name}:{name}" for name in ESTIMATOR_TRAITS}
)
_OF_USERS = _by_leaf("tree")


def estimator_traits(name: str) -> EstimatorTraits:
    """Of an advantage estimator by name; a user's own counts as one that gives a response one
    advantage, on any tree.
    """
    return ESTIMATOR_TRAITS.get(name, _OF_USERS)


def leaf_level_estimators() -> list[str]:
    """Names of the estimators that give all tokens of a response one advantage."""
    return [name for name, traits in ESTIMATOR_TRAITS.items() if not traits.is_node_level]


@dataclass
class AdvantageSettings:
    """The algorithm's part between rewards and loss."""

    adv_estimator: str = "treepo"  # name in treepo.advantages.ADVANTAGES, or your own
    # what advantages are divided by; docs/algorithms.md says which estimators use which.
    # 'auto': what the estimator's paper does; 'tree': their standard deviation in their own group
    # (the tree; the siblings); 'batch': of the same values over the whole batch; 'leaves': over the
    # batch's responses; 'tokens': over the batch's trained tokens, counted once a response, so that
    # long responses weigh more; 'release': as 'tokens', and shifted to mean 0; 'none': 1
    normalisation: str = "auto"
    norm_adv_by_std_in_grpo: bool = True  # false: grpo doesn't divide (verl's switch)
    adv_eps: float = 1e-6  # added to the standard deviation (not of 'release', which has its own)
    treerl_sqrt_leaves: bool = True  # treerl: divide by the root of the number of leaves below
    # 'token_mean': every trained token of a response weighs the same, and the loss is divided by
    # their number; 'sequence_mean': every response weighs the same; 'fixed_length': tokens weigh
    # the same, and the loss is divided by responses x rollout.max_response_length (Dr.GRPO)
    loss_weighting: str = "token_mean"
    filter_groups: bool = False  # drop prompts whose responses all score the same (DAPO)
    # with filter_groups: the same what, 'score' (reward) or 'acc' (correctness)
    filter_groups_metric: str = "score"
    # with filter_groups: most batches of prompts that a step may sample until
    # trainer.train_batch_size of them have a signal (dynamic sampling of DAPO; TreePO's paper: 3)
    max_num_gen_batches: int = 1
    # a response cut at rollout.max_response_length 'keep's its reward, gets the reward 0 ('zero';
    # UloRL), or counts in its group but not in the loss ('mask'; DAPO's overlong filtering). DAPO's
    # soft punishment is a part of the reward: reward.parts.length
    overlong: str = "keep"

    def __post_init__(self) -> None:
        check_types(self, "algorithm.")
        for name, allowed in (
            ("normalisation", NORMALISATIONS),
            ("loss_weighting", LOSS_WEIGHTINGS),
            ("filter_groups_metric", FILTER_METRICS),
            ("overlong", OVERLONG_RULES),
        ):
            require_one_of(f"algorithm.{name}", getattr(self, name), allowed)
        if not self.adv_eps > 0:
            raise ValueError(f"algorithm.adv_eps={self.adv_eps!r}: it must be > 0, such as 1e-6")
        self._check_normalisation()
        if not self.treerl_sqrt_leaves and self.adv_estimator != "treerl":
            raise ValueError(
                "algorithm.treerl_sqrt_leaves=False is not used by algorithm.adv_estimator="
                f"{self.adv_estimator!r}: leave it out, or choose algorithm.adv_estimator='treerl'"
            )
        if self.adv_estimator == "dr_grpo" and self.loss_weighting == "sequence_mean":
            raise ValueError(
                "algorithm.loss_weighting='sequence_mean' divides by each response's length, which "
                "algorithm.adv_estimator='dr_grpo' is there to avoid: set algorithm.loss_weighting="
                "'fixed_length' (as the paper) or 'token_mean', or choose "
                "algorithm.adv_estimator='grpo'"
            )
        if self.max_num_gen_batches < 1:
            raise ValueError(
                f"algorithm.max_num_gen_batches={self.max_num_gen_batches!r}: it must be >= 1 "
                "(1: no further batches)"
            )
        if self.filter_groups_metric != "score" and not self.filter_groups:
            raise ValueError(
                f"algorithm.filter_groups_metric={self.filter_groups_metric!r} is not used with "
                "algorithm.filter_groups=False, under which no prompt is dropped: set "
                "algorithm.filter_groups=True, or leave it out"
            )
        if self.max_num_gen_batches > 1 and not self.filter_groups:
            raise ValueError(
                f"algorithm.max_num_gen_batches={self.max_num_gen_batches} is not used with "
                "algorithm.filter_groups=False, under which no prompt is replaced: set "
                "algorithm.filter_groups=True, or leave it out"
            )

    @property
    def divides_by(self) -> str:
        """The normalisation in force, with 'auto' and ``norm_adv_by_std_in_grpo`` resolved."""
        if not self.norm_adv_by_std_in_grpo:
            return "none"
        auto = estimator_traits(self.adv_estimator).auto
        return auto if self.normalisation == "auto" else self.normalisation

    def _check_normalisation(self) -> None:
        traits = estimator_traits(self.adv_estimator)
        if self.normalisation not in ("auto", *traits.uses):
            raise ValueError(
                f"algorithm.normalisation={self.normalisation!r} is not used by "
                f"algorithm.adv_estimator={self.adv_estimator!r}: choose "
                f"{' or '.join(map(repr, traits.uses))}, or leave it at 'auto', which is "
                f"{traits.auto!r}"
            )
        if self.norm_adv_by_std_in_grpo:
            return
        if self.adv_estimator in ESTIMATOR_TRAITS and self.adv_estimator != "grpo":
            instead = ""
            if "none" in traits.uses:
                instead = " and set algorithm.normalisation='none' instead"
            raise ValueError(
                "algorithm.norm_adv_by_std_in_grpo=False is not used by algorithm.adv_estimator="
                f"{self.adv_estimator!r}: leave it out{instead}, or choose "
                "algorithm.adv_estimator='grpo'"
            )
        if self.normalisation not in ("auto", "tree", "none"):
            raise ValueError(
                "algorithm.norm_adv_by_std_in_grpo=False leaves no use for algorithm.normalisation="
                f"{self.normalisation!r}: drop one of them"
            )
