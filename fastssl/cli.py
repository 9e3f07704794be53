"""fastssl: self-supervised learning from the command line.

  fastssl pretrain METHOD [DATA] --out RUN    learn a backbone from images without labels
  fastssl evaluate RUN                        measure what its features are worth
  fastssl demo                                the whole loop on two small data sets, in minutes
  fastssl info                                versions, hardware, and which kernels are used
  fastssl --version

`fastssl COMMAND --help` lists a command's options. Results and plots go into the run's folder.
"""

import argparse
import inspect
import os
import re
import shlex
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import get_args

# What a user can cause: one message, no traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code.

    0; 1 for a result below its bound; 2 for an error; 130 and 143 for a run that SIGINT (Ctrl-C) or
    SIGTERM stopped and that can be resumed.
    """
    argv = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    commands = {"pretrain": _pretrain, "evaluate": _evaluate, "demo": _demo, "info": _info}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        from fastssl import __version__

        print(f"fastssl {__version__}")
        return 0
    try:
        if argv[0] not in commands:
            raise ValueError(f"unknown command {argv[0]!r}. {_nearest(argv[0], commands)}")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return commands[argv[0]](argv[1:])
    except BrokenPipeError:  # the reader has seen enough, as in `fastssl info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors name the nearest option."""

    def __init__(self, command: str, usage: str, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"fastssl {command}",
            usage=f"fastssl {command} {usage}",
            description=description,
            formatter_class=lambda prog: formatter(prog, max_help_position=28, width=96),
            allow_abbrev=False,
        )

    def parse(self, argv: list[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(argv)
        # An unknown option's value lands among the positionals, so the option is to blame.
        for argument in sorted(unknown, key=lambda argument: not argument.startswith("-")):
            if argument.startswith("-"):
                known = [name for name in self._option_string_actions if name.startswith("--")]
                name = argument.partition("=")[0]
                self.error(f"unknown option {name}. {_nearest(name, known)}")
            self.error(f"unexpected argument {argument!r}")
        return options

    def error(self, message: str):
        message = message.rstrip(" .")
        stop = "" if message.endswith("?") else "."
        raise ValueError(f"{message}{stop} See `{self.prog} --help`.")


def _pretrain(argv: list[str]) -> int:
    from .config import from_dict, read_yaml

    # The method's own options are known only once the method is: from the first word, or the file.
    first = _Parser("pretrain", "", "")
    for name in ("--config", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    base = {}
    if early.config:
        base = read_yaml(early.config)
    elif early.resume and early.out:
        if not Path(early.out, "config.yaml").is_file():
            raise ValueError(f"pretrain: --out must be a run to resume, got {early.out!r}.")
        base = read_yaml(Path(early.out, "config.yaml"))
    if argv and not argv[0].startswith("-"):
        method, argv = argv[0], argv[1:]
    else:
        method = base.get("method")
    parser = _pretrain_parser(method)
    options = vars(parser.parse(argv))
    if method is None:
        parser.error("METHOD is missing: give it first, or in --config")

    options.pop("config")
    own = {name: options.pop(name) for name in _method_options(method) if name in options}
    given = options | {"method": method, "method_args": own}
    from_dict(given, "command line")  # first, so that a message blames the right place
    given["method_args"] = (base.get("method_args") or {}) | own
    config = from_dict(base | given, early.config or "config")

    from .train import pretrain

    try:
        run = pretrain(config)
    except (KeyboardInterrupt, SystemExit) as stop:
        if Path(config.out, "config.yaml").is_file() and _main_rank():
            print(f"resume with: fastssl pretrain --resume --out {shlex.quote(config.out)}")
        return getattr(stop, "code", 130)
    if _main_rank():
        seconds, loss = run.metrics["seconds"], run.metrics["loss"]
        print(f"{run.path}: {run.metrics['steps']} steps in {seconds:.0f} s, loss {loss:.3f}")
        print(f"next: fastssl evaluate {shlex.quote(str(run.path))} --random --plots")
    return 0


def _pretrain_parser(method: str | None) -> _Parser:
    """Options made of the fields of `PretrainConfig` and the keyword arguments of the method."""
    from .config import PretrainConfig, field_help
    from .methods import METHODS

    parser = _Parser(
        "pretrain",
        "METHOD [DATA] [--out RUN] [options]",
        f"Learn a backbone from images without labels. METHOD: {', '.join(METHODS)}.\n"
        "Options that are not given come from --config, then from the method's recipe for the data."
        "\nAn interrupted run (Ctrl-C) is saved; go on with: fastssl pretrain --resume --out RUN",
    )
    text = field_help()
    parser.add_argument("data", nargs="?", default=argparse.SUPPRESS, help=text["data"])
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; options override.")
    for field in fields(PretrainConfig):
        if field.name in ("method", "data", "method_args"):
            continue
        help_text = " ".join(text[field.name].split())
        if bool in (field.type, *get_args(field.type)):
            action = argparse.BooleanOptionalAction if field.default else "store_true"
            _add(parser, field.name, help_text, action=action)
            continue
        if field.default is not None:
            help_text += f" Default: {field.default}."
        _add(parser, field.name, help_text.strip(), metavar=_metavar(field.type))
    if method is None:
        return parser
    group = parser.add_argument_group(f"options of {method}", "The recipe may set other defaults.")
    for name, (kind, default, text) in _method_options(method).items():
        _add(group, name, f"{text} Default: {default}.".strip(), metavar=_metavar(kind))
    return parser


def _method_options(method: str) -> dict[str, tuple[type, object, str]]:
    """Type, default and text of each keyword argument of a method's class."""
    from .config import method_arguments
    from .methods import method_class

    cls = method_class(method)
    parameters = inspect.signature(cls.__init__).parameters
    text = dict(re.findall(r"^ *(\w+): (.+)$", cls.__doc__ or "", re.MULTILINE))
    return {
        name: (kind, parameters[name].default, text.get(name, ""))
        for name, kind in method_arguments(method).items()
    }


def _add(parser, name: str, help_text: str, **settings) -> None:
    """An option whose value stays text: `from_dict` reads it, as it reads a file's values."""
    flag = f"--{name.replace('_', '-')}"
    text = help_text.replace("%", "%%") or None
    parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **settings)


def _metavar(kind) -> str:
    from .config import type_name

    names = {"a whole number": "N", "a number": "X", "text": "TEXT"}
    name = type_name(kind).removesuffix(" or none")
    return names.get(name, "|".join(name.replace(" or ", ", ").split(", ")))


def _evaluate(argv: list[str]) -> int:
    parser = _Parser(
        "evaluate",
        "RUN [--data DATA] [--protocol knn,linear,kshot] [options]",
        "Measure a run's frozen backbone on labelled images; the numbers and the full protocol\n"
        "are merged into RUN/results.json.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="`digits`, `patches`, `shapes` or a folder with one"
        " subfolder per class. Default: the images of the run.",
    )
    parser.add_argument(
        "--protocol",
        metavar="LIST",
        type=_names,
        default="knn,linear,kshot",
        help="any of knn, linear, kshot, knn-loo, retrieval, diagnostics; commas between."
        " Default: knn,linear,kshot.",
    )
    parser.add_argument(
        "--shots",
        metavar="LIST",
        type=_numbers,
        default="1,5,10",
        help="labels per class for kshot. Default: 1,5,10.",
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="also evaluate the same network before training, and show the gap.",
    )
    parser.add_argument("--image-size", metavar="N", type=int, help="Default: the run's.")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=256,
        help="images per forward pass. Default: 256.",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... Default: auto."
    )
    parser.add_argument("--plots", action="store_true", help="write plots into the run's folder.")
    options = parser.parse(argv)

    from .evaluate import evaluate, table

    results = {
        weights: evaluate(
            options.run,
            options.data,
            options.protocol,
            weights=weights,
            image_size=options.image_size,
            batch_size=options.batch_size,
            device=options.device,
            shots=options.shots,
        )
        for weights in (("random", "pretrained") if options.random else ("pretrained",))
    }
    print(table(results))
    print(f"written to {Path(options.run, 'results.json')}")
    if options.plots:
        from .report import report

        print("\n".join(str(path) for path in report(options.run, options.data)))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, got {text!r}") from None


def _demo(argv: list[str]) -> int:
    parser = _Parser(
        "demo",
        "[--out DIR]",
        "Pretrain SimCLR on two small built-in data sets, compare with random weights, and check\n"
        "the gaps against bounds. Minutes on two CPU cores; exit code 1 below a bound.",
    )
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="Default: runs/demo.")
    options = parser.parse(argv)

    from .demo import demo

    return 0 if demo(options.out) else 1


def _info(argv: list[str]) -> int:
    _Parser("info", "", "Print versions, hardware, and which kernel serves each operation.").parse(
        argv
    )
    from .info import info

    print(info())
    return 0


def _nearest(name: str, names) -> str:
    from .extras import nearest

    return nearest(name, names)


def _dashed(argument: str) -> str:
    """--batch_size is --batch-size; values and =values stay as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _main_rank() -> bool:
    """Whether this is the one process, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
