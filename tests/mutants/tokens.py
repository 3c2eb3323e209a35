"""A tokenizer for the C++ and the Python of this project, with matching brackets and operand boundaries.

It knows just enough for mutations: binary operators stand between spaces (the formatters see to that), which is also
what tells a comparison from the angle brackets of a template.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, field

_COMMON = r"""
  (?P<number>(?:0[xX][0-9a-fA-F']+|(?:\d[\d_']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[fFuUlL]*)
 |(?P<name>[A-Za-z_]\w*)
"""
_CPP = re.compile(
    r"""(?P<skip>[ \t\r\n]+|//[^\n]*|/\*.*?\*/|(?:(?<=\n)|\A)[ \t]*\#(?:\\\n|[^\n])*)
 |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
 |"""
    + _COMMON
    + r"""|(?P<op><<=|>>=|\.\.\.|->|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|::|.)""",
    re.VERBOSE | re.DOTALL,
)
_PYTHON = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*|\\\n)
 |(?P<newline>\n)
 |(?P<string>[rbfRBF]{0,2}(?:\"\"\".*?\"\"\"|'''.*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
 |"""
    + _COMMON
    + r"""|(?P<op>\*\*|//|->|:=|<<|>>|<=|>=|==|!=|[-+*/%&|^@]=|.)""",
    re.VERBOSE | re.DOTALL,
)

#: Binding strength of binary operators; a higher number binds more tightly.
LEVELS = {
    "or": 1, "||": 1, "and": 2, "&&": 2,
    "<": 3, ">": 3, "<=": 3, ">=": 3, "==": 3, "!=": 3,
    "|": 4, "&": 5, "<<": 6, ">>": 6, "+": 7, "-": 7, "*": 8, "/": 8, "//": 8, "%": 8, "@": 8,
}  # fmt: skip
_KEYWORDS = frozenset([*keyword.kwlist, "case"]).difference(["True", "False", "None"])
#: Where an expression ends: nothing binds across these.
_SEPARATORS = frozenset(
    [",", ";", "=", ":", "?", "\n", ":=", "->", *(f"{op}=" for op in "+-*/%&|^@")]
) | _KEYWORDS.difference({"and", "or", "not"})


@dataclass
class Token:
    """A token, where it lies in the text, and the index of the bracket that closes or opens it (-1 for others)."""

    kind: str  # name, number, string, op or newline
    text: str
    start: int
    end: int
    match: int = -1
    binary: bool = False


@dataclass
class Tokens:
    """The tokens of one file."""

    text: str
    python: bool
    list: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        opened: list[int] = []
        for found in (_PYTHON if self.python else _CPP).finditer(self.text):
            kind = found.lastgroup
            assert kind is not None
            if kind == "skip" or (kind == "newline" and opened):
                continue
            token = Token(kind, found[0], found.start(), found.end())
            if kind == "op" and token.text in "([{":
                opened.append(len(self.list))
            elif kind == "op" and token.text in ")]}":
                token.match = opened.pop()
                self.list[token.match].match = len(self.list)
            self.list.append(token)
        assert not opened, "unbalanced brackets"
        for n, token in enumerate(self.list):
            token.binary = token.text in LEVELS and self._stands_between_operands(n)

    def _stands_between_operands(self, n: int) -> bool:
        token = self.list[n]
        if n == 0 or n + 1 == len(self.list):
            return False
        spaced = self.text[token.start - 1].isspace() and self.text[token.end].isspace()
        before = self.list[n - 1]
        operand = before.kind in ("number", "string") or before.text in (")", "]", "}")
        return spaced and (operand or (before.kind == "name" and before.text not in _KEYWORDS))

    def _ends_expression(self, n: int, level: int) -> bool:
        token = self.list[n]
        return token.text in _SEPARATORS or (token.binary and LEVELS[token.text] <= level)

    def right_operand(self, n: int) -> int:
        """The index of the last token of what the binary operator at ``n`` takes on its right."""
        level, k = LEVELS[self.list[n].text], n + 1
        while k < len(self.list) and not self._ends_expression(k, level):
            token = self.list[k]
            if token.match > k:
                k = token.match
            elif token.match >= 0:
                break
            k += 1
        return k - 1

    def left_operand(self, n: int, chain: bool = False) -> int | None:
        """The index of the first token on the left of ``n``; None where an operator of the same strength precedes.

        chain: operators of the same strength belong to what is on the left.
        """
        level, k = LEVELS[self.list[n].text] - chain, n - 1
        while k >= 0 and not self._ends_expression(k, level):
            token = self.list[k]
            if 0 <= token.match < k:
                k = token.match
            elif token.match >= 0:
                break
            k -= 1
        same = not chain and k >= 0 and self.list[k].binary and LEVELS[self.list[k].text] == level
        return None if same else k + 1

    def arguments(self, opening: int) -> list[tuple[int, int]]:
        """(first, last) token of every argument between the bracket at ``opening`` and its partner."""
        closing, spans, first, k = self.list[opening].match, [], opening + 1, opening + 1
        while k <= closing:
            if k == closing or self.list[k].text == ",":
                if k > first:
                    spans.append((first, k - 1))
                first = k + 1
            elif self.list[k].match > k:
                k = self.list[k].match
            k += 1
        return spans

    def enclosing(self, n: int) -> int:
        """The bracket that was opened last before token ``n``; -1 if there is none."""
        while n > 0:
            n -= 1
            match = self.list[n].match
            if match > n:
                return n
            n = match if match >= 0 else n
        return -1

    def slice(self, first: int, last: int) -> str:
        return self.text[self.list[first].start : self.list[last].end]
