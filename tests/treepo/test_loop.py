"""The order of a run's work, on a session that only notes it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from treepo.loop import train_session


@dataclass(frozen=True)
class State:
    step: int
    before: dict[str, float]


class Noted:
    """A session of two steps whose pools hold ``held`` prompts at the end."""

    def __init__(self, held: int) -> None:
        self.done: list[str] = []
        trainer = SimpleNamespace(total_steps=2, val_before_train=True, test_freq=0, save_freq=0)
        self.config = SimpleNamespace(trainer=trainer)
        self.tracker = SimpleNamespace(log=lambda step, metrics: None)
        self.progress = SimpleNamespace(
            begin_steps=lambda: self.done.append("begin"), say=self.done.append
        )
        self.pools = SimpleNamespace(problems=[None] * held)
        self.state = State(step=0, before={})

    def step(self) -> dict[str, float]:
        self.state = State(step=self.state.step + 1, before={})
        self.done.append(f"step {self.state.step}")
        return {}

    def evaluate(self) -> SimpleNamespace:
        self.done.append("evaluate")
        return SimpleNamespace(metrics={}, scores={"greedy": 0.5})

    def log(self, metrics: dict[str, float]) -> None:
        pass

    def summary(self, scores: dict[str, float]) -> dict[str, float]:
        return scores

    def __getattr__(self, name: str):
        return lambda: self.done.append(name)


def test_steps_begin_after_the_first_evaluation_and_the_pools_are_counted_before_the_export():
    session = Noted(held=3)
    assert train_session(session) == {"greedy": 0.5}
    assert session.done == [
        *("publish", "evaluate", "begin", "step 1", "step 2", "evaluate", "save"),
        "3 prompts are left in the pools, unfinished or waiting to train",
        "export",
    ]


def test_nothing_is_said_of_pools_that_are_empty():
    session = Noted(held=0)
    train_session(session)
    assert not any("pools" in words for words in session.done)
