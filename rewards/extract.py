r"""Find the final answer in a response.

The last occurrence wins: a model that corrects itself is judged by what it said last. Known forms:

- ``hash``: the rest of the line after the last ``####`` (GSM8K)
- ``boxed``: the content of the last ``\boxed{...}`` with balanced braces (MATH)
- ``answer_tag``: between the last ``<answer>`` and ``</answer>``
- ``whole``: the whole response
- ``auto``: the first of hash, boxed and answer_tag that is there
- any other text is a marker of your own: the rest of the line after its last occurrence

Every search is linear in the length of the response.
"""

from __future__ import annotations

FORMS = ("auto", "hash", "boxed", "answer_tag", "whole")


def extract_answer(text: str, form: str) -> str | None:
    """The stripped answer in ``text``, or None where the form is absent or holds nothing."""
    if form == "auto":
        for each in ("hash", "boxed", "answer_tag"):
            answer = extract_answer(text, each)
            if answer is not None:
                return answer
        return None
    if form == "whole":
        return text.strip() or None
    if form == "boxed":
        return last_boxed(text)
    if form == "answer_tag":
        return _last_between(text, "<answer>", "</answer>")
    return _rest_of_line(text, "####" if form == "hash" else form)


def check_form(form: str) -> None:
    """Raise ``ValueError`` for an empty marker."""
    if not form.strip():
        raise ValueError(
            f"reward option extraction={form!r}: must be one of {', '.join(FORMS)}, or a marker "
            "that stands before the answer, e.g. 'Answer:'"
        )


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{...}`` or ``\fbox{...}``; None if there is none."""
    end = len(text)
    while True:
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        content = _braced(text, start + (6 if text.startswith("\\boxed", start) else 5), end)
        if content is not None and content.strip():
            return content.strip()
        end = start


def _braced(text: str, start: int, end: int) -> str | None:
    """Content of the balanced braces that open at or, after spaces, just behind ``start``. The
    search stops at ``end``, so that unfinished boxes cost linear time together.
    """
    while start < end and text[start] == " ":
        start += 1
    if start >= end or text[start] != "{":
        return None
    depth = 0
    escaped = False
    for position in range(start, end):
        char = text[position]
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
    return None


def _last_between(text: str, opening: str, closing: str) -> str | None:
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    if start < 0:
        return None
    return text[start + len(opening) : end].strip() or None


def _rest_of_line(text: str, marker: str) -> str | None:
    start = text.rfind(marker)
    if start < 0:
        return None
    start += len(marker)
    end = text.find("\n", start)
    return (text[start:] if end < 0 else text[start:end]).strip() or None
