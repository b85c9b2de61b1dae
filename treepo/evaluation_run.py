"""The evaluation command's work: workers, problems, passes, files and the table of scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rewards.pool import RewardPool
from rollout.strategies.settings import FlatSettings
from rollout.tree import Tree
from treepo.cluster import Cluster
from treepo.config import TrainConfig, strategy_settings
from treepo.data import Problem, held_out, load_problems
from treepo.data_settings import DataSettings
from treepo.evaluation import Evaluation, SamplingPass, evaluate, greedy_and_sampled
from treepo.model_folder import ModelSource
from treepo.progress import clock_time, quiet_libraries
from treepo.run_folder import new_run_id
from treepo.step import make_prompts
from treepo.text import Decoder, load_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from treepo.evaluate import EvaluateConfig


def evaluate_checkpoint(config: EvaluateConfig, source: ModelSource) -> Evaluation:
    """Score a model, write ``samples.jsonl`` and ``evaluation.json``, and print the scores.

    Raises:
        ValueError: something the user can mend, before any sampling.
    """
    quiet_libraries()
    began, console = time.monotonic(), Console()
    output = Path(config.output or f"{config.output_dir}/evaluations/{new_run_id()}")
    if (output / "evaluation.json").exists():
        raise ValueError(f"output={str(output)!r} holds an evaluation already: name a new folder")
    tokenizer = load_tokenizer(
        config.model.tokenizer or source.model, trust_remote_code=config.model.trust_remote_code
    )
    splits = load_splits(config, tokenizer)
    _, strategy = strategy_settings(config)
    stops = strategy.stop_token_ids or stop_token_ids(source.model, tokenizer)
    settings = config.evaluation
    passes = greedy_and_sampled(
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_response_length=settings.max_response_length or strategy.max_response_length,
        seed=config.sampling_seed,
    )
    with RewardPool(config.reward) as rewards, Cluster(config=config.cluster) as cluster:
        console.print("loading the model", highlight=False)
        cluster.start_rollout(source.model, config.engine)
        cluster.wait_until_ready()

        def sample(problems: Sequence[Problem], settings: SamplingPass) -> list[Tree]:
            console.print(
                f"{settings.name}: {settings.num_samples} responses to each of "
                f"{len(problems)} problems",
                highlight=False,
            )
            return sample_flat(cluster, problems, settings, stops)

        result = evaluate(
            splits, passes, sample=sample, score=rewards.score, decoder=Decoder(tokenizer)
        )
    result.write(
        output, checkpoint=source.model, step=source.step, experiment=config.experiment_name
    )
    print_scores(result, console)
    console.print(
        f"{clock_time(time.monotonic() - began)}, samples and settings: {output}",
        highlight=False,
        soft_wrap=True,
    )
    return result


def load_splits(config: TrainConfig, tokenizer: Any) -> dict[str, list[Problem]]:
    """Held-out problems as training sees them: without those that are also trained on, unless a
    split allows them.
    """

    def load(data: DataSettings) -> list[Problem]:
        return load_problems(data, tokenizer, config.max_prompt_length)

    settings = config.evaluation.splits
    strict = any(data.on_overlap != "allow" for data in settings.values())
    training = load(config.data) if strict else []
    return {
        name: held_out(load(data), training, name=name, on_overlap=data.on_overlap)
        for name, data in settings.items()
    }


def sample_flat(
    cluster: Cluster,
    problems: Sequence[Problem],
    settings: SamplingPass,
    stops: Sequence[int],
    policy_version: int = 0,
) -> list[Tree]:
    """Independent responses to each problem, by the weights of ``policy_version``."""
    flat: Any = replace(
        FlatSettings(),
        n=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_response_length=settings.max_response_length,
        stop_token_ids=list(stops),
    )
    prompts = make_prompts(problems, settings.seed, "evaluate", settings.name)
    trees, _ = cluster.sample(prompts, "flat", flat, policy_version)
    return trees


def print_scores(result: Evaluation, console: Console) -> None:
    """The scores as a table, then how many responses had something wrong with them."""
    table = Table()
    for name in ("score", "value", "95% interval", "problems"):
        table.add_column(name, justify="left" if name == "score" else "right")
    core_first = sorted(result.estimates.items(), key=lambda entry: entry[0].startswith("val-aux"))
    for name, estimate in core_first:
        interval = f"{estimate.low:.3f} – {estimate.high:.3f}"
        table.add_row(name, f"{estimate.value:.3f}", interval, str(estimate.num_problems))
    console.print(table)
    for name, count in result.counts.items():
        if count and "/num_" in name and not name.endswith("/num_samples"):
            console.print(f"{name} {count:g}", highlight=False)
