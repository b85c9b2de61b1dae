"""What each rank of the distributed learner tests runs, in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from token_trees import random_tree, token_tree

from trainers.batch import PackedBatch, TokenTree
from trainers.learner import Learner
from trainers.lora_settings import LoraSettings
from trainers.mpt_settings import MPTSettings
from trainers.off_policy_settings import OffPolicySettings
from trainers.packing import pack_row, total_weight
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings

SETTINGS = OptimizerSettings(name="sgd", lr=0.5, weight_decay=0.0, grad_clip=0.0)
TOKEN_LOSS = PolicyLossSettings()
SEQUENCE_LOSS = PolicyLossSettings(
    name="gspo", clip_ratio_low=0.4, clip_ratio_high=0.28, kl_loss_coef=0.3, entropy_coeff=0.1
)


NEWEST = 5  # policy version
LORA = LoraSettings(rank=3, alpha=6)


def drawn_trees(count: int, seed: int = 0) -> list[TokenTree]:
    rng = random.Random(seed)
    return [token_tree(random_tree(rng)) for _ in range(count)]


def learner_settings(
    policy_loss: PolicyLossSettings, zero_stage: int = 0, lora: LoraSettings | None = None
) -> LearnerSettings:
    if lora is not None:  # with the reference that only adapters can give
        settings = learner_settings(policy_loss, zero_stage)
        return replace(settings, lora=lora, reference="lora_off")
    masks: dict[str, Any] = {}
    if policy_loss.name == "gspo":
        # each kind of old log-probs with one of the losses, and masks that ask of whole updates
        masks = {
            "old_logprobs": "recomputed",
            "off_policy": OffPolicySettings(
                correction="icepop",
                band=[0.2, 5.0],
                mask_older_than=1,
                masked_in_denominator=False,
            ),
            "mpt": MPTSettings(
                gate="batch", min_prob=0.3, max_entropy=3.0, masked_in_denominator=False
            ),
        }
    return LearnerSettings(
        zero_stage=zero_stage,
        optimizer=SETTINGS,
        policy_loss=policy_loss,
        init_timeout_s=60,
        **masks,
    )


def dealt_rows(rank: int, world_size: int, accumulation: int) -> list[list[PackedBatch]]:
    """Two updates' rows of this rank. Loads are unequal: the first row has as many trees as all
    others together, and with more rows than trees some have none.
    """
    rng = random.Random(11)
    updates = []
    for count in (4, 5):
        trees = [token_tree(random_tree(rng, branch=rng.randint(1, 3))) for _ in range(count)]
        for tree in trees:
            tree.policy_version.copy_(NEWEST - torch.arange(tree.num_tokens) % 3)
        rows: list[list] = [[] for _ in range(world_size * accumulation)]
        for number, tree in enumerate(trees):
            rows[0 if number < count // 2 else number % len(rows)].append(tree)
        denominator = total_weight(trees)
        updates.append([pack_row(row, denominator) for row in rows[rank::world_size]])
    return updates


def run(
    rank: int,
    world_size: int,
    init_method: str,
    model_path: str,
    cases: Sequence[tuple[int, int]],
    folder: str,
    policy_loss: PolicyLossSettings,
    lora: LoraSettings | None = None,
) -> None:
    """For each (ZeRO stage, accumulation): two SGD updates, then save the weights and metrics; at
    last a checkpoint's round trip.
    """
    torch.set_num_threads(1)
    for zero_stage, accumulation in cases:
        settings = learner_settings(policy_loss, zero_stage, lora)
        learner = Learner(model_path, settings, rank, world_size, init_method)
        metrics = learner.update(dealt_rows(rank, world_size, accumulation), policy_version=NEWEST)
        tensors = {name: tensor.clone() for name, tensor in learner.state_tensors().items()}
        digest = learner.digest()
        name = f"{folder}/zero{zero_stage}_accumulation{accumulation}"
        learner.save(name)
        update = dealt_rows(rank, world_size, 1)[:1]
        learner.update(update, policy_version=NEWEST)
        final = learner.digest()
        resumed = Learner(model_path, settings, rank, world_size, init_method)
        resumed.load(name)
        assert resumed.digest() == digest
        resumed.update(update, policy_version=NEWEST)
        assert resumed.digest() == final
        learner.export_hf(f"{name}/export")
        torch.save(
            {"tensors": tensors, "metrics": metrics, "digest": digest}, f"{name}/rank{rank}.pt"
        )
    learner.close()
