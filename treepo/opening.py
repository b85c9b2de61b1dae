"""Opens a session: data first, which is where most mistakes are, then processes, then an earlier
life's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.pool import RewardPool
from rollout.strategies.base import STRATEGIES
from rollout.strategies.finish import BoxedAnswer
from rollout.strategies.settings import TreePOSettings
from treepo.checkpoint import RunState, read_state
from treepo.cluster import Cluster
from treepo.config import (
    TrainConfig,
    learner_settings,
    resolve_model_path,
    resolve_tokenizer_path,
    strategy_settings,
)
from treepo.data import Problem, ProblemOrder, load_problems
from treepo.dynamic_sampling import StepBatch
from treepo.held_out import load_splits
from treepo.hub import local_model
from treepo.one_step import AHEAD_FILE, load_ahead
from treepo.pools import POOLS_FILE, Pools, load_pools
from treepo.progress import Progress
from treepo.resources import check_resources, local_resources
from treepo.run_folder import RunFolder
from treepo.segmented import SegmentBatch
from treepo.session import Session
from treepo.text import Decoder, load_tokenizer, stop_token_ids
from treepo.tracking import Tracker

NUM_GOLDEN = 4  # prompts that prove every publication of weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run reads before it starts anything.

    Attributes:
        model_path: a local folder.
        strategy: the rollout strategy's name and settings, stop tokens and the tokenizer of
            boxed answers filled in.
        splits: held-out problems by name.
    """

    model_path: str
    tokenizer: Any
    strategy: tuple[str, Any]
    problems: list[Problem]
    splits: dict[str, list[Problem]]


def load_inputs(config: TrainConfig) -> Inputs:
    """Read model folder, tokenizer and problems: most mistakes show here, before a run begins.

    Raises:
        ValueError: something the user can mend.
    """
    if config.cluster.address is None:
        check_resources(config.cluster, local_resources())
    model_path = local_model(resolve_model_path(config.model.path))
    tokenizer = load_tokenizer(
        config.model.tokenizer or model_path, trust_remote_code=config.model.trust_remote_code
    )
    problems = load_problems(config.data, tokenizer, config.max_prompt_length)
    name, settings = strategy_settings(config)
    if not settings.stop_token_ids:
        settings = replace(settings, stop_token_ids=stop_token_ids(model_path, tokenizer))
    if isinstance(settings, TreePOSettings):
        settings = with_answer_source(settings, config.model.tokenizer or model_path)
    strategy = STRATEGIES.get(name)(settings)  # its rules and user code can be loaded
    if config.trainer.segments.group_policy == "finished_part" and not hasattr(
        strategy, "finished_part"
    ):
        raise ValueError(
            f"trainer.segments.group_policy='finished_part' needs a rollout strategy with a method "
            f"finished_part(state), and rollout.strategy={name!r} has none: add it (see "
            "rollout/strategies/base.py), or set trainer.segments.group_policy=wait_all"
        )
    batch = config.trainer.train_batch_size
    if batch > len(problems):
        raise ValueError(
            f"trainer.train_batch_size={batch} is more than the {len(problems)} problems of the "
            f"training data: set it to {len(problems)} at most, or provide more data"
        )
    return Inputs(
        model_path=model_path,
        tokenizer=tokenizer,
        strategy=(name, settings),
        problems=problems,
        splits=load_splits(config, tokenizer, problems),
    )


def with_answer_source(settings: TreePOSettings, model_tokenizer: str) -> TreePOSettings:
    r"""Settings whose answer detectors work in every process: the tokenizer that ``\boxed{...}`` is
    read with becomes a folder, or a Hub name; where nothing says how answers are seen, it is
    ``model_tokenizer``.

    Raises:
        ValueError: no tokenizer can be loaded.
    """
    path = model_tokenizer if settings.lacks_answer_source else settings.answer_tokenizer
    if not path:
        return settings
    path = resolve_tokenizer_path(path, field_name="rollout.answer_tokenizer")
    BoxedAnswer(path).load()
    return replace(settings, answer_tokenizer=path)


