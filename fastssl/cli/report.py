"""fastssl report: one page on a run, or on several."""

from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        "report",
        "RUN [RUN ...] [--out FILE] [options]",
        "Write one HTML page, complete in itself: curves, warnings, results, settings, and of a\n"
        "single run views, neighbours and a map of its features; of several a comparison.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="Default: RUN/report.html; of several runs comparison.html beside the first.",
    )
    parser.add_argument(
        "--data", metavar="DATA", help="images for neighbours and map. Default: those of the run."
    )
    parser.add_argument(
        "--no-images",
        dest="images",
        action="store_false",
        help="leave out what needs the images and the network.",
    )
    parser.add_argument("--tsne", action="store_true", help="also a map by t-SNE (scikit-learn).")
    options = vars(parser.parse(argv))

    from ..report import report

    print(report(*options.pop("runs"), **options))
    return 0
