"""What every method's file must be: short, and with a docstring that its page is made of."""

import ast
import importlib.util
import inspect
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from fastssl.config import argument_help
from fastssl.methods import METHODS

DOCS = Path(__file__).parents[1] / "docs"
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_methods", DOCS / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of_code(source: str) -> int:
    """Lines that hold anything but comments and strings that stand alone."""
    alone = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {
        number
        for token in tokens
        if token.type not in _SILENT and token.string.strip()
        for number in range(token.start[0], token.end[0] + 1)
    }
    return len(code - alone)


def test_lines_of_code_are_counted():
    text = (
        '"""Doc."""\n\nx = (\n    1,  # one\n    # two\n)\n\ndef f():\n    """Doc,\n    long."""\n'
    )
    assert lines_of_code(text) == 4


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_is_short(name):
    path = Path(sys.modules[METHODS[name].__module__].__file__)
    assert lines_of_code(path.read_text()) < 100


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_docstring_says_what_its_page_needs(name, pages):
    parts = pages.sections(name)
    assert {"Paper", "Loss", "What differs"} <= parts.keys()
    assert re.search(r"arXiv \d{4}\.\d{5}", parts["Paper"])
    if "Figures" in parts:  # each ends with where it comes from
        tags = {"authors' release", "re-implementation", "secondary"}
        figures = " ".join(parts["Figures"].split())
        assert set(re.findall(r"\[(.*?)\]", figures)) <= tags and re.search(r"\]\.?$", figures)
    parameters = inspect.signature(METHODS[name].__init__).parameters.values()
    own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert own <= argument_help(METHODS[name]).keys()


def test_pages_are_what_the_docstrings_say(pages):
    wanted = pages.files()
    for path, text in wanted.items():
        assert path.is_file() and path.read_text() == text, (
            f"{path.name} is not what docs/methods.py writes: run python docs/methods.py"
        )
    assert {*pages.FOLDER.iterdir()} == {*wanted}
