"""fastssl bench: the kernels against the libraries people would use instead."""

from .parser import Parser


def run(argv: list[str]) -> int:
    from ..bench.cases import GROUPS

    parser = Parser(
        "bench",
        "[GROUP ...] [options]\n       fastssl bench --compare BEFORE AFTER",
        "Measure kernels in paired runs against installed libraries: time, memory, and the share\n"
        "of what this machine could do. Writes JSON, CSV, Markdown and pictures into one folder,\n"
        "after every run, so that an interrupted command leaves what it has measured. --compare\n"
        "tells what became slower.\n"
        f"Groups: {', '.join(GROUPS)}.",
    )
    parser.add_argument("groups", metavar="GROUP", nargs="*", help="Default: all.")
    parser.add_argument("--out", metavar="FOLDER", help="Default: bench/MACHINE.")
    parser.add_argument("--case", metavar="NAMES", help="cases of the groups, commas between.")
    parser.add_argument(
        "--sizes", metavar="L=N,N", action="append", default=[],
        help="values of a letter in the place of the cases' own, as N=256,1024; repeatable.",
    )  # fmt: skip
    parser.add_argument("--dtype", metavar="NAMES", help="float32, bfloat16; commas between.")
    parser.add_argument("--device", default="auto", help="cpu or cuda. Default: a GPU if any.")
    parser.add_argument("--threads", type=int, help="of torch. Default: torch's own choice.")
    parser.add_argument(
        "--baselines", metavar="NAMES",
        help="lightly, open_clip, compiled ...; none for ours alone. Default: all installed ones;\n"
        "on a CPU without compiled.",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds a run. Default: 1.")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each case. Default: 2.")
    parser.add_argument(
        "--minutes", type=float,
        help="no run but the first is begun after so many. Default: all are run.",
    )  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="two sizes a case, none of the largest."
    )
    parser.add_argument(
        "--scaling", action="store_true", help="the cost against growing sizes instead."
    )
    parser.add_argument(
        "--same-process", action="store_true", help="no process a run: faster start."
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop.")
    parser.add_argument(
        "--compare", metavar=("BEFORE", "AFTER"), nargs=2,
        help="two results; exit code 1 if a case is slower beyond the noise of both.",
    )  # fmt: skip
    options = vars(parser.parse(argv))
    if options["compare"]:
        return _compare(*options["compare"])
    which = {
        "names": _names(options["case"]), "sizes": _sizes(options["sizes"]),
        "dtypes": _names(options["dtype"]), "short": options["short"],
    }  # fmt: skip
    groups = options["groups"] or None
    if options["list"]:
        from ..bench import cases

        for case in cases(
            groups, "cpu" if options["device"] == "auto" else options["device"], **which
        ):
            print(f"{case.group:9} {case}")
        return 0
    from ..bench import bench

    baselines = _names(options["baselines"])
    folder = bench(
        groups, out=options["out"], device=options["device"], threads=options["threads"],
        baselines=[] if baselines == ["none"] else baselines, seconds=options["seconds"],
        repeats=options["repeats"], minutes=options["minutes"], scaling=options["scaling"],
        apart=not options["same_process"], **which,
    )  # fmt: skip
    print((folder / "results.md").read_text())
    print(f"{folder}: results.json, results.csv, results.md and pictures")
    return 0


def _compare(before: str, after: str) -> int:
    from ..bench import compare, read

    table, regressed = compare(read(before), read(after))
    print(table)
    if regressed:
        print("\nslower beyond the noise of both: " + "; ".join(regressed))
        return 1
    print("\nno regression")
    return 0


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _sizes(given: list[str]) -> dict[str, list[int | str]]:
    found = {}
    for text in given:
        letter, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"bench: --sizes must be like N=256,1024, got {text!r}.")
        found[letter] = [int(v) if v.isdigit() else v for v in values.split(",")]
    return found
