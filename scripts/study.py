"""Run a study: every variant of a YAML file with every seed, several runs at a time.

    python scripts/study.py scripts/studies/treepo.yaml --seeds 0 --jobs 2
    python scripts/study.py scripts/studies/treepo.yaml --only flat_grpo fixed_8 --seeds 0 1 2 3 4

The file has ``name``, ``overrides`` (of all runs) and ``variants`` (name: overrides). Run folders
are ``outputs/<name>.<variant>/<run id>``. A run that is finished is left alone and one that was cut
short goes on, so a study can be started again at any time. Afterwards draw it with
``scripts/compare_learning.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml


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
        summaries = (outputs / self.experiment).glob("*/summary.json")
        return any(json.loads(path.read_text())["seed"] == self.seed for path in summaries)


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


def carry_out(run: Run, outputs: Path) -> str:
    """Train, with the output in a file beside the runs; returns a line of news."""
    if run.is_finished(outputs):
        return f"{run.experiment} seed {run.seed}: was finished"
    log = outputs / run.experiment / f"seed_{run.seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        code = subprocess.run(
            run.command(outputs), stdout=file, stderr=subprocess.STDOUT, env=os.environ
        ).returncode
    outcome = "done" if code == 0 else f"failed with code {code}; see {log}"
    return f"{run.experiment} seed {run.seed}: {outcome}"


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
    failed = False
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for number, news in enumerate(
            pool.map(lambda run: carry_out(run, arguments.outputs), runs), start=1
        ):
            failed |= "failed" in news
            print(f"{number}/{len(runs)} {news}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
