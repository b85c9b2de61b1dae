"""The evaluation command's work: workers, problems, passes, files and the table of scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rewards.pool import RewardPool
from rollout.tree import Tree
from treepo.cluster import Cluster
from treepo.config import strategy_settings
from treepo.data import Problem
from treepo.evaluation import Evaluation, SamplingPass, evaluate
from treepo.held_out import evaluation_passes, load_splits, sample_flat
from treepo.hub import local_model
from treepo.model_folder import ModelSource
from treepo.progress import clock_time, quiet_libraries
from treepo.run_folder import new_run_id
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
    model_path = local_model(source.model)
    tokenizer = load_tokenizer(
        config.model.tokenizer or model_path, trust_remote_code=config.model.trust_remote_code
    )
    splits = load_splits(config, tokenizer)
    _, strategy = strategy_settings(config)
    if not strategy.stop_token_ids:
        strategy = replace(strategy, stop_token_ids=stop_token_ids(model_path, tokenizer))
    passes = evaluation_passes(config, config.sampling_seed)
    alone = replace(config.cluster, num_reference_workers=0)  # nothing is learned here
    with RewardPool(config.reward) as rewards, Cluster(config=alone) as cluster:
        console.print("loading the model", highlight=False)
        cluster.start_rollout(model_path, config.engine, config.model.tokenizer)
        cluster.wait_until_ready()

        def sample(problems: Sequence[Problem], settings: SamplingPass) -> list[Tree]:
            console.print(
                f"{settings.name}: {settings.num_samples} responses to each of "
                f"{len(problems)} problems",
                highlight=False,
            )
            return sample_flat(cluster, problems, settings, strategy)

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
