"""Choose the verifier by where the problem comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewards.records import RewardItem
from rewards.registry import Part, PartResult, make_part

# data sources by name or by the part before the first "/" or the whole; the names are those of
# verl's and of the Hub's data sets
SOURCES = {
    "reasoning_gym": "reasoning_gym",
    "openai/gsm8k": "math",
    "gsm8k": "math",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
    "hendrycks/competition_math": "math",
    "agentica-org/DeepScaleR-Preview-Dataset": "math",
    "math_dapo": "math",
    "math": "math",
    "aime": "math",
}


def verifier_of(data_source: str, sources: Mapping[str, str] | None = None) -> str:
    """Name of the part that judges ``data_source``: by its full name, else by what stands before
    its first ``/``.

    Raises:
        ValueError: nothing is known for it; the message says how to name one.
    """
    table = {**SOURCES, **(sources or {})}
    for key in (data_source, data_source.split("/", 1)[0]):
        if key in table:
            return table[key]
    raise ValueError(
        f"no verifier is known for data_source {data_source!r} (known: {', '.join(table)}); name "
        "one, e.g. reward.parts={math: {}}, or map it with "
        "reward.parts.auto.options.sources={'" + data_source + "': math}"
    )


def make(
    sources: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> Part:
    """A part that hands each item to the verifier of its data source.

    Args:
        sources: further data sources, ``{data_source: part}``.
        options: options of the verifiers, ``{part: {option: value}}``.
    """
    made: dict[str, Part] = {}
    # Made here, before any fork, so that importing a verifier is paid once.
    for name in sorted({*SOURCES.values(), *(sources or {}).values()}):
        made[name] = make_part(name, (options or {}).get(name, {}))
    for name in options or {}:
        if name not in made:
            raise ValueError(
                f"reward part 'auto': options names {name!r}, which no data source uses; used "
                f"are {', '.join(made)}"
            )

    def auto(item: RewardItem) -> PartResult:
        return made[verifier_of(item.data_source, sources)](item)

    return auto
