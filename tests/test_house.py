"""The house: which file may import which, and how large a file and a function may be. Read from the source alone."""

import ast
import re

import pytest
from conftest import ROOT

from exam.fingerprints import FROZEN

# Top to bottom: a file imports only from above itself.
ORDER = """
    limits files signals fingerprints text tokenizer rows speed load card processes machine syscalls sandbox result
    reader examiner compiled watch trial check desk
""".split()
EXAM = [f"exam.{name}" for name in ORDER]
OPEN_TO_LAB = {"exam.rows", "exam.fingerprints", "exam.files", "exam.result"}  # what prepares and checks data; Result
LAB = """
    book curve profile runs conditions posterior verdict simpler trust repository researcher peers plumbing store
    exchange prompt answer api command model elsewhere demo slots tag brief drafts transfer evening sharing launch
    measure findings picture report page view news
""".split()
LAB = [f"lab.{name}" for name in LAB]
# What may be known of whom, where more is above.
WALLS = {
    "lab.posterior": set(),
    "lab.runs": {"lab.book"},
    "lab.conditions": {"lab.book", "lab.runs"},
    "lab.verdict": {"lab.book", "lab.runs", "lab.conditions", "lab.posterior"},
    "lab.simpler": set(),
    "lab.trust": set(),
    "lab.model": {"lab.book", "lab.researcher", "lab.prompt", "lab.answer", "lab.api", "lab.command"},
    "lab.command": {"lab.researcher", "lab.api"},
    "lab.elsewhere": {"lab.book", "lab.trust", "lab.researcher", "lab.peers", "lab.exchange", "lab.answer"},
    "lab.news": {"lab.researcher"},
    "lab.peers": {"lab.book"},
    "lab.plumbing": {"lab.repository"},
    "lab.store": {"lab.repository", "lab.peers", "lab.plumbing"},
    "lab.exchange": {"lab.book", "lab.researcher", "lab.repository", "lab.peers", "lab.plumbing", "lab.store"},
}
OWN = {"prepare", "train", "agent_loop", "exam", "lab"}
FILE_LINES = {"train": 600, "prepare": 790}  # of others 400
FUNCTION_LINES = 50


def source(name):
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


def imports(tree):
    """The files of ours that a syntax tree imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("exam", "lab"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide an arrow"
            found.add(node.module)
    return {name for name in found if name.partition(".")[0] in OWN}


def arrows(name):
    return imports(ast.parse(source(name)))


def test_exam_and_lab_hold_the_files_that_are_listed_and_their_init_no_code():
    assert {f"exam.{path.stem}" for path in (ROOT / "exam").glob("*.py")} == {*EXAM, "exam.__init__"}
    assert {f"lab.{path.stem}" for path in (ROOT / "lab").glob("*.py")} == {*LAB, "lab.__init__"}
    for folder in ("exam", "lab"):
        (docstring,) = ast.parse(source(f"{folder}.__init__")).body
        assert isinstance(docstring.value, ast.Constant)


def test_train_py_imports_prepare_alone():
    assert arrows("train") == {"prepare"}


def test_prepare_py_imports_nothing_of_ours_at_its_top_and_exam_where_it_is_used():
    tree = ast.parse(source("prepare"))
    *body, last = tree.body
    assert isinstance(last, ast.If) and imports(last) == {"exam.desk"}
    top = [node for node in body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not set().union(*map(imports, top))
    assert imports(tree) <= {"exam.desk", "exam.trial", "exam.fingerprints", "exam.machine"}


@pytest.mark.parametrize("name", EXAM)
def test_imports_within_exam_run_one_way(name):
    assert arrows(name) <= {"prepare", *EXAM[: EXAM.index(name)]}


def test_what_reads_a_sealed_model_imports_what_it_needs_and_no_more():
    """An examiner can open the whole of exam/; this keeps it from running the rest."""
    assert arrows("exam.reader") == {"prepare", "exam.limits", "exam.speed", "exam.syscalls"}


def test_all_that_a_trial_imports_is_frozen_but_what_cannot_change_a_score():
    """machine.py sizes a model only where the trial is not told for which rate."""
    frozen = {file.removesuffix(".py").replace("/", ".") for file in FROZEN}
    assert {"prepare", "exam.trial", "exam.__init__"} <= frozen
    for name in frozen - {"prepare"}:
        assert arrows(name) <= frozen | {"exam.machine"}, name


@pytest.mark.parametrize("name", LAB)
def test_lab_reaches_trials_through_launch_alone(name):
    assert arrows(name) <= {"prepare", *LAB, *OPEN_TO_LAB}


@pytest.mark.parametrize("name", LAB)
def test_imports_within_lab_run_one_way_and_researchers_know_neither_tag_nor_launch(name):
    own = {arrow for arrow in arrows(name) if arrow.startswith("lab.")}
    assert own <= WALLS.get(name, set(LAB[: LAB.index(name)]))


def test_agent_loop_py_knows_of_exam_no_more_than_lab_does_but_signals_and_the_sandboxes_name():
    assert arrows("agent_loop") <= {"prepare", *LAB, *OPEN_TO_LAB, "exam.signals", "exam.sandbox"}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("name", ["train", "prepare", *EXAM, *LAB, "agent_loop"])
def test_a_file_and_its_functions_are_of_one_subject_each(name):
    text = source(name)
    assert len(text.splitlines()) <= FILE_LINES.get(name, 400)
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions(ast.parse(text))}
    assert not {name: size for name, size in sizes.items() if size > FUNCTION_LINES}


@pytest.mark.parametrize("name", [*EXAM, *LAB])
def test_a_file_opens_by_saying_what_it_is(name):
    assert re.search(r"\w", ast.get_docstring(ast.parse(source(name))) or "")
