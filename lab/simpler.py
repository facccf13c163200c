"""Whether a change makes a program simpler without a doubt: it only takes code away."""

import io
import token
import tokenize

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)


def only_deletes(source: bytes, base: bytes) -> bool:
    """Whether `source` is `base` without some of its code; comments, docstrings and layout count for nothing."""
    if len(source) >= len(base):
        return False
    try:
        left, before = code(source), code(base)
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return False
    remaining = iter(before)
    return len(left) < len(before) and all(each in remaining for each in left)


def code(source: bytes) -> list[tuple[int, str]]:
    """The tokens of a program as (kind, text), without what changes nothing."""
    lines = [[]]
    for kind, text, *_ in tokenize.generate_tokens(io.StringIO(source.decode()).readline):
        if kind in LAYOUT:
            continue
        lines[-1].append((kind, "" if kind in (token.NEWLINE, token.INDENT, token.DEDENT) else text))
        if kind == token.NEWLINE:
            lines.append([])
    return [each for line in lines if not docstring(line) for each in line]


def docstring(line) -> bool:
    """Whether a line says nothing but a string."""
    return [kind for kind, _ in line if kind not in (token.INDENT, token.DEDENT)] == [token.STRING, token.NEWLINE]
