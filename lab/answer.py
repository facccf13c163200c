"""What a model answers: from a reply to a train.py that is worth a trial, or to words that the model can act on."""

import contextlib
import difflib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.prompt import MARK, quoted
from lab.researcher import Draft, digest
from prepare import one_line

MOST_EDITS, LONGEST_SOURCE = 200, 2**18  # of an answer; characters of a train.py made from it


def proposal(content):
    """The proposal in the blocks of an answer: the tool's input, or the same read from plain text; None without one."""
    for block in content:
        if block.type == "tool_use":
            return block.input
    lines = "\n".join(block.text for block in content if block.type == "text").split("\n")
    edits, files = written_edits(lines), [code for code in written_files(lines) if "begin(" in code]
    taken = re.findall("[0-9a-f]{7,40}", named(lines, "take"))
    if not edits and not files and not taken:
        return None
    found = {"edits": edits} if edits else {"full_source": max(files, key=len)} if files else {"take": taken}
    first = next(filter(str.strip, lines))
    told = {name: named(lines, name) for name in ("hypothesis", "expected_gain")}
    return found | told | {"description": named(lines, "description") or first}


def expected_gain(given) -> float | None:
    """The gain that a proposal foretells, in bits per byte; None where it does not, or nothing that can be."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if abs(gain := float(given.get("expected_gain"))) < 10:  # false for nan
            return gain
    return None


def written_edits(lines):
    """The SEARCH/REPLACE blocks among the lines of an answer, as edits."""
    edits, old, part = [], None, None  # part: the lines of the text that is being read
    for line in lines:
        if re.match("<{5,} ?SEARCH", line):
            old, part = None, []
        elif part is not None and old is None and re.match(r"={5,}\s*$", line):
            old, part = "\n".join(part), []
        elif old is not None and re.match(">{5,} ?REPLACE", line):
            edits.append({"old_str": old, "new_str": "\n".join(part)})
            old = part = None
        elif part is not None:
            part.append(line)
    return edits


def written_files(lines):
    """The texts between ``` fences among the lines of an answer."""
    files, part = [], None
    for line in lines:
        if part is None and re.match(r"```\w*\s*$", line):
            part = []
        elif part is not None and line.startswith("```"):
            files.append("\n".join([*part, ""]))
            part = None
        elif part is not None:
            part.append(line)
    return files


def named(lines, name):
    """What follows `name`: in the first of the lines that begins with it; empty without one."""
    for line in lines:
        head, _, rest = line.partition(":")
        if len(head) < 50 and re.sub(r"\W+", "_", head.strip(" *#_-`")).lower() == name and re.search(r"\w", rest):
            return re.sub(r"^(?![+-]?\.?\d)\W+", "", rest.lstrip(" *_`"))
    return ""


def apply_proposal(given, base, near: dict[str, Draft]):
    """(source, None) for a proposal applied to the source `base`, or (None, what is wrong with it).

    near: near misses that it may take up again.
    """
    if not isinstance(given, dict) or not isinstance(given.get("description"), str):
        return None, "The answer proposes nothing: call propose_experiment, with description, hypothesis and edits."
    edits, full, taken = given.get("edits"), given.get("full_source"), given.get("take")
    if not edits and not full and isinstance(taken, list) and taken:
        return taken_up(taken, base, near)
    if not edits and isinstance(full, str):
        return full.rstrip("\n") + "\n", None
    if not edits or not isinstance(edits, list):
        return None, "Give edits, a list of {old_str, new_str}, or full_source."
    if len(edits) > MOST_EDITS:
        return None, f"These are {len(edits)} edits; give at most {MOST_EDITS}."
    pairs, problems, shown = [], [], 0
    for number, edit in enumerate(edits, 1):
        old, new = (edit.get("old_str"), edit.get("new_str")) if isinstance(edit, dict) else (None, None)
        if not isinstance(old, str) or not isinstance(new, str) or not old:
            problems.append(f"Edit {number}: old_str and new_str must be strings, and old_str not empty.")
        elif (count := base.count(old)) == 1:
            pairs.append((old, new))
        elif count:
            found = itertools.islice(re.finditer(re.escape(old), base), 9)
            starts = [base.count("\n", 0, match.start()) + 1 for match in found]
            problems.append(f"Edit {number}: old_str occurs {count} times, at lines {starts}; give more context.")
        elif shown < 2:  # looking for what resembles it takes time
            shown += 1
            near = quoted(nearest(old, base), 5000)
            problems.append(f"Edit {number}: old_str does not occur. The nearest lines are:\n{near}")
        else:
            problems.append(f"Edit {number} and perhaps others: old_str does not occur.")
            break
    if (source := edited(base, pairs)) is None:
        problems.append("Two edits overlap; make them one.")
    if problems:
        return None, "\n".join([*problems, "Nothing was applied. Call again with all the edits."])
    return source, None


def taken_up(commits, base, near):
    """(source, None) for the changes of near misses carried over to `base`, or (None, what is wrong)."""
    if len(commits) > len(near):
        return None, f"These are {len(commits)} near misses to take up; there are {len(near)}."
    source = base
    for commit in commits:
        if not isinstance(commit, str) or commit not in near:
            known = ", ".join(near) or "none"
            return None, f"There is no near miss {str(commit)[:40]!r} to take up; there are: {known}."
        if (source := carried_over(near[commit], source)) is None:
            return None, f"The change of {commit} does not fit this train.py, or the other ones; propose it as edits."
    return source, None


