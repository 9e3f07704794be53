"""Writes docs/methods/: a page for each method, from its file's docstring, the arguments of its
class, its recipes, and what others published; and a page that lists them.

    python docs/methods.py
"""

import inspect
import itertools
import re
import sys
from pathlib import Path
from typing import Any, get_args

from fastssl.config import argument_help, method_arguments
from fastssl.methods import METHODS
from fastssl.methods.published import FIGURES, figures
from fastssl.methods.recipes import RECIPES

FOLDER = Path(__file__).parent / "methods"
TITLES = {
    "Paper": "Paper",
    "Loss": "Loss",
    "Figures": "Figures of others",
    "What differs": "What differs",
}


def files() -> dict[Path, str]:
    """All pages as they should be."""
    pages = {FOLDER / f"{name}.md": page(name) for name in METHODS}
    return pages | {FOLDER / "README.md": contents()}


def sections(name: str) -> dict[str, str]:
    """Parts of the docstring of a method's file, by the word they begin with; that of the first
    paragraph is the method's name in print. Paragraphs without a word belong to the loss if they
    follow it, else to the first."""
    text = inspect.cleandoc(sys.modules[METHODS[name].__module__].__doc__)
    found: dict[str, str] = {}
    last = ""
    for paragraph in text.split("\n\n"):
        word, colon, rest = paragraph.partition(": ")
        if not found or (colon and word in TITLES):
            found[word], last = rest, word
        else:
            found["Loss" if last == "Loss" else next(iter(found))] += f"\n\n{paragraph}"
    return found


def _needed(name: str) -> str:
    """The data, and the files without which the method does not begin."""
    captions = getattr(METHODS[name], "reads_captions", None)
    kinds = method_arguments(name).items()
    files = [f"--{key} FILE" for key, kind in kinds if Path in (kind, *get_args(kind))]
    return " ".join(["path/to/captions.csv" if captions else "path/to/images", *files])


def page(name: str) -> str:
    parts = sections(name)
    title, sentence = next(iter(parts.items()))
    module = sys.modules[METHODS[name].__module__]
    lines = [
        f"<!-- Written by docs/methods.py from fastssl/methods/{Path(module.__file__).name}. -->",
        f"# {title}",
        _markdown(sentence),
        f"    fastssl pretrain {name} {_needed(name)}",
    ]
    for word, heading in TITLES.items():
        if word in parts:
            lines += [f"## {heading}", _markdown(parts[word])]
    lines += ["## Arguments", _arguments(name), "## Recipes", _recipes(name)]
    for recipe in FIGURES:
        if published := figures(recipe, name):
            lines += [
                f"Published by others, to check a run of recipe `{recipe}` against (top-1):",
                "\n".join(f"- {figure}" for figure in published),
            ]
    return "\n\n".join(lines) + "\n"


def contents() -> str:
    lines = [
        "<!-- Written by docs/methods.py. -->",
        "# Methods",
        "One file each, in `fastssl/methods/`; these pages are made of them.",
    ]
    rows = ["| command line | method | in a sentence |", "|---|---|---|"]
    for name in METHODS:
        title, sentence = next(iter(sections(name).items()))
        sentence = " ".join(sentence.partition("\n\n")[0].split())
        rows.append(f"| [{name}]({name}.md) | {title} | {sentence} |")
    return "\n\n".join([*lines, "\n".join(rows)]) + "\n"


def _markdown(text: str) -> str:
    """With a capital; formulas, which are indented, as blocks of their own; papers as links."""
    if not text[1:].startswith(" = "):  # a formula's name
        text = text[0].upper() + text[1:]
    blocks = [
        "\n".join(lines)
        for paragraph in text.split("\n\n")
        for _, lines in itertools.groupby(paragraph.splitlines(), lambda x: x.startswith("    "))
    ]
    text = "\n\n".join(blocks)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _arguments(name: str) -> str:
    rows = ["| argument | default | |", "|---|---|---|"]
    help_text = argument_help(METHODS[name])
    for key, parameter in inspect.signature(METHODS[name].__init__).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            text = help_text.get(key, "").replace("|", r"\|")
            rows.append(f"| `{key}` | {_value(parameter.default)} | {text} |")
    return "\n".join(rows)


def _recipes(name: str) -> str:
    recipes = {
        key: {k: v for k, v in recipe.items() if k != "method_args"} | recipe["method_args"]
        for key, recipe in RECIPES[name].items()
    }
    settings = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    rows = [f"| | {' | '.join(recipes)} |", f"|---|{'---|' * len(recipes)}"]
    for key in settings:
        values = [_value(recipe[key]) if key in recipe else "" for recipe in recipes.values()]
        rows.append(f"| `{key}` | {' | '.join(values)} |")
    return "\n".join(rows)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_value(part)}" for key, part in value.items())
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
