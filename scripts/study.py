"""Run a study: every variant of a YAML file with every seed, several runs at a time.

    python scripts/study.py scripts/studies/treepo.yaml --seeds 0 --jobs 2
    python scripts/study.py scripts/studies/treepo.yaml --only flat_grpo fixed_8 --seeds 0 1 2 3 4

The file has ``name``, ``overrides`` (of all runs) and ``variants`` (name: overrides). Run folders
are ``outputs/<name>.<variant>/<run id>``. A run that is finished is left alone and one that was cut
short goes on, so a study can be started again at any time. A study whose overrides change needs
another ``--outputs``: variant and seed alone say which run is which. Afterwards draw it with
``scripts/compare_learning.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from treepo.run_folder import list_runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run of a study."""

    study: str
    variant: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def experiment(self) -> str:
        return f"{self.study}.{self.variant}"

    def command(self, outputs: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "treepo.train"),
            *self.overrides,
            f"experiment_name={self.experiment}",
            f"output_dir={outputs}",
            f"seed={self.seed}",
        ]

    def is_finished(self, outputs: Path) -> bool:
        """Whether a run of the variant with this seed came to its end, whatever its overrides."""
        finished = (run for run in list_runs(outputs, self.experiment) if run.is_finished)
        summaries = (json.loads(run.summary_file.read_text()) for run in finished)
        return any(summary["seed"] == self.seed for summary in summaries)


def runs_of(study: dict, only: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """The runs in the order in which they start: all variants of a seed before the next seed.

    Raises:
        ValueError: an unknown variant.
    """
    chosen = list(only) or list(study["variants"])
    if unknown := [name for name in chosen if name not in study["variants"]]:
        raise ValueError(f"unknown variants {unknown}; the study has {list(study['variants'])}")
    return [
        Run(
            study=study["name"],
            variant=name,
            seed=seed,
            overrides=(*study["overrides"], *(study["variants"][name] or ())),
        )
        for seed in seeds
        for name in chosen
    ]


def carry_out(run: Run, outputs: Path) -> tuple[bool, str]:
    """Train, with the output in a file beside the runs.

    Returns:
        whether the run is finished now, and a line of news.
    """
    name = f"{run.experiment} seed {run.seed}"
    if run.is_finished(outputs):
        return True, f"{name}: was finished"
    log = outputs / run.experiment / f"seed_{run.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        code = subprocess.run(
            run.command(outputs), stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if code:
        return False, f"{name}: failed with code {code}; see {log}"
    return True, f"{name}: done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=[], help="variants; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    study = yaml.safe_load(arguments.study.read_text())
    try:
        runs = runs_of(study, arguments.only, arguments.seeds)
    except ValueError as error:
        parser.error(str(error))
    all_ok = True
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = pool.map(lambda run: carry_out(run, arguments.outputs), runs)
        for number, (ok, news) in enumerate(outcomes, start=1):
            all_ok &= ok
            print(f"{number}/{len(runs)} {news}", flush=True)
    sys.exit(0 if all_ok else 1)


if __name__ == "__main__":
    main()
