"""``python -m treepo.evaluate checkpoint=... +experiment=NAME``: score a model on an experiment's
held-out problems.
"""

from __future__ import annotations

from dataclasses import dataclass

from treepo.cli import run_command, to_yaml
from treepo.config import TrainConfig
from treepo.evaluation import EVALUATION_SEED
from treepo.model_folder import find_model
from treepo.names import check_names


@dataclass
class EvaluateConfig(TrainConfig):
    """A training run's settings, of which evaluation uses ``evaluation``, ``reward``, ``engine``,
    ``cluster`` and the lengths, and what to evaluate.
    """

    checkpoint: str = "???"  # a model folder or Hub name, a run, or its checkpoints/global_step_N
    output: str = ""  # folder of the results; default: <output_dir>/evaluations/<a new name>
    # names the draws; by default those of training's own evaluations, so that a run's scores
    # before and after training are met again
    sampling_seed: int = EVALUATION_SEED


def work(config: EvaluateConfig, dry_run: bool) -> None:
    """Check what can be checked at once, then sample, judge and print the scores."""
    check_names(config)
    source = find_model(config.checkpoint)
    if not config.evaluation.splits:
        raise ValueError(
            "evaluation.splits is empty: name an experiment that has held-out problems with "
            "+experiment=NAME, and put yours in their place if you have some, e.g. "
            "+experiment=gsm8k evaluation.splits.gsm8k.source=file "
            "'evaluation.splits.gsm8k.files=[test.jsonl]'"
        )
    if dry_run:
        print(to_yaml(config))
        print(f"model: {source.model}")
        return
    from treepo.evaluation_run import evaluate_checkpoint  # torch and Ray load here

    evaluate_checkpoint(config, source)


def main() -> None:
    run_command("evaluate", EvaluateConfig, work)


if __name__ == "__main__":
    main()
