"""All mutants of a C++ file in one compilation: each behind a switch that is set when the library is loaded.

    x = a + b;    becomes    x = (FB_MUTANT(7) ? (a - b) : FB_MUTANT(8) ? (a) : (a + b));

Compiling takes most of the time that a mutant costs, so it is done once. What the compiler does not take in a switch (a
constant that must be known at compile time, a declaration) is compiled by itself: see `Switched.alone`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .generate import Mutant
from .tokens import Tokens

#: Read once, when the library is loaded, from the variable of the same name in the environment.
VARIABLE = "FUSEBLOCK_MUTANT"
DECLARATION = (
    "extern int fuseblock_mutant;\n#define FB_MUTANT(n) (__builtin_expect(::fuseblock_mutant == (n), 0))\n"
)
DEFINITION = (
    "#include <cstdlib>\nextern int fuseblock_mutant;\n"
    f'int fuseblock_mutant = std::getenv("{VARIABLE}") ? std::atoi(std::getenv("{VARIABLE}")) : -1;\n'
)
_MARK = re.compile(r"/\*mutant (\d+)\*/")
_ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=")
_DELIMITERS = frozenset([",", ";", "return", "?", ":", "else", "FB_EACH", *_ASSIGNMENTS])


@dataclass
class _Segment:
    """Text that is replaced as a whole by the alternatives in it; statements are left out, expressions exchanged."""

    start: int
    end: int
    statement: bool
    mutants: list[int] = field(default_factory=list)


class Switched:
    """A file with its mutants, numbered as in the list given.

    Attributes:
        alone: numbers of the mutants that must be compiled one by one.
    """

    def __init__(self, text: str, mutants: Sequence[Mutant]) -> None:
        self.text, self.mutants, self.alone = text, mutants, set[int]()
        self._tokens = Tokens(text, python=False)
        self._segments: dict[tuple[int, int, bool], _Segment] = {}
        for number, mutant in enumerate(mutants):
            key = self._segment_of(mutant)
            if key is None:
                self.alone.add(number)
            else:
                self._segments.setdefault(key, _Segment(*key)).mutants.append(number)

    def _segment_of(self, mutant: Mutant) -> tuple[int, int, bool] | None:
        """The smallest expression around a mutant, or its statement; None if neither can be told."""
        if mutant.replacement == ";":
            return mutant.start, mutant.end, True
        tokens = self._tokens.list
        inside = [n for n, t in enumerate(tokens) if t.end > mutant.start and t.start < mutant.end]
        if not inside:
            return None
        first, last = inside[0], inside[-1]
        while first > 0 and tokens[first - 1].text not in _DELIMITERS:
            if tokens[first - 1].match >= first:
                break  # the bracket that encloses the mutant
            first = tokens[first - 1].match if tokens[first - 1].match >= 0 else first - 1
        while last + 1 < len(tokens) and tokens[last + 1].text not in _DELIMITERS:
            if 0 <= tokens[last + 1].match <= last:
                break
            last = max(last + 1, tokens[last + 1].match)
        after = tokens[last + 1].text if last + 1 < len(tokens) else ""
        before = tokens[first - 1].text if first else ""
        if after in _ASSIGNMENTS and self._declares(first, last):
            return None
        if after == ";" and before in (";", "{", "}", "else", "FB_EACH") and not self._in_loop_header(first):
            return None  # a whole statement
        if after == ":" and before != "?":
            return None
        return tokens[first].start, tokens[last].end, False

    def _declares(self, first: int, last: int) -> bool:
        """Whether the left of an assignment is a declaration or has a header before it, and so is no expression."""
        tokens = self._tokens.list[first : last + 1]
        pairs = pairwise(tokens)
        return tokens[0].text in ("if", "for", "while") or any(a.kind == b.kind == "name" for a, b in pairs)

    def _in_loop_header(self, n: int) -> bool:
        opening = self._tokens.enclosing(n)
        tokens = self._tokens.list
        return opening > 0 and tokens[opening].text == "(" and tokens[opening - 1].text == "for"

    def render(self, without: frozenset[int] | set[int] = frozenset()) -> str:
        """The text with a switch for every mutant but those ``without`` and `alone`."""
        left_out = self.alone | set(without)
        segments = []
        for s in self._segments.values():
            numbers = [n for n in s.mutants if n not in left_out]
            if numbers:
                segments.append(_Segment(s.start, s.end, s.statement, numbers))
        segments.sort(key=lambda s: (s.start, -s.end, s.statement))
        return DECLARATION + self._rendered(0, len(self.text), segments)

    def _rendered(self, start: int, end: int, segments: list[_Segment]) -> str:
        out, at, k = [], start, 0
        while k < len(segments):
            segment = segments[k]
            k += 1
            if segment.start < at or segment.end > end:
                self.alone.update(segment.mutants)  # overlaps another: cannot be nested
                continue
            inner = []
            while k < len(segments) and segments[k].end <= segment.end:
                inner.append(segments[k])
                k += 1
            out.append(self.text[at : segment.start])
            out.append(self._switch(segment, self._rendered(segment.start, segment.end, inner)))
            at = segment.end
        return "".join([*out, self.text[at:end]])

    def _switch(self, segment: _Segment, original: str) -> str:
        if segment.statement:
            numbers = " && ".join(f"!FB_MUTANT({n})" for n in segment.mutants)
            marks = "".join(f"/*mutant {n}*/" for n in segment.mutants)
            return f"\n{marks} {{ if ({numbers}) {original} }}\n"
        choices = []
        # A condition may be anything that converts to bool, also explicitly; its alternative is a plain bool.
        truth = (
            "bool" if any(self.mutants[n].replacement in ("true", "false") for n in segment.mutants) else ""
        )
        for n in segment.mutants:
            m = self.mutants[n]
            choice = self.text[segment.start : m.start] + m.replacement + self.text[m.end : segment.end]
            choices.append(f"\n/*mutant {n}*/ FB_MUTANT({n}) ? {truth}({' '.join(choice.split())}) :")
        marks = "".join(f"/*mutant {n}*/" for n in segment.mutants)
        return f"({''.join(choices)}\n{marks} {truth}({original}))"

    def refused(self, rendered: str, messages: str, filename: str) -> set[int]:
        """Mutants on the lines that the compiler complains about; they are compiled alone from now on."""
        lines = rendered.splitlines()
        found = set()
        for number in re.findall(rf"{re.escape(filename)}:(\d+):\d+: error", messages):
            line = lines[int(number) - 1] if int(number) <= len(lines) else ""
            found.update(int(n) for n in _MARK.findall(line))
        self.alone |= found
        return found
