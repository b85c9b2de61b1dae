"""One step of training between the cluster's calls: prompts in, verdicts and advantages on trees,
packed batches out.

Pure functions on records; the loop calls the workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.records import RewardItem, RewardResult
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from trainers.batch import PackedBatch, TokenTree
from trainers.packing import check_leaf_advantages, pack
from trainers.settings import is_sequence_level
from treepo.advantages import SPREAD_TOLERANCE, leaf_num_tokens
from treepo.base.keys import Purpose, root_key, uniform
from treepo.config import TrainConfig
from treepo.data import Problem
from treepo.text import Decoder


def make_prompts(problems: Sequence[Problem], *where: object) -> list[Prompt]:
    """Prompts whose random draws are named by ``where`` (seed, epoch, purpose) and the problem's
    id.
    """
    return [
        Prompt(
            problem_id=problem.id,
            token_ids=problem.prompt_token_ids,
            root_key=root_key(*where, problem.id),
        )
        for problem in problems
    ]


def reward_items(tree: Tree, problem: Problem, decoder: Decoder) -> list[RewardItem]:
    """What the verifiers see of each leaf, in the order of ``tree.leaves``."""
    return [
        RewardItem(
            data_source=problem.data_source,
            prompt=problem.prompt_text,
            solution_str=decoder.response_text(tree, leaf),
            ground_truth=problem.ground_truth,
            extra_info=problem.extra_info,
            num_tokens=length,
            finish_reason=tree.segments[leaf].finish_reason,
        )
        for leaf, length in zip(tree.leaves, leaf_num_tokens(tree).tolist(), strict=True)
    ]


def shuffle_verdicts(
    verdicts: Sequence[Sequence[RewardResult]], key: int
) -> list[list[RewardResult]]:
    """The control experiment: the same verdicts, dealt to the batch's leaves at random.

    Args:
        key: names the permutation.
    """
    every = [verdict for of_tree in verdicts for verdict in of_tree]
    order = sorted(range(len(every)), key=lambda i: uniform(key, i, Purpose.BRANCH))
    dealt = iter(order)
    return [[every[next(dealt)] for _ in of_tree] for of_tree in verdicts]


def mini_batches(
    trees: Sequence[TokenTree], config: TrainConfig, max_response_length: int, key: int
) -> list[list[list[PackedBatch]]]:
    """Cut a step's trees into optimiser updates, packed for every rank.

    The trees that survived the filter are shuffled anew each epoch and dealt into as many updates
    as the unfiltered step would have had (fewer if fewer trees than that are left), of nearly equal
    size.

    Args:
        max_response_length: the rollout's, in tokens.
        key: names the shuffles.

    Returns:
        Indexed [rank][update][micro-batch].

    Raises:
        ValueError: the policy loss is of whole responses, and the advantages are not.
    """
    trainer = config.trainer
    loss_name, gate = trainer.learner.policy_loss.name, trainer.learner.mpt.gate
    if is_sequence_level(loss_name):
        setting = f"policy_loss.name={loss_name!r} has one term a response"
        check_leaf_advantages(trees, f"{setting}, unlike ppo_clip, cispo and reinforce")
    elif gate != "never":
        check_leaf_advantages(trees, f"mpt.gate={gate!r} masks a response's share of a token")
    wanted = trainer.train_batch_size // trainer.ppo_mini_batch_size
    updates: list[list[list[PackedBatch]]] = []
    for epoch in range(trainer.ppo_epochs):
        draws = [uniform(key, epoch * len(trees) + i, Purpose.BRANCH) for i in range(len(trees))]
        order = np.argsort(draws)
        for share in np.array_split(order, min(wanted, len(trees))):
            update = [trees[i] for i in share]
            updates.append(
                pack(
                    update,
                    trainer.learner.max_tokens_per_micro_batch,
                    config.cluster.num_learner_ranks,
                    loss_denominator(update, config, max_response_length),
                )
            )
    ranks = range(config.cluster.num_learner_ranks)
    return [[update[rank] for update in updates] for rank in ranks]


def has_gradient(trees: Sequence[TokenTree], config: TrainConfig) -> bool:
    """Whether an update on these trees would follow anything: an advantage that is not 0 (up to
    rounding), or a term of the objective that needs none (KL penalty, entropy bonus).
    """
    loss = config.trainer.learner.policy_loss
    if loss.kl_loss_coef > 0 or loss.entropy_coeff > 0:
        return bool(trees)
    return any(
        not bool((values.abs() <= SPREAD_TOLERANCE).all())  # NaN is for the learner to refuse
        for tree in trees
        for values in (tree.advantage_pos, tree.advantage_neg, tree.leaf_advantage)
    )


def loss_denominator(
    update: Sequence[TokenTree], config: TrainConfig, max_response_length: int
) -> float | None:
    """What an update's loss is divided by under ``algorithm.loss_weighting='fixed_length'``: its
    trained responses times the rollout's ``max_response_length``, a constant in place of their
    lengths (Dr. GRPO, arXiv 2503.20783). None, the update's total weight, under the others.
    """
    if config.algorithm.loss_weighting != "fixed_length":
        return None
    responses = sum(int((tree.leaf_weight > 0).sum()) for tree in update)
    return float(max(responses, 1) * max_response_length)
