"""fastssl compare: methods side by side on one data set."""

from .parser import Parser, list_of


def run(argv: list[str]) -> int:
    parser = Parser(
        "compare",
        "METHOD [METHOD ...] [--data DATA] [options]",
        "Pretrain with each method as long, evaluate before and after, and write one table and one "
        "plot: OUT/compare.md, .json and .svg. What is finished in OUT is not done again; a method "
        "that fails is told of, and the others go on.",
    )
    add = parser.add_argument
    add("methods", metavar="METHOD", nargs="+", help="as `fastssl methods` names them.")
    add("--data", metavar="DATA", default="patches", help="labelled images. Default: patches.")
    add("--epochs", metavar="N", type=int, default=20, help="passes over them. Default: 20.")
    add("--seeds", metavar="LIST", type=list_of(int, "whole numbers"), default=[0],
        help="a run of each method for each. Default: 0.")  # fmt: skip
    add("--backbone", metavar="NAME", help="of all. Default: that of each method's recipe.")
    add("--out", metavar="DIR", default="runs/compare", help="Default: runs/compare.")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... Default: auto.")
    options = vars(parser.parse(argv))

    from ..compare import compare, table

    try:
        found = compare(**options)
    except (KeyboardInterrupt, SystemExit) as stop:
        print("stopped; the same command goes on, and repeats nothing that is finished")
        return getattr(stop, "code", 130)
    print(f"\n{table(found)}\n\n{options['out']}/compare.md, compare.json, compare.svg")
    return 1 if any("error" in row for row in found["rows"]) else 0