def edited(source, edits):
    """`source` with all the edits (old, new) applied; None where one does not occur exactly once, or two overlap."""
    if any(source.count(old) != 1 for old, _ in edits):
        return None
    places = sorted((source.index(old), source.index(old) + len(old), new) for old, new in edits)
    if any(first[1] > second[0] for first, second in itertools.pairwise(places)):
        return None
    for start, end, new in reversed(places):
        source = source[:start] + new + source[end:]
    return source


def nearest(old, source):
    """The lines of `source` that resemble `old` most, with their numbers; what was found within two seconds."""
    lines, wanted = source.splitlines(), old.strip("\n").splitlines()[:40] or [""]
    size, matcher, end = len(wanted), difflib.SequenceMatcher(autojunk=False), time.monotonic() + 2
    matcher.set_seq2("\n".join(wanted)[:2000])
    best, place = -1.0, 0
    for start in range(max(1, len(lines) - size + 1)):
        matcher.set_seq1("\n".join(lines[start : start + size])[:2000])
        if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best and matcher.ratio() > best:
            best, place = matcher.ratio(), start
        if time.monotonic() > end:
            break
    shown = range(max(0, place - 2), min(len(lines), place + size + 2))
    return "\n".join(f"{number + 1}: {lines[number]}" for number in shown)


def read_sources():
    """The life of a process that reads, from standard input, a source and the one it is made from, and tells as JSON:

    error, the words and the line of one that keeps it from compiling; begin and submit, whether it calls them; same,
    whether the two differ in nothing but comments and layout. What takes Python too deep or too far ends it alone.
    """
    import ast
    import json
    import resource
    import sys

    for kind, most in ((resource.RLIMIT_AS, 2**30), (resource.RLIMIT_CPU, 10), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))
    source, base = json.load(sys.stdin)
    try:
        tree = ast.parse(source.encode())
        compile(source.encode(), "train.py", "exec")
    except SyntaxError as error:
        return print(json.dumps({"error": f"line {error.lineno}: {error.msg}", "line": error.text}))
    except (ValueError, OverflowError) as error:
        return print(json.dumps({"error": str(error)}))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {getattr(call, "id", None) or getattr(call, "attr", None) for call in calls}
    try:
        same = ast.dump(tree) == ast.dump(ast.parse(base.encode()))
    except (RecursionError, SyntaxError, ValueError):
        same = source == base
    print(json.dumps({"begin": "begin" in names, "submit": "submit" in names, "same": same}))


READ_SOURCES = inspect.getsource(read_sources) + "\nread_sources()"  # as it is now: this file may change in mid-run


def objection(source, base, tried):
    """Why the new `source` is not worth a trial, in words for its author; None if it is.

    base: the one that it is made from; tried: digest() of every one that has been tried.
    """
    if len(source) > (most := max(LONGEST_SOURCE, len(base))):
        return f"The result has {len(source):,} characters; train.py may have {most:,}."
    if MARK in source.lower():
        return "The marks around the data that you are shown must not stand in train.py."
    try:
        encoded = source.encode()
    except UnicodeEncodeError:
        return "The result holds lone surrogates, which cannot be written to a file."
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", READ_SOURCES]
    try:
        options = {"capture_output": True, "text": True, "timeout": 60, "start_new_session": True}  # without Ctrl-C
        ended = subprocess.run(command, input=json.dumps([source, base]), **options)
        found = json.loads(ended.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return "The result does not compile: it is nested too deeply, or takes too much time or memory."
    if "error" in found:
        line = (found.get("line") or "").strip()
        shown = f"\n{quoted(line, 200)}" if line else ""
        return f"The result does not compile: {one_line(found['error'], 200)}{shown}"
    if missing := [name for name in ("begin", "submit") if not found[name]]:
        return f"The result no longer calls {' and '.join(missing)}()."
    if found["same"]:
        return "The result differs from train.py in nothing but comments or layout."
    if digest(encoded) in tried:
        return "Exactly this train.py has been tried already; see the history, and propose something else."
    return None


def carried_over(draft: Draft, best: str) -> str | None:
    """The train.py of a draft as a change of `best`, which may be another one than it was made from.

    None for a conflict, and for a draft of which it is not known what it changes.
    """
    if not draft.base:
        return None
    if best == draft.base:
        return draft.source
    # Its edits say best what it meant; where they no longer fit, lines that only one side changed still do.
    changed = edited(best, draft.edits) if draft.edits else None
    return changed or merge(best, draft.base, draft.source)


def merge(best, base, draft):
    """`draft`, made from `base`, carried over to `best`: a three-way merge of sources; None for a conflict."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("best", "base", "draft")]
        for path, source in zip(paths, (best, base, draft)):
            path.write_text(source, encoding="utf-8", newline="")
        command = ["git", "merge-file", "-p", "-q", *map(str, paths)]
        try:
            merged = subprocess.run(command, capture_output=True, timeout=20)
        except subprocess.TimeoutExpired:  # a stranger may have written them
            return None
    return merged.stdout.decode() if merged.returncode == 0 else None