@contextmanager
def open_session(
    config: TrainConfig, inputs: Inputs, run: RunFolder, checkpoint: Path | None, progress: Progress
) -> Iterator[Session]:
    """Everything a run needs, in the state of ``checkpoint`` or at its beginning.

    Raises:
        ValueError: something the user can mend, before any training.
    """
    order = ProblemOrder(inputs.problems, seed=config.seed)
    state = read_state(checkpoint) if checkpoint else initial_state(config, order)
    pools = read_pools(config, checkpoint)
    ahead = read_ahead(config, checkpoint)
    progress.stage("starting the workers")
    with (
        RewardPool(config.reward, wait=False) as rewards,
        Cluster(config=config.cluster) as cluster,
        Tracker(
            config.tracking,
            metrics_file=run.metrics_file,
            experiment=run.experiment,
            run_id=run.run_id,
            config={"config": run.config_file.read_text()},
            resume_step=state.step if checkpoint else None,
            state=state.tracking,
        ) as tracker,
    ):
        cluster.start_rollout(inputs.model_path, config.engine, config.model.tokenizer)
        cluster.start_learners(inputs.model_path, learner_settings(config))
        cluster.wait_until_ready()
        rewards.wait_until_ready()
        if checkpoint:
            restore(cluster, checkpoint, state, run)
        yield Session(
            config=config,
            run=run,
            cluster=cluster,
            rewards=rewards,
            tracker=tracker,
            progress=progress,
            decoder=Decoder(inputs.tokenizer),
            strategy=inputs.strategy,
            order=order,
            splits=inputs.splits,
            golden=golden_sequences(inputs.problems),
            state=state,
            pools=pools,
            ahead=ahead,
        )


def read_pools(config: TrainConfig, checkpoint: Path | None) -> Pools:
    """What waits between two steps, as it was saved; at the beginning and without segments nothing.

    Raises:
        ValueError: another version wrote it, or it is damaged; says which file, and what to do.
    """
    if checkpoint is None or not config.trainer.segments.is_on:
        return Pools()
    return _read(checkpoint / POOLS_FILE, load_pools)


def read_ahead(config: TrainConfig, checkpoint: Path | None) -> StepBatch | SegmentBatch | None:
    """The batch that the one-step pipeline had drawn; None: none waits, as after a last step.
    Raises as :func:`read_pools`.
    """
    if checkpoint is None or config.trainer.pipeline != "one_step":
        return None
    file = checkpoint / AHEAD_FILE
    return _read(file, load_ahead) if file.exists() else None


def _read(file: Path, load: Callable[[bytes], Any]) -> Any:
    try:
        return load(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}. Move {file.parent} away to go on from the checkpoint "
            "before it, or begin a new run with resume_mode=disable"
        ) from error


def initial_state(config: TrainConfig, order: ProblemOrder) -> RunState:
    """Where a run stands before its first step."""
    return RunState(
        step=0,
        policy_version=0,
        data_position=order.start,
        digest="",
        seconds=0.0,
        seed=config.seed,
    )


def restore(cluster: Cluster, checkpoint: Path, state: RunState, run: RunFolder) -> None:
    """Put the learner into a checkpoint's state and drop what the run wrote after it.

    Raises:
        ValueError: the weights that were loaded are not those that were saved.
    """
    cluster.on_learners("load", str(checkpoint / "learner"))
    digest = cluster.on_learners("digest")[0]
    if digest != state.digest:
        raise ValueError(
            f"checkpoint {checkpoint} is damaged: its weights have digest {digest}, but "
            f"{state.digest} was saved. Resume from another with resume_mode, or start anew with "
            "resume_mode=disable"
        )
    for file in run.trees.glob("step_*.jsonl"):
        if int(file.stem.removeprefix("step_")) > state.step:
            file.unlink()


def golden_sequences(problems: list[Problem]) -> list[np.ndarray]:
    """Token sequences that learner and engines both score after each publication of weights: the
    longest prompts, whose positions reach furthest.
    """
    longest = sorted(problems, key=lambda problem: (-len(problem.prompt_token_ids), problem.id))
    return [problem.prompt_token_ids for problem in longest[:NUM_GOLDEN]]
