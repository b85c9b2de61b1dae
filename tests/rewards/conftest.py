"""A file of reward functions that behave badly on request, and pools that use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.pool import RewardPool
from rewards.settings import RewardPartSettings, RewardSettings

USER_FILE = """
import asyncio, ctypes, os, re, signal, subprocess, sys, time


def verl(data_source, solution_str, ground_truth, extra_info=None):
    what, _, argument = solution_str.partition(" ")
    if what == "sleep":
        time.sleep(float(argument))
    if what == "loop":
        while True:
            pass
    if what == "regex":  # stays inside C, holding the interpreter's lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if what == "child":  # leaves a process of its own behind, and hangs
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(argument, "w").write(str(child.pid))
        time.sleep(600)
    if what == "exit":
        os._exit(int(argument))
    if what == "sys.exit":
        sys.exit(3)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "memory":
        bytearray(1 << 40)
    if what == "close":
        os.closerange(3, 100)
        time.sleep(600)
    if what == "raise":
        raise KeyError("no such thing")
    if what == "print":
        print("x" * 3_000_000)
        return {"score": 1.0, "pred": "y" * 3_000_000}
    if what == "nan":
        return float("nan")
    if what == "none":
        return None
    if what == "text":
        return "1.0"
    if what == "modules":
        return {"score": 1.0, "pred": ",".join(m for m in ("torch", "ray") if m in sys.modules)}
    if what == "pid":
        return {"score": 1.0, "pred": f"{os.getpid()} {os.getppid()}"}
    return float(solution_str == str(ground_truth))


def verl_dict(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    right = solution_str == ground_truth
    score = scale * right - 0.5
    return {"score": score, "acc": right, "pred": solution_str, "words": 3, "note": "x"}


def no_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": True, "pred": "1"}


def trl(prompts, completions, ground_truth, **columns):
    return [float(c == g) for c, g in zip(completions, ground_truth)]


def trl_chat(completions, level, **columns):
    return [len(c[0]["content"]) + l for c, l in zip(completions, level)]


async def trl_async(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(p)) for p in prompts]


def trl_two(completions, **columns):
    return [1.0, 2.0]


def trl_skips(completions, **columns):
    return [None]


def trl_scalar(completions, **columns):
    return 1.0


def neither(text):
    return 1.0


def both(completions, solution_str, ground_truth):
    return 1.0


def anything(**kwargs):
    return 1.0


not_a_function = 3
"""


@pytest.fixture(scope="session")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "my_rewards.py"
    path.write_text(USER_FILE)
    return path


@pytest.fixture(scope="module")
def pool(user_file: Path) -> Iterator[RewardPool]:
    """Two workers that run ``verl`` of the user's file under a limit of a second."""
    parts = {"user": RewardPartSettings(name=f"{user_file}:verl")}
    with RewardPool(RewardSettings(parts=parts, num_workers=2, timeout_seconds=1.0)) as made:
        yield made
