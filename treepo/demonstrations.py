"""Step-by-step answers to chain sums, with the slips of a pupil who sometimes forgets to carry.

``7 + 15 - 1`` is answered ``7 + 15 = '22 - 1 = 21`` and, on its own line, ``#### 21``. Where the
units column carries or borrows, the pupil notes it with an apostrophe before the result; with a
given probability it is forgotten, note and all, and the chain goes on from the wrong value
(``7 + 15 = 12 - 1 = 11``). Such errors are systematic: a model taught on them makes them greedily
too, and knows the right way well enough to be rewarded for it. The note gives "remember to carry"
one place in the text, so that reward can teach it for all sums at once rather than for each pair of
numbers.

Long chains can be numbered, ``7 (2) + 15 (3) - 1``, and are then answered likewise,
``7 (2) + 15 = '22 (3) - 1 = 21``: so that "which term is next?" is a matter of finding a number and
not of counting, and only adding is left to go wrong. The slips can be confined to some terms, so
that in a sum of a hundred they stay few.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection

ANSWER_MARKER = "#### "
CARRY_NOTE = "'"
_CHAIN = re.compile(r"-?\d+(?: [+-] -?\d+)+")


def parse_chain(question: str) -> list[tuple[str, int]]:
    """The terms of the last chain sum in ``question`` as (operator, number), the first with "+".

    Raises:
        ValueError: there is no chain of at least two numbers joined by `` + `` or `` - ``.
    """
    chains = _CHAIN.findall(question)
    if not chains:
        raise ValueError(
            f"question {question!r} holds no chain sum; expected numbers joined by ' + ' or ' - ', "
            "such as '7 + 15 - 4'"
        )
    first, *rest = chains[-1].split(" ")
    return [("+", int(first))] + [
        (operator, int(number)) for operator, number in zip(rest[::2], rest[1::2], strict=True)
    ]


def add_without_carry(a: int, b: int) -> int:
    """``a + b`` as computed on paper, with the carry into, or the borrow from, the tens forgotten.

    Equal to ``a + b`` where the units column neither carries nor borrows. Magnitudes of equal sign
    are added; otherwise the smaller is taken from the larger, whose sign the result has.
    """
    large, small = sorted((abs(a), abs(b)), reverse=True)
    sign = 1 if (a if abs(a) >= abs(b) else b) >= 0 else -1
    if (a >= 0) == (b >= 0):
        carries = large % 10 + small % 10 >= 10
        return sign * (large + small - 10 * carries)
    borrows = large % 10 < small % 10
    return sign * (large - small + 10 * borrows)


def carries_or_borrows(a: int, b: int) -> bool:
    """Whether adding ``b`` to ``a`` on paper carries out of, or borrows into, the units column."""
    return add_without_carry(a, b) != a + b


def term_label(index: int) -> str:
    """What stands before the operator of term ``index``, counted from 1, in a numbered chain."""
    return f" ({index})"


def number_terms(question: str) -> str:
    """``question`` with the terms of its last chain numbered: ``7 + 15 - 4`` becomes
    ``7 (2) + 15 (3) - 4``.

    Raises:
        ValueError: there is no chain, see :func:`parse_chain`.
    """
    (_, first), *steps = parse_chain(question)
    *_, chain = _CHAIN.finditer(question)
    numbered = str(first) + "".join(
        f"{term_label(index)} {operator} {number}"
        for index, (operator, number) in enumerate(steps, start=2)
    )
    return question[: chain.start()] + numbered + question[chain.end() :]


def demonstrate(
    question: str,
    *,
    error_prob: float,
    rng: random.Random,
    error_terms: Collection[int] = (),
    numbered: bool = False,
) -> str:
    """A worked answer to the chain sum in ``question``; always right where ``error_prob`` is 0.

    Args:
        question: its terms not numbered.
        error_prob: probability that a step with a carry or a borrow forgets it.
        rng: drawn from once for every step that may forget, whatever ``error_prob`` is.
        error_terms: only steps that add or take one of these forget; empty: any.
        numbered: give each step the number of its term.
    """
    (_, total), *steps = parse_chain(question)
    text = str(total)
    for index, (operator, number) in enumerate(steps, start=2):
        term = number if operator == "+" else -number
        carries = carries_or_borrows(total, term)
        may_forget = carries and (not error_terms or number in error_terms)
        forgets = may_forget and rng.random() < error_prob
        total = add_without_carry(total, term) if forgets else total + term
        label = term_label(index) if numbered else ""
        note = CARRY_NOTE if carries and not forgets else ""
        text += f"{label} {operator} {number} = {note}{total}"
    return f"{text}\n{ANSWER_MARKER}{total}"
