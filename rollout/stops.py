"""Stop sequences and stop strings, found as tokens are drawn.

A set of patterns is one automaton (Aho and Corasick 1975, "Efficient string matching"): its state
is the longest end of what was drawn that begins a pattern, so a stop may be spread over any number
of tokens and segments at no further cost. Token sequences are patterns of tokens. Strings are
patterns of UTF-8 bytes, and a token is the bytes it spells; what the automaton finds is then looked
for in the decoded response, which has the last word. All rows that look for the same patterns move
on in one table lookup.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rollout.extend import ExtendSpec, StopReason
from rollout.token_text import TokenText

_MOST_KEPT = 256  # matchers that are kept for further requests


class Matcher(Protocol):
    """Looks for a set of stops in many responses."""

    def start(self, token_ids: np.ndarray) -> int:
        """State behind the response ``token_ids``."""
        ...

    def advance(self, states: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States after one more token each, and whether a stop may be complete: [n] each."""
        ...

    def found(self, token_ids: np.ndarray) -> StopReason | None:
        """The stop that the last token of a response completes; asked where one may be."""
        ...


class Automaton:
    """The patterns' automaton over tokens that spell symbols.

    Args:
        patterns: sequences of symbols (integers >= 0), none empty.
        spell: a token's symbols.
    """

    def __init__(
        self, patterns: Sequence[Sequence[int]], spell: Callable[[int], Sequence[int]]
    ) -> None:
        self._spell = spell
        self._symbols = {s: i + 1 for i, s in enumerate(sorted({s for p in patterns for s in p}))}
        self._longest = max(map(len, patterns))
        self._next, self._is_final = _automaton(
            [[self._symbols[s] for s in p] for p in patterns], len(self._symbols) + 1
        )
        # Row of a token in the two tables below, which hold each token once it was drawn.
        self._row_of = np.full(0, -1, np.int64)
        self._num_rows = 0
        num_states = len(self._is_final)
        self._after = np.zeros((16, num_states), np.int32)
        self._hits = np.zeros((16, num_states), bool)

    def start(self, token_ids: np.ndarray) -> int:
        """See ``Matcher``; only the last symbols matter."""
        known, first = 0, len(token_ids)
        while first > 0 and known < self._longest:
            first -= 1
            known += len(self._spell(int(token_ids[first])))
        state = np.zeros(1, np.int64)
        for i in range(first, len(token_ids)):
            state, _ = self.advance(state, token_ids[i : i + 1])
        return int(state[0])

    def advance(self, states: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Matcher``."""
        largest = int(token_ids.max())
        if largest >= len(self._row_of):
            more = np.full(max(largest + 1 - len(self._row_of), len(self._row_of)), -1, np.int64)
            self._row_of = np.concatenate([self._row_of, more])
        rows = self._row_of[token_ids]
        if (rows < 0).any():
            for token in np.unique(token_ids[rows < 0]).tolist():
                self._learn(token)
            rows = self._row_of[token_ids]
        return self._after[rows, states], self._hits[rows, states]

    def _learn(self, token: int) -> None:
        """Where a token leads from every state, and whether it passes a pattern's end."""
        if self._num_rows == len(self._after):
            self._after = np.concatenate([self._after, np.zeros_like(self._after)])
            self._hits = np.concatenate([self._hits, np.zeros_like(self._hits)])
        state = np.arange(len(self._is_final))
        hits = np.zeros(len(state), bool)
        for symbol in self._spell(token):
            state = self._next[state, self._symbols.get(symbol, 0)]
            hits |= self._is_final[state]
        self._after[self._num_rows], self._hits[self._num_rows] = state, hits
        self._row_of[token] = self._num_rows
        self._num_rows += 1


class SequenceMatcher(Automaton):
    """Stops that are token sequences."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        super().__init__(sequences, lambda token: (token,))
        self._sequences = sorted(sequences, key=len, reverse=True)

    def found(self, token_ids: np.ndarray) -> StopReason | None:
        """See ``Matcher``; the longest of several."""
        for sequence in self._sequences:
            if tuple(token_ids[-len(sequence) :].tolist()) == sequence:
                return sequence
        return None


class _Texts:
    """Stops that are strings of the decoded response."""

    def __init__(self, strings: Sequence[str], text: TokenText) -> None:
        self._strings = strings
        self._text = text

    def found(self, token_ids: np.ndarray) -> StopReason | None:
        """See ``Matcher``; of several the one that begins first, then the longest.

        A string is found where it ends in text that was not there before the last token.
        """
        before, after = self._text.decode(token_ids[:-1]), self._text.decode(token_ids)
        old = _common_prefix(before, after)
        best: tuple[int, int, str] | None = None
        for string in self._strings:
            start = after.find(string, max(0, old - len(string) + 1))
            if start >= 0:
                best = min(best or (start, -len(string), string), (start, -len(string), string))
        return None if best is None else best[2]


class TextMatcher(_Texts, Automaton):
    """Stop strings of a tokenizer whose tokens spell bytes."""

    def __init__(self, strings: Sequence[str], text: TokenText) -> None:
        _Texts.__init__(self, strings, text)
        Automaton.__init__(self, [s.encode() for s in strings], text.spell)


class DecodingMatcher(_Texts):
    """Stop strings of any tokenizer: the response is decoded after each token, which is slow."""

    def start(self, token_ids: np.ndarray) -> int:
        """See ``Matcher``: nothing to know."""
        return 0

    def advance(self, states: np.ndarray, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Matcher``: always maybe."""
        return states, np.ones(len(states), bool)


class StopRules:
    """The matchers in use. Requests with the same stops share one.

    Args:
        text: of the model's tokenizer; it is loaded when a stop string is first used.
    """

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._kept: OrderedDict[tuple[str, tuple], Matcher] = OrderedDict()

    def matchers(self, spec: ExtendSpec) -> list[Matcher]:
        """What looks for the spec's stop sequences and strings.

        Raises:
            ValueError: there are stop strings and no tokenizer.
        """
        found: list[Matcher] = []
        if sequences := spec.stop_token_sequences:
            found.append(self._keep("sequences", sequences, lambda: SequenceMatcher(sequences)))
        if strings := spec.stop_strings:
            found.append(self._keep("strings", strings, lambda: self._of_strings(strings)))
        return found

    def _of_strings(self, strings: tuple[str, ...]) -> Matcher:
        kind = TextMatcher if self._text.spells_bytes else DecodingMatcher
        return kind(strings, self._text)

    def _keep(self, kind: str, stops: tuple, make: Callable[[], Matcher]) -> Matcher:
        """The matcher of these stops; the ones used last are kept."""
        matcher = self._kept.pop((kind, stops), None)
        self._kept[kind, stops] = matcher = make() if matcher is None else matcher
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return matcher


def _automaton(
    patterns: Sequence[Sequence[int]], num_symbols: int
) -> tuple[np.ndarray, np.ndarray]:
    """``next`` int64 [states, num_symbols] and ``is_final`` bool [states]; state 0 is the start.

    State = a prefix of a pattern; ``next`` is the longest end of (prefix + symbol) that is a
    prefix again. A state is final if a pattern ends in it, its own or a shorter one.
    """
    children: list[dict[int, int]] = [{}]
    final = [False]
    for pattern in patterns:
        state = 0
        for symbol in pattern:
            if symbol not in children[state]:
                children[state][symbol] = len(children)
                children.append({})
                final.append(False)
            state = children[state][symbol]
        final[state] = True
    table = np.zeros((len(children), num_symbols), np.int64)
    queue = deque([(0, 0)])  # (state, its longest proper end that is a state)
    while queue:
        state, fallback = queue.popleft()
        if state:
            table[state] = table[fallback]
            final[state] = final[state] or final[fallback]
        for symbol, child in children[state].items():
            queue.append((child, int(table[fallback, symbol]) if state else 0))
            table[state, symbol] = child
    return table, np.array(final)


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
