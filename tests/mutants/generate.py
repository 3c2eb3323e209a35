"""The mutants of a file: every mutation operator, applied wherever it fits. Nothing is chosen by hand."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .tokens import Token, Tokens

_SIGNS = {"+": "-", "-": "+", "+=": "-=", "-=": "+="}
_COMPARISONS = {
    "<": ("<=", ">="), ">": (">=", "<="), "<=": ("<", ">"), ">=": (">", "<"), "==": ("!=",), "!=": ("==",),
}  # fmt: skip
_ASSIGNMENTS = frozenset(["=", "+=", "-=", "*=", "/=", "//=", "@="])
_DROPPED = frozenset(["+", "-", "*", "/", "@", "&", "&&", "||", "and", "or"])
_NEXT_GATE = {"i": "f", "f": "g", "g": "o", "o": "i"}
_NEXT_GRADIENT = {"di": "df", "df": "dg", "dg": "d_o", "d_o": "di"}  # C++ has a keyword `do`
_GATE_NAME = re.compile(r"((?:\w*_)?|d)([ifgo])")
_ZERO_ONE = re.compile(r"([01])(\.0?f?|\.f)?")
_BARRIER = re.compile(
    r"(?:\w+\.)*\w*(?:wait|(?<!a)sync|barrier|arrive|fence|expect|commit|leave)\w*(?:<\w+>)?\("
)
#: Subscripts made of these alone are known when the compiler runs: sizes of arrays, places in registers.
_CONSTANT = re.compile(r"k?[A-Z]\w*|sizeof|static_cast|int|unsigned")
_DECLARATION = re.compile(
    "return|const|using|for|if|while|do|typedef|template|constexpr|static|typename|auto|struct|switch|case|break|"
    "continue|namespace|public|private|extern|inline|explicit|default|goto"
)


@dataclass(frozen=True)
class Mutant:
    """``text[start:end]`` of a file replaced by ``replacement``."""

    path: str
    operator: str
    start: int
    end: int
    replacement: str
    line: int
    original: str  # the lines that change, stripped
    mutated: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}"

    def applied(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]


def generate(path: str, text: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines, each different from all others."""
    tokens = Tokens(text, path.endswith(".py"))
    mutants: dict[str, Mutant] = {}
    for operator, start, end, replacement in _edits(path, tokens):
        mutated = text[:start] + replacement + text[end:]
        if mutated != text and mutated not in mutants:
            first = text.rfind("\n", 0, start) + 1
            last = text.find("\n", end)
            last = len(text) if last < 0 else last
            changed = text[first:start] + replacement + text[end:last]
            mutants[mutated] = Mutant(
                path, operator, start, end, replacement, text.count("\n", 0, start) + 1,
                _squeezed(text[first:last]), _squeezed(changed),
            )  # fmt: skip
    return sorted(mutants.values(), key=lambda m: (m.start, m.end, m.replacement))


def _squeezed(lines: str) -> str:
    return " ".join(lines.split())


_Edit = tuple[str, int, int, str]


def _edits(path: str, tokens: Tokens) -> Iterator[_Edit]:
    for n, token in enumerate(tokens.list):
        yield from _of_operators(tokens, n, token)
        yield from _of_constants(tokens, n, token)
        yield from _of_gates(tokens, n, token)
        yield from _of_masks(tokens, n, token)
        if path.endswith((".cu", ".cuh")):
            yield from _of_buffers(tokens, n, token)
    yield from _of_statements(tokens)


def _of_operators(tokens: Tokens, n: int, token: Token) -> Iterator[_Edit]:
    if token.text in _SIGNS and (token.binary or token.text in ("+=", "-=")):
        yield "sign", token.start, token.end, _SIGNS[token.text]
    elif token.text == "-" and n > 0 and not _is_operand(tokens.list[n - 1]):
        yield "sign", token.start, token.end, ""
    if token.text in _COMPARISONS and token.binary:
        for other in _COMPARISONS[token.text]:
            yield "comparison", token.start, token.end, other
    if token.text in _DROPPED and token.binary:
        last = tokens.right_operand(n)
        if last > n:
            yield "term", tokens.list[n - 1].end, tokens.list[last].end, ""
        first = tokens.left_operand(n)
        if first is not None and first < n and token.text not in ("/", "@"):
            yield "term", tokens.list[first].start, tokens.list[n + 1].start, ""


