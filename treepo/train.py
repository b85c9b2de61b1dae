"""``python -m treepo.train +experiment=NAME``: train a policy by reinforcement learning."""

from __future__ import annotations

import sys

from treepo.cli import fail, run_command, to_yaml
from treepo.config import TrainConfig, strategy_settings
from treepo.config_checks import check_group
from treepo.names import check_names
from treepo.sizes import derived_sizes


def work(config: TrainConfig, dry_run: bool) -> None:
    """Check what can be checked at once, say what the settings amount to, then train."""
    check_names(config)
    check_group(config.algorithm, strategy_settings(config)[1])
    sizes = derived_sizes(config)
    if dry_run:
        print(to_yaml(config))
    for name, value in sizes.items():
        print(f"{name:>18}: {value}", flush=True)
    if dry_run:
        if config.resume_mode not in ("auto", "disable"):
            from treepo.loop import named_run

            named_run(config)
        return
    from treepo.loop import train  # torch and Ray load here, after all that a typo can spoil

    train(config)


def main() -> None:
    if {*sys.argv[1:]} <= {"-m", "--multirun", "--dry-run"}:
        nothing = "nothing was chosen to train: begin with +experiment=quickstart"
        fail(ValueError(f"{nothing}; python -m treepo.train --help lists the experiments"), code=2)
    run_command("train", TrainConfig, work)


if __name__ == "__main__":
    main()
