"""How sampling and learning take turns (``trainer.pipeline``), and what each way needs. No torch in
here.

'sync': a step samples, learns and publishes, one after the other. 'one_step': the next step's
batch is sampled while the learner makes this step's update (``treepo/one_step.py``). 'async': all
at once, each at its own pace (``treepo/async_schedule.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.settings import loss_traits
from treepo.checks_of_settings import require_one_of
from treepo.resources import needed

if TYPE_CHECKING:
    from treepo.config import TrainConfig, TrainerConfig

PIPELINES = ("sync", "one_step", "async")


def check_pipeline(config: TrainConfig, max_response_length: int) -> None:
    """
    Args:
        max_response_length: of the rollout, in tokens.

    Raises:
        ValueError: no such pipeline, or settings that do not fit it; says which do.
    """
    require_one_of("trainer.pipeline", config.trainer.pipeline, PIPELINES)
    if config.trainer.pipeline == "sync":
        return
    if config.trainer.pipeline == "async":
        _check_segments(config, max_response_length)
        _check_transport(config)
    else:
        _check_one_step(config)
    _check_processes(config)
    _check_correction(config)


def num_in_flight(trainer: TrainerConfig) -> int:
    """Most trees that grow at a time under 'async': ``prompts_in_flight``, two batches by default,
    and never more than the cap on staleness lets begin.
    """
    size, segments = trainer.train_batch_size, trainer.segments
    return min(segments.in_flight(size), (segments.max_staleness + 1) * size)


def _check_segments(config: TrainConfig, max_response_length: int) -> None:
    segments = config.trainer.segments
    needs = (
        ("segment_length", segments.segment_length > 0, f"{max(1, max_response_length // 4)}, say",
         "workers grow trees by a segment and load newer weights between two"),
        ("max_staleness", segments.max_staleness > 0, "2, say",
         "it bounds how far sampling runs ahead of the learner"),
        ("refill", segments.refill == "keep_in_flight", "keep_in_flight",
         "prompts are begun as soon as there is room, not by steps"),
        ("train_on", segments.train_on == "full_batch", "full_batch",
         "the learner begins when trainer.train_batch_size groups are there"),
        ("group_policy", segments.group_policy == "wait_all", "wait_all",
         "the cap on staleness counts whole groups"),
        ("stop_when_finished", segments.stop_when_finished == 0, "0",
         "a slice ends when a worker's share of a batch is finished"),
    )  # fmt: skip
    for name, fits, better, why in needs:
        if not fits:
            raise ValueError(
                f"trainer.segments.{name}={getattr(segments, name)!r} does not go with "
                f"trainer.pipeline='async': {why}. Set trainer.segments.{name}={better} "
                "(trainer=async sets all of trainer.* that it needs), or trainer.pipeline=sync"
            )


def _check_one_step(config: TrainConfig) -> None:
    if config.trainer.segments.max_staleness == 1:
        raise ValueError(
            "trainer.segments.max_staleness=1 lets no tree go on in a second step with "
            "trainer.pipeline='one_step', where every token is one version old when it trains: set "
            "it to 2 or more, or to 0 for no cap"
        )


def _check_processes(config: TrainConfig) -> None:
    cluster = config.cluster
    if cluster.colocate:
        cpus, gpus = (needed(cluster, kind, in_turns=False) for kind in ("CPU", "GPU"))
        raise ValueError(
            "cluster.colocate=True has sampler and learner take turns on the same processors, and "
            f"with trainer.pipeline={config.trainer.pipeline!r} both work at once: set "
            f"cluster.colocate=false, which needs {cpus:g} CPUs and {gpus:g} GPUs with these "
            "numbers of workers and ranks, or trainer.pipeline=sync"
        )


def _check_transport(config: TrainConfig) -> None:
    cluster = config.cluster
    if cluster.weight_transport != "object_store":
        raise ValueError(
            f"cluster.weight_transport={cluster.weight_transport!r} brings weights to all engines "
            "at one time, and with trainer.pipeline='async' each loads them between two slices of "
            "its own: set cluster.weight_transport=object_store"
        )


def _check_correction(config: TrainConfig) -> None:
    """Every batch holds tokens of older weights, so something must account for that: the loss's own
    ratio to the sampler, or a weight a token.
    """
    learner, pipeline = config.trainer.learner, config.trainer.pipeline
    if learner.off_policy.correction != "none":
        return
    loss = learner.policy_loss.name
    mend = (
        "set trainer.learner.old_logprobs=recomputed and trainer.learner.off_policy.correction to "
        "decoupled, tis or icepop"
    )
    if not loss_traits(loss).uses_old_logprobs:
        raise ValueError(
            f"trainer.learner.policy_loss.name={loss!r} has no ratio to the weights that drew a "
            f"token, and with trainer.pipeline={pipeline!r} these are older ones: {mend}, or "
            "choose ppo_clip"
        )
    if learner.old_logprobs == "recomputed":
        raise ValueError(
            "trainer.learner.old_logprobs='recomputed' takes tokens of older weights for the "
            f"policy's own, and with trainer.pipeline={pipeline!r} every batch may hold such: set "
            "trainer.learner.off_policy.correction to decoupled, tis or icepop, or "
            "trainer.learner.old_logprobs=sampled"
        )