def _is_operand(token: Token) -> bool:
    if token.kind == "name":
        return not keyword.iskeyword(token.text)
    return token.kind in ("number", "string") or token.text in (")", "]", "}")


def _of_constants(tokens: Tokens, n: int, token: Token) -> Iterator[_Edit]:
    if token.kind == "number" and (found := _ZERO_ONE.fullmatch(token.text)):
        yield "constant", token.start, token.end, ("1" if found[1] == "0" else "0") + (found[2] or "")


def _of_gates(tokens: Tokens, n: int, token: Token) -> Iterator[_Edit]:
    before = tokens.list[n - 1].text if n else ""
    after = tokens.list[n + 1].text if n + 1 < len(tokens.list) else ""
    found = _GATE_NAME.fullmatch(token.text) if token.kind == "name" else None
    if tokens.python and found and after != "=":
        yield "gate", token.start, token.end, found[1] + _NEXT_GATE[found[2]]
    # A single letter of C++ is a gate only as a member: loops count with i there.
    if not tokens.python and before == "." and token.text in _NEXT_GATE:
        yield "gate", token.start, token.end, _NEXT_GATE[token.text]
    if not tokens.python and token.text in _NEXT_GRADIENT and after != "=":
        yield "gate", token.start, token.end, _NEXT_GRADIENT[token.text]
    if token.text in ("2", "3") and (after == "*" or (before in "[," and after in "],")):
        yield "gate", token.start, token.end, "3" if token.text == "2" else "2"


def _of_masks(tokens: Tokens, n: int, token: Token) -> Iterator[_Edit]:
    after = tokens.list[n + 1] if n + 1 < len(tokens.list) else None
    if after is None:
        return
    if token.text in ("where", "_where") and after.text == "(" and tokens.list[n - 1].text != "def":
        first = n - 2 if tokens.list[n - 1].text == "." else n
        _, value, other, *_ = tokens.arguments(n + 1)
        for span in (value, other):
            end = tokens.list[after.match].end
            yield "mask", tokens.list[first].start, end, f"({tokens.slice(*span)})"
    if token.text == "mask" and after.text == "=" and (opening := tokens.enclosing(n)) >= 0:
        last = next(b for a, b in tokens.arguments(opening) if a == n)
        yield "mask", tokens.list[n - 1].start, tokens.list[last].end, ""
    if token.text == "if" and not tokens.python and after.text in ("(", "constexpr"):
        opening = n + 1 if after.text == "(" else n + 2
        closing = tokens.list[opening].match
        yield "mask", tokens.list[opening].end, tokens.list[closing].start, "false"
    if token.text == "?":
        yield from _of_selection(tokens, n)
    if token.text == "if" and tokens.python:
        yield from _of_python_if(tokens, n)


def _of_selection(tokens: Tokens, n: int) -> Iterator[_Edit]:
    """``condition ? a : b`` of C++ always gives a, or always b."""
    first = n
    while first > 0 and tokens.list[first - 1].text not in (",", ";", "=", "return", ":", "?"):
        match = tokens.list[first - 1].match
        if match >= first:
            break
        first = match if match >= 0 else first - 1
    for chosen in ("true", "false"):
        yield "mask", tokens.list[first].start, tokens.list[n - 1].end, chosen


def _of_python_if(tokens: Tokens, n: int) -> Iterator[_Edit]:
    """The condition of an ``if`` statement or expression becomes False, that of an expression also True."""
    statement = n == 0 or tokens.list[n - 1].kind == "newline"
    last = n + 1
    while tokens.list[last].text not in (":", "else") and tokens.list[last].kind != "newline":
        if tokens.list[last].match >= 0 and tokens.list[last].match < last:
            return  # a filter of a comprehension
        last = max(last, tokens.list[last].match) + 1
    span = tokens.list[n + 1].start, tokens.list[last - 1].end
    yield "mask", *span, "False"
    if not statement:
        yield "mask", *span, "True"


