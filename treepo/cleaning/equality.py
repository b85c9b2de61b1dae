"""Whether two answers mean the same, by the verifier of mathematics that training rewards with."""

from __future__ import annotations

import functools

from rewards.records import RewardItem
from treepo.cleaning.texts import bare

# Symbolic comparison of long formulas can take for ever, and nobody can stop it here: beyond so
# many characters answers are compared as text.
_LONGEST = 200


@functools.lru_cache(maxsize=65536)
def answer_key(answer: str) -> str:
    """One spelling of equal answers: as the verifier writes them, else their bare text."""
    from rewards.math import canonical, parse_answer

    parsed = parse_answer(answer) if len(answer) <= _LONGEST else []
    return canonical(parsed) if parsed else bare(answer)


def same_answer(reference: str, answer: str) -> bool:
    """Whether the verifier would accept ``answer``; as text where either means nothing to it."""
    from rewards.math import make, parse_answer

    if bare(reference) == bare(answer) and bare(answer):
        return True
    if answer_key(reference) == answer_key(answer):
        return True
    if max(len(reference), len(answer)) > _LONGEST or not parse_answer(reference):
        return False
    item = RewardItem(
        data_source="", prompt="", solution_str=answer, ground_truth="\\boxed{" + reference + "}"
    )
    return make("whole")(item).value == 1.0
