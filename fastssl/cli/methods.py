"""fastssl methods: what can be trained."""

import re
import sys
import textwrap

from .parser import Parser


def run(argv: list[str]) -> int:
    Parser("methods", "", "Print what can be trained, with papers and tuned data.").parse(argv)
    from ..methods import METHODS
    from ..methods.recipes import RECIPES

    for name, method in METHODS.items():
        text = " ".join(sys.modules[method.__module__].__doc__.split())
        sentence = text.partition(": ")[2].partition(". ")[0]
        paper = re.search(r"arXiv [\d.]*\d", text)
        recipes = f"recipes: {', '.join(RECIPES[name])}"
        lines = [f"{method.__name__}: {sentence}.", f"{paper[0]}; {recipes}" if paper else recipes]
        for line in lines:
            print(textwrap.fill(line, 78, initial_indent=f"{name:12}", subsequent_indent=" " * 12))
            name = ""
    print("\nOptions and defaults: fastssl pretrain METHOD DATA --help")
    return 0