def _of_buffers(tokens: Tokens, n: int, token: Token) -> Iterator[_Edit]:
    """What threads exchange goes to the first place of all, or to the other one of two; a barrier has the other parity."""
    if token.text == "[" and n > 0 and _is_operand(tokens.list[n - 1]):
        names = [t.text for t in tokens.list[n + 1 : token.match] if t.kind == "name"]
        if not all(map(_CONSTANT.fullmatch, names)):
            yield "slot", token.end, tokens.list[token.match].start, "0"
    if token.text == "%" and token.binary and tokens.list[n + 1].text == "2":
        first = tokens.left_operand(n, chain=True)
        assert first is not None
        start, end = tokens.list[first].start, tokens.list[n - 1].end
        yield "parity", start, end, f"({tokens.text[start:end]} + 1)"


def _of_statements(tokens: Tokens) -> Iterator[_Edit]:
    for first, last in statements(tokens):
        text = tokens.slice(first, last)
        kind = _removable(tokens, first, last)
        if kind is not None:
            operator = "barrier" if _BARRIER.match(text) else kind
            end = tokens.list[last].end
            yield operator, tokens.list[first].start, end, "pass" if tokens.python else ";"


def _removable(tokens: Tokens, first: int, last: int) -> str | None:
    """Why a statement may be removed without a compiler noticing: it is a call, or an assignment to what exists."""
    list_ = tokens.list
    word = list_[first].text
    if list_[first].kind != "name" or keyword.iskeyword(word) or _DECLARATION.fullmatch(word):
        return None
    # `a.b<C>[i](...)` or the same followed by an assignment; anything else has two names in a row: a declaration.
    k = first
    while k <= last and list_[k].text not in _ASSIGNMENTS:
        if k > first and list_[k].kind == "name" and list_[k - 1].kind == "name":
            return None
        if list_[k].text in ("*", "&", "{", ":", ",") or list_[k].kind == "string":
            return None
        k = max(k, list_[k].match) + 1
    if k > last:
        end = last if tokens.python else last - 1
        return "store" if list_[end].text == ")" else None
    # A plain Python name on the left of `=` may be a definition, without which the rest cannot run at all.
    plain = tokens.python and list_[k].text == "=" and k == first + 1
    return None if plain else "store"


def statements(tokens: Tokens) -> Iterator[tuple[int, int]]:
    """(first, last) token of every simple statement, headers of ifs and loops before it left out."""
    for n, token in enumerate(tokens.list):
        if token.text not in (";", "\n") or (token.text == "\n" and not tokens.python):
            continue
        k = n - 1
        while k >= 0 and tokens.list[k].text not in (";", "{", "}", "\n"):
            if tokens.list[k].match > k:
                break  # within the brackets of a for loop or of a call
            k = tokens.list[k].match - 1 if tokens.list[k].match >= 0 else k - 1
        first, last = k + 1, n if token.text == ";" else n - 1
        opening = tokens.enclosing(first)
        if opening >= 0 and tokens.list[opening].text != "{":
            continue  # in the header of a for loop
        first = first if tokens.python else _after_headers(tokens, first, last)
        if first <= last and tokens.list[first].text != ";":
            yield first, last


def _after_headers(tokens: Tokens, first: int, last: int) -> int:
    while first <= last:
        text, nxt = tokens.list[first].text, tokens.list[min(first + 1, last)]
        if text in ("if", "for", "while", "switch") and nxt.text in ("(", "constexpr"):
            opening = first + 1 if nxt.text == "(" else first + 2
            first = tokens.list[opening].match + 1
        elif text in ("else", "FB_EACH", "do"):
            first += 1
        elif text in ("public", "private", "default") and nxt.text == ":":
            first += 2
        else:
            break
    return first
