"""fastssl demo: the whole loop on small data sets."""

from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        "demo",
        "[--out DIR]",
        "Pretrain SimCLR on two small built-in data sets, compare with random weights, and check\n"
        "the gaps against bounds. Minutes on two CPU cores; exit code 1 below a bound.",
    )
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="Default: runs/demo.")
    options = parser.parse(argv)

    from ..demo import demo

    return 0 if demo(options.out) else 1
