"""A training run from its folder to its summary: sample, score, learn, publish, and again.

The step itself is in ``treepo/session.py``; this file opens and closes a run, decides when to
evaluate and to save, and goes on with a run that was cut short.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.off_policy_settings import AlarmSettings
from treepo.checkpoint import latest_checkpoint, read_state
from treepo.cli import differing_keys, to_yaml, typed_overrides
from treepo.config import TrainConfig
from treepo.progress import Progress, quiet_libraries, show_summary
from treepo.run_folder import (
    RunFolder,
    RunLock,
    begin_run,
    claim_unfinished_run,
    list_runs,
    point_latest_at,
)

if TYPE_CHECKING:
    from treepo.evaluation import Evaluation
    from treepo.session import Session


# Settings that a run may be resumed with other values of.
MAY_CHANGE = (
    "resume_mode",
    "output_dir",
    "trainer.total_steps",
    "trainer.keep_checkpoints",
    *(f"trainer.learner.off_policy.alarms.{alarm.name}" for alarm in fields(AlarmSettings)),
)


def train(config: TrainConfig) -> RunFolder:
    """Run an experiment to its end, from its start or from where an earlier life of it stopped.

    Returns:
        The run's folder, with ``summary.json`` and the exported model in it.

    Raises:
        ValueError: something the user can mend; before any training.
    """
    quiet_libraries()
    from treepo.opening import load_inputs, open_session  # torch and Ray load here

    inputs = load_inputs(config)
    run, lock = open_run(config)
    with lock:
        checkpoint = latest_checkpoint(run.checkpoints)
        with Progress(
            total_steps=config.trainer.total_steps,
            start_step=read_state(checkpoint).step if checkpoint else 0,
            title=f"{run.experiment} {run.run_id}",
        ) as progress:
            if checkpoint is None and (note := note_of_others(config, run)):
                progress.say(note)
            with open_session(config, inputs, run, checkpoint, progress) as session:
                summary = train_session(session)
        run.finish(summary)
    show_summary(
        before=summary["before"],
        after=summary["after"],
        seconds=summary["seconds"],
        run=run.path,
        export=run.export,
        overrides=typed_overrides(),
    )
    return run


def open_run(config: TrainConfig) -> tuple[RunFolder, RunLock]:
    """The run to work on, claimed for this process: see ``resume_mode``.

    Raises:
        ValueError: ``resume_mode`` names a folder that holds no run, or a finished or busy one.
    """
    outputs, text = Path(config.output_dir), to_yaml(config)
    if config.resume_mode == "disable":
        return begin_run(outputs, config.experiment_name, text)
    if config.resume_mode != "auto":
        run = named_run(config)
        return run, run.lock()
    same = claim_unfinished_run(
        outputs, config.experiment_name, accepts=lambda run: run.config_file.read_text() == text
    )
    if same is None:
        return begin_run(outputs, config.experiment_name, text)
    point_latest_at(outputs, same[0])
    return same


def named_run(config: TrainConfig) -> RunFolder:
    """The run whose folder ``resume_mode`` is.

    Raises:
        ValueError: it holds no run, a finished one, or one that was begun with other settings.
    """
    run = RunFolder(path=Path(config.resume_mode).resolve())
    if not run.config_file.is_file():
        raise ValueError(
            f"resume_mode={config.resume_mode!r}: neither auto nor disable, nor a run's folder "
            "(one with config.yaml in it)"
        )
    if run.is_finished:
        raise ValueError(
            f"run {run.path} is finished. To train its model further start a new run with "
            f"model.path={run.export}"
        )
    saved = run.config_file.read_text()
    if differing := [k for k in differing_keys(saved, to_yaml(config)) if k not in MAY_CHANGE]:
        raise ValueError(
            f"run {run.path} was begun with other settings: {', '.join(differing)}. Give it "
            f"those in its config.yaml (only {', '.join(MAY_CHANGE)} may change), or begin "
            "a new run with resume_mode=disable"
        )
    return run


def note_of_others(config: TrainConfig, run: RunFolder) -> str:
    """What a new run is to say of the unfinished one before it, which it does not go on with;
    empty: there is none. ``run``: the new one.
    """
    if config.resume_mode != "auto":
        return ""
    others = [r for r in list_runs(Path(config.output_dir), run.experiment) if r.path != run.path]
    if not others or others[0].is_finished or latest_checkpoint(others[0].checkpoints) is None:
        return ""
    saved, text = others[0].config_file.read_text(), run.config_file.read_text()
    differing = differing_keys(saved, text)
    if not differing or others[0].is_busy:
        return ""
    mend = "give it its own"
    if set(differing) <= set(MAY_CHANGE):
        mend = f"start with resume_mode={others[0].path}"
    return (
        f"a new run: the unfinished {others[0].path} has other settings ({', '.join(differing)}); "
        f"to go on with it, {mend}"
    )


def train_session(session: Session) -> dict[str, Any]:
    """All steps that are left, the evaluations and the export.

    Returns:
        The content of ``summary.json``.
    """
    trainer = session.config.trainer
    session.publish()
    if session.state.step == 0 and trainer.val_before_train:
        before = session.evaluate()
        session.tracker.log(0, before.metrics)
        session.state = replace(session.state, before=before.scores)
    after: Evaluation | None = None
    session.progress.begin_steps()
    while session.state.step < trainer.total_steps:
        metrics = session.step()
        step, is_last = session.state.step, session.state.step == trainer.total_steps
        if is_last or (trainer.test_freq and step % trainer.test_freq == 0):
            after = session.evaluate()
            metrics |= after.metrics
        session.log(metrics)
        if is_last or (trainer.save_freq and step % trainer.save_freq == 0):
            session.save()
    if after is None:  # resumed from the last step's checkpoint
        after = session.evaluate()
    if left := len(session.pools.problems):
        session.progress.say(
            f"{left} prompts are left in the pools, unfinished or waiting to train"
        )
    session.export()
    return session.summary(after.scores)
