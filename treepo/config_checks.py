"""Checks of a training run's settings that span rooms. No torch in here.

What a record of settings can say of itself it checks when it is built; whether a pipeline fits the
rest is in ``treepo/pipelines.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.settings import LOSS_TRAITS, LearnerSettings, is_sequence_level, loss_traits
from treepo.algorithm_settings import (
    ESTIMATOR_TRAITS,
    AdvantageSettings,
    estimator_traits,
    leaf_level_estimators,
)

if TYPE_CHECKING:
    from treepo.config import TrainConfig


def check_reference(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: processes that hold the reference are missing, or have nothing to do.
    """
    workers, reference = config.cluster.num_reference_workers, config.trainer.learner.reference
    if reference == "actor" and not workers:
        raise ValueError(
            "trainer.learner.reference='actor' needs processes that hold the reference, but "
            "cluster.num_reference_workers=0: set it to 1 or more, or choose "
            "trainer.learner.reference=own"
        )
    if workers and reference != "actor":
        raise ValueError(
            f"cluster.num_reference_workers={workers} is not used with "
            f"trainer.learner.reference={reference!r}: leave it out, or set "
            "trainer.learner.reference=actor"
        )


def check_kept_kv(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: keys and values that outlive an update have no use, or no place.
    """
    if config.cluster.sleeps and config.engine.keeps_kv and not config.engine.kv_on_host:
        raise ValueError(
            "engine.kv_over_update=keep leaves keys and values in the pool, whose memory is "
            "given up for every update (cluster.sleep): set engine.kv_on_host=true, or "
            "cluster.sleep=false"
        )
    if config.engine.keeps_kv and not config.trainer.segments.is_on:
        raise ValueError(
            "engine.kv_over_update=keep is for trees that go on after an update, and with "
            "trainer.segments.segment_length=0 none does: set "
            "trainer.segments.segment_length, or leave kv_over_update out"
        )


def check_lengths(config: TrainConfig, strategy: Any) -> None:
    """
    Raises:
        ValueError: a path does not fit the cache, or a tree the learner's row.
    """
    path = config.max_prompt_length + strategy.max_response_length
    if path > config.engine.num_kv_slots:
        raise ValueError(
            f"engine.num_kv_slots={config.engine.num_kv_slots} cannot hold one path of "
            f"{path} tokens (max_prompt_length + rollout.max_response_length): raise it to at "
            f"least {path}, better to {path * strategy.n} for a whole tree"
        )
    tree = config.max_prompt_length + strategy.n * strategy.max_response_length
    limit = config.trainer.learner.max_tokens_per_micro_batch
    if tree > limit:
        raise ValueError(
            f"trainer.learner.max_tokens_per_micro_batch={limit} cannot hold a prompt's "
            f"largest tree of {tree} tokens (max_prompt_length + rollout.n x "
            f"rollout.max_response_length), and a tree is not split: raise it to {tree}, or "
            "lower one of the three"
        )


def check_levels(algorithm: AdvantageSettings, policy_loss: str) -> None:
    """A loss with one term a response needs one advantage a response.

    Raises:
        ValueError: the estimator gives a response's segments different ones.
    """
    node_level = estimator_traits(algorithm.adv_estimator).is_node_level
    if is_sequence_level(policy_loss) and node_level:
        raise ValueError(
            f"trainer.learner.policy_loss.name={policy_loss!r} needs one advantage a response, but "
            f"algorithm.adv_estimator={algorithm.adv_estimator!r} gives each segment its own: "
            f"choose a loss of tokens such as 'ppo_clip', or one of the estimators "
            f"{', '.join(leaf_level_estimators())}"
        )


def check_masks(algorithm: AdvantageSettings, learner: LearnerSettings) -> None:
    """Masks of tokens fit the advantages and what the loss is divided by.

    Raises:
        ValueError: MPT masking with advantages of segments; masked tokens are to leave a
            denominator that counts no tokens.
    """
    gate, estimator = learner.mpt.gate, algorithm.adv_estimator
    if gate != "never" and estimator_traits(estimator).is_node_level:
        raise ValueError(
            f"trainer.learner.mpt.gate={gate!r} masks a response's share of a token, but "
            f"algorithm.adv_estimator={estimator!r} gives all responses of a segment one advantage "
            "together: set trainer.learner.mpt.gate='never', or choose one of the estimators "
            f"{', '.join(leaf_level_estimators())}"
        )
    for name, masks in (("off_policy", learner.off_policy), ("mpt", learner.mpt)):
        if algorithm.loss_weighting == "fixed_length" and not masks.masked_in_denominator:
            raise ValueError(
                f"trainer.learner.{name}.masked_in_denominator=False takes masked tokens out of "
                "the number of tokens that the loss is divided by, and "
                "algorithm.loss_weighting='fixed_length' divides by a constant: leave it out, or "
                "set algorithm.loss_weighting='token_mean'"
            )


def check_ages(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: tokens are to be masked from an age on that none reaches, or that all have.
    """
    age = config.trainer.learner.off_policy.mask_older_than
    segments, pipeline = config.trainer.segments, config.trainer.pipeline
    youngest = int(pipeline == "one_step")  # updates between a token and its training
    oldest = (segments.max_staleness or None) if segments.is_on else youngest  # None: no bound
    if age is None or (youngest <= age and (oldest is None or age < oldest)):
        return
    effect = "masks every token" if age < youngest else "never masks a token"
    ages, mend = f"{youngest} or more", f", or set it to {youngest} or more"
    if oldest is not None:
        ages = f"{youngest} to {oldest}"
        mend = f", or set it to {youngest} to {oldest - 1}" if youngest < oldest else ""
    raise ValueError(
        f"trainer.learner.off_policy.mask_older_than={age} {effect}, as with trainer.pipeline="
        f"{pipeline!r}, trainer.segments.segment_length={segments.segment_length} and "
        f"max_staleness={segments.max_staleness} they are {ages} versions old when they train: "
        f"leave it out{mend}"
    )


def check_uses_advantages(policy_loss: str) -> None:
    """A loss without advantages would train on every response alike, right or wrong.

    Raises:
        ValueError: the policy loss is one for supervised training.
    """
    if not loss_traits(policy_loss).uses_advantages:
        others = [name for name, traits in LOSS_TRAITS.items() if traits.uses_advantages]
        raise ValueError(
            f"trainer.learner.policy_loss.name={policy_loss!r} leaves rewards and advantages out, "
            f"so it is for python -m treepo.sft alone: choose {', '.join(others)}"
        )


def check_forks(algorithm: AdvantageSettings, strategy_name: str, strategy: Any) -> None:
    """An estimator that compares responses below the prompt needs trees that fork there.

    Raises:
        ValueError: the rollout makes none, so that every advantage would be 0.
    """
    if not estimator_traits(algorithm.adv_estimator).needs_forks:
        return
    divergence = getattr(strategy, "initial_divergence_min", 0)
    if strategy_name != "flat" and divergence < strategy.n:
        return
    cause, mend = "rollout=flat", "rollout=treepo"
    if strategy_name != "flat":
        cause = f"rollout.initial_divergence_min={divergence} (rollout.n={strategy.n})"
        mend = f"rollout.initial_divergence_min and _max below {strategy.n}"
    raise ValueError(
        f"algorithm.adv_estimator={algorithm.adv_estimator!r} compares responses that share a "
        f"segment below the prompt, and with {cause} there are none, so every advantage would be "
        f"0: choose algorithm.adv_estimator='grpo', or {mend}"
    )


def check_segments(config: TrainConfig, strategy: Any) -> None:
    """
    Raises:
        ValueError: segments that do not fit the rollout, or further batches in a step of them.
    """
    segments, algorithm = config.trainer.segments, config.algorithm
    segments.check_against(
        n=strategy.n,
        max_response_length=strategy.max_response_length,
        batch_size=config.trainer.train_batch_size,
    )
    if segments.is_on and algorithm.max_num_gen_batches > 1:
        raise ValueError(
            f"algorithm.max_num_gen_batches={algorithm.max_num_gen_batches} asks for further "
            "batches of prompts within a step, and with trainer.segments.segment_length="
            f"{segments.segment_length} a step grows every prompt by one segment alone: set "
            "algorithm.max_num_gen_batches=1 and trainer.segments.train_on=full_batch, under which "
            "an update waits until trainer.train_batch_size groups with a signal are there"
        )


def check_group(algorithm: AdvantageSettings, strategy: Any) -> None:
    """A baseline of the other responses needs other responses, and different ones. (An evaluation
    does not.)

    Raises:
        ValueError: there is one response a prompt, or all are the greedy one.
    """
    if strategy.n == 1 and algorithm.adv_estimator in ESTIMATOR_TRAITS.keys() - {"reinforce_pp"}:
        raise ValueError(
            f"algorithm.adv_estimator={algorithm.adv_estimator!r} compares a prompt's responses, "
            "and with rollout.n=1 there is one: raise rollout.n, or choose "
            "algorithm.adv_estimator='reinforce_pp'"
        )
    if strategy.n > 1 and strategy.temperature == 0:
        raise ValueError(
            f"rollout.temperature=0.0 draws the same greedy response rollout.n={strategy.n} times, "
            "so there is nothing to compare: set rollout.temperature to 1.0, say"
        )
