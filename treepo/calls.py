"""Calls of workers and what comes of them: answers by rank, or an error that names who is missing
and is the one nearest to the cause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from treepo.base.errors import RunFailed

_FETCH_SECONDS = 5.0  # for what was answered in time on another machine, and is looked at late


class WorkerLost(RunFailed):
    """A worker died or did not answer in time; the message names it."""


class InputLost(WorkerLost):
    """A worker lacks what another one, which died, was to give it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Call:
    """A method that a worker runs now; :func:`next_answers` waits for it.

    Attributes:
        name: of the worker, for errors.
        deadline: when it counts as lost, in ``time.monotonic`` seconds.
    """

    name: str
    ref: Any
    deadline: float


def begin(actors: Sequence[Any], method: str, *arguments: Any) -> list[Any]:
    """Have every worker of a side begin a method with the same arguments; references by rank."""
    return [getattr(actor, method).remote(*arguments) for actor in actors]


def answers(role: str, refs: Sequence[Any], timeout: float) -> list[Any]:
    """Wait for all workers of a side.

    Args:
        role: what each of them is called in errors, by rank.

    Raises:
        WorkerLost: one died, or did not answer within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    found = []
    for rank in range(len(refs)):
        try:
            left = max(0.0, deadline - time.monotonic())
            found.append(_answer(f"{role} {rank} of {len(refs)}", refs[rank], left))
        except GetTimeoutError as error:
            raise _no_answer(role, refs, timeout) from error
    return found


def answers_that_meet(refs: dict[str, list[Any]], timeout: float) -> dict[str, list[Any]]:
    """Answers of calls that wait for each other, by role and rank. When one fails all do, and the
    error that is raised is the one nearest to the cause: a death, then a refusal, then the rest.
    """
    everyone = [ref for of_role in refs.values() for ref in of_role]
    ray.wait(everyone, num_returns=len(everyone), timeout=timeout)
    found: dict[str, list[Any]] = {role: [] for role in refs}
    errors: list[Exception] = []
    for role, of_role in refs.items():
        for rank, ref in enumerate(of_role):
            try:
                found[role].append(_answer(f"{role} {rank} of {len(of_role)}", ref, 0.0))
            except GetTimeoutError:
                errors.append(_no_answer(role, of_role, timeout))
            except (RunFailed, ValueError, OSError) as error:
                errors.append(error)
    if errors:
        raise min(errors, key=_distance_from_cause)
    return found


def next_answers(calls: Sequence[Call], timeout: float) -> list[tuple[Call, Any]]:
    """Wait until one of ``calls`` is answered; all that are.

    Args:
        timeout: that set their deadlines, in seconds, for errors.

    Raises:
        WorkerLost: a worker died, or did not answer in time. Of several errors the one nearest to
            the cause.
    """
    by_ref = {call.ref: call for call in calls}
    left = max(_FETCH_SECONDS, min(call.deadline for call in calls) - time.monotonic())
    ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=left)
    if not ready:
        late = [call.name for call in calls if call.deadline <= time.monotonic()]
        raise WorkerLost(f"{', '.join(late)} did not answer within {timeout:.0f} s")
    more, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
    found: list[tuple[Call, Any]] = []
    errors: list[Exception] = []
    for call in (by_ref[ref] for ref in dict.fromkeys([*ready, *more])):
        try:
            found.append((call, _answer(call.name, call.ref, 0.0)))
        except (RunFailed, ValueError, OSError) as error:
            errors.append(error)
    if errors:
        raise min(errors, key=_distance_from_cause)
    return found


def _no_answer(role: str, refs: Sequence[Any], timeout: float) -> WorkerLost:
    waiting = [i for i, ref in enumerate(refs) if not ray.wait([ref], timeout=0)[0]]
    return WorkerLost(
        f"{role} {', '.join(map(str, waiting))} of {len(refs)} "
        f"did not answer within {timeout:.0f} s"
    )


def _answer(name: str, ref: Any, timeout: float) -> Any:
    try:
        return ray.get(ref, timeout=timeout)
    except RayActorError as error:
        if isinstance(error, RayTaskError):  # who was to give it its arguments died
            raise InputLost(f"{name} could not begin: {error}") from error
        raise WorkerLost(f"{name} died: {error}") from error
    except RayTaskError as error:
        # The user's to mend, or a failure that says all: no traceback of another process.
        if isinstance(error.cause, ValueError | OSError | RunFailed):
            raise error.cause from None
        raise


def _distance_from_cause(error: Exception) -> int:
    """Of errors that came of one failure the smallest is to be shown."""
    kinds = (WorkerLost, ValueError, OSError)
    if isinstance(error, InputLost):
        return len(kinds) + 1
    return next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds))
