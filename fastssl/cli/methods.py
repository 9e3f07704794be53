"""fastssl methods: what can be trained."""

import re
import sys
import textwrap

from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser("methods", "", "Print what can be trained, with papers and recipes.")
    parser.add_argument(
        "--recipe", metavar="NAME", help="what others published of it: cifar10 or imagenet."
    )
    recipe = parser.parse(argv).recipe
    from ..methods import METHODS
    from ..methods.published import FIGURES, figures
    from ..methods.recipes import RECIPES

    if recipe is not None:
        if recipe not in FIGURES:
            parser.error(f"--recipe must be one of {', '.join(FIGURES)}, got {recipe!r}")
        print(f"Top-1 accuracies on {recipe} published by others, to check a run against:\n")
        for name in FIGURES[recipe]:
            for figure in figures(recipe, name):
                print(textwrap.fill(f"{name:12}{figure}", 78, subsequent_indent=" " * 12))
        print(f"\nSettings: fastssl pretrain METHOD DATA --recipe {recipe} --help")
        return 0
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
    print("Losses, figures, recipes: docs/methods/METHOD.md")
    return 0
