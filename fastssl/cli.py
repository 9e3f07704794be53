"""fastssl: self-supervised learning from the command line.

  fastssl methods                           what can be trained
  fastssl pretrain METHOD DATA --out RUN    learn a backbone without labels
  fastssl evaluate CKPT                     measure what its features are worth
  fastssl report RUN [RUN ...]              one page on a run, or on several
  fastssl embed RUN FOLDER --out FILE       features of all images in a folder
  fastssl export RUN --format F --out FILE  the backbone for timm, torchvision,
                                            Hugging Face or ONNX
  fastssl demo                              the whole loop on small data sets
  fastssl info                              versions, hardware, kernels in use
  fastssl --version

`fastssl COMMAND --help` lists a command's options; for a method's own, and the
defaults on your data: `fastssl pretrain METHOD DATA --help`. Results and
reports go into the run's folder.

Exit codes: 0 done; 1 a result below its bound (demo); 2 an error, in one line
on stderr; 130 interrupted (Ctrl-C), 143 terminated (SIGTERM), both saved.
"""

import argparse
import inspect
import os
import re
import shlex
import shutil
import sys
import textwrap
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
    commands = {
        "methods": _methods,
        "pretrain": _pretrain,
        "evaluate": _evaluate,
        "report": _report,
        "embed": _embed,
        "export": _export,
        "demo": _demo,
        "info": _info,
    }
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(__doc__.strip(), file=sys.stdout if argv else sys.stderr, flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            from fastssl import __version__

            print(f"fastssl {__version__}")
            return 0
        if argv[0] not in commands:
            raise ValueError(f"unknown command {argv[0]!r}. {_nearest(argv[0], commands)}")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = commands[argv[0]](argv[1:])
        sys.stdout.flush()  # here, where a closed pipe is met below
        return code
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
        width = min(96, shutil.get_terminal_size().columns - 2)
        paragraphs = (textwrap.fill(text, width) for text in description.split("\n\n"))
        super().__init__(
            prog=f"fastssl {command}",
            usage=f"fastssl {command} {usage}",
            description="\n\n".join(paragraphs),
            formatter_class=lambda prog: formatter(prog, max_help_position=26, width=width),
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
    base, method = {}, None
    if argv and not argv[0].startswith("-"):
        method, argv = argv[0], argv[1:]
    out = early.out or (
        method and f"runs/{method.rpartition(':')[2]}"
    )  # as `PretrainConfig` has it
    if early.config:
        base = read_yaml(early.config)
    elif early.resume and out:
        if not Path(out, "config.yaml").is_file():
            raise ValueError(f"pretrain: --out must be a run to resume, got {out!r}.")
        base = read_yaml(Path(out, "config.yaml")) | {"out": out}
    method = method or base.get("method")
    data = argv[0] if argv and not argv[0].startswith("-") else base.get("data")
    parser = _pretrain_parser(method, data)
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


# The fields of `PretrainConfig` as the help lists them; those that are new come last.
_GROUPS = {
    "the run": "out resume seed save_every keep log_every monitor trackers",
    "images": "image_size max_side workers hold_out",
    "network": "backbone init_from freeze",
    "optimisation": "epochs batch_size chunk optimizer lr lr_schedule warmup_epochs min_lr"
    " layer_decay weight_decay final_weight_decay max_grad_norm sam_rho sam_adaptive",
    "machine": "device precision compile parallel",
}


def _pretrain_parser(method: str | None, data: str | None) -> _Parser:
    """Options made of the fields of `PretrainConfig` and the keyword arguments of the method."""
    from .config import PretrainConfig, field_help, type_name
    from .methods import METHODS

    own = (method or "").rpartition(":")[2]
    parser = _Parser(
        "pretrain",
        "METHOD [DATA] [--out RUN] [options]",
        f"Learn a backbone from images without labels. METHOD: {', '.join(METHODS)} (`fastssl "
        "methods` tells what they are), or FILE.py:CLASS, a method of your own. What is not given "
        "comes from --config, then from the method's recipe for the data."
        + (f" The defaults below are those of {own} on {data or 'digits'}." if own else "")
        + "\n\nAn interrupted run is saved; go on with: fastssl pretrain --resume --out RUN",
    )
    text, recipe = field_help(), _recipe(method, data)
    parser.add_argument("data", nargs="?", default=argparse.SUPPRESS, help=text["data"])
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; options override.")
    known = {f.name: f for f in fields(PretrainConfig)}
    groups = {title: names.split() for title, names in _GROUPS.items()}
    listed = {"method", "data", "method_args"}.union(*groups.values())
    groups["more"] = [name for name in known if name not in listed]
    for title, names in groups.items():
        group = parser.add_argument_group(title) if names else None
        for name in names:
            help_text = " ".join(text[name].split())
            kind = known[name].type
            if bool in (kind, *get_args(kind)):
                action = "store_true" if name == "resume" else argparse.BooleanOptionalAction
                _add(group, name, help_text, action=action)
                continue
            if _metavar(kind) == "NAME":
                help_text = f"{type_name(kind).removesuffix(' or none')}. {help_text}"
            default = recipe.get(name, known[name].default)
            if default is not None:
                help_text += f" Default: {default}."
            _add(group, name, help_text.strip(), metavar=_metavar(kind))
    if method is None:
        return parser
    group = parser.add_argument_group(f"options of {own}")
    for name, (kind, default, text) in _method_options(method).items():
        default = recipe["method_args"].get(name, default)
        if default is not None:
            text = f"{text} Default: {default}.".strip()
        _add(group, name, text, metavar=_metavar(kind))
    return parser


def _recipe(method: str | None, data: str | None) -> dict:
    """What unset fields become: of the method's recipe for the data, by default `digits`."""
    from .config import PretrainConfig
    from .methods import method_class
    from .methods.recipes import resolve

    if method is None:
        return {}
    method_class(method)  # refuses unknown names
    config = vars(resolve(PretrainConfig(method=method, data=data or "digits")))
    return {name: value for name, value in config.items() if value is not None}


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

    names = {"a whole number": "N", "a number": "X", "text": "TEXT", "a list": "LIST"}
    name = type_name(kind).removesuffix(" or none")
    choices = "|".join(name.replace(" or ", ", ").split(", "))
    return names.get(name, choices if len(choices) < 40 else "NAME")


def _evaluate(argv: list[str]) -> int:
    from .evaluate import PROTOCOLS, FeatureCache, evaluate, merge_results, table

    parser = _Parser(
        "evaluate",
        "CKPT [--data DATA] [--protocol LIST] [options]",
        "Measure what a network's features are worth on labelled images. CKPT: a run's folder, a\n"
        "file of weights, timm:NAME or torchvision:NAME. The numbers and the full protocol are\n"
        "merged into RUN/results.json, or into --out.",
    )
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="what is evaluated")
    add("--data", metavar="DATA", help="`digits`, `patches`, `shapes` or a folder with one"
        " subfolder per class. Default: the images of the run.")  # fmt: skip
    add("--protocol", metavar="LIST", type=_names, help=f"any of {', '.join(PROTOCOLS)}; commas"
        " between. Default: knn,linear,kshot.")  # fmt: skip
    add("--random", action="store_true",
        help="also evaluate the same network before training, and show the gap.")  # fmt: skip
    add("--weights", choices=("pretrained", "random"), default="pretrained", metavar="NAME",
        help="pretrained, of timm and torchvision those published, or random."
        " Default: pretrained.")  # fmt: skip
    add("--backbone", metavar="NAME", help="of a file of weights that does not say whose they are:"
        " resnet_small, timm:NAME ...")  # fmt: skip
    add("--split", default="test", metavar="NAME", help="test, or held-out: a tenth of the"
        " training split, for choices. Default: test.")  # fmt: skip
    add("--labels", metavar="FILE", help="CSV file of several labels an image.")
    add("--masks", metavar="DIR", help="folder of masks for segmentation, PNG of class numbers.")
    add("--image-size", metavar="N", type=int, help="Default: the network's own.")
    add("--batch-size", metavar="N", type=int, default=256,
        help="images per forward pass. Default: 256.")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... Default: auto.")
    add("--cache", metavar="DIR", help="kept features. Default: beside torch's cached files.")
    add("--no-cache", action="store_true", help="compute features again and keep none.")
    add("--out", metavar="FILE", help="JSON file for the results. Default: RUN/results.json.")
    add("--plots", action="store_true", help="write the run's report.html.")
    group = parser.add_argument_group("settings of protocols", "Each goes to all that have it.")
    for name, (kind, metavar, text) in _EVALUATE_SETTINGS.items():
        flag, text = f"--{name.replace('_', '-')}", text.replace("%", "%%")
        group.add_argument(
            flag, dest=name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    group.add_argument(
        "--no-augmentation",
        dest="augmentation",
        action="store_false",
        default=argparse.SUPPRESS,
        help="linear-sgd on features of whole images, computed once.",
    )
    options = vars(parser.parse(argv))
    known = (*_EVALUATE_SETTINGS, "augmentation")
    settings = {name: options.pop(name) for name in known if name in options}

    from .train.ranks import Ranks

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ranks = Ranks.start(options["device"]) if several else None
    cache = None if options["no_cache"] else FeatureCache(options["cache"])
    results = {}
    try:
        for weights in ("random", "pretrained") if options["random"] else (options["weights"],):
            results[weights] = evaluate(
                options["ckpt"],
                options["data"],
                options["protocol"],
                weights=weights,
                cache=cache,
                device=str(ranks.device) if ranks else options["device"],
                **{key: options[key] for key in _EVALUATE_OPTIONS},
                **settings,
            )
    finally:
        if ranks:
            ranks.close()
    if not _main_rank():
        return 0
    print(table(results))
    if options["out"]:
        for weights, found in results.items():
            merge_results(Path(options["out"]), weights, found)
        print(f"written to {options['out']}")
    if Path(options["ckpt"], "results.json").is_file():
        print(f"written to {Path(options['ckpt'], 'results.json')}")
    if options["plots"]:
        from .report import report

        print(report(options["ckpt"], data=options["data"]))
    return 0


def _report(argv: list[str]) -> int:
    parser = _Parser(
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

    from .report import report

    print(report(*options.pop("runs"), **options))
    return 0


def _methods(argv: list[str]) -> int:
    _Parser("methods", "", "Print what can be trained, with papers and tuned data.").parse(argv)
    from .methods import METHODS
    from .methods.recipes import RECIPES

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


def _export(argv: list[str]) -> int:
    parser = _Parser(
        "export",
        "RUN --format FORMAT --out FILE [--weights teacher]",
        "Write a run's backbone for another library, read it back there and compare\n"
        "the features. The built-in backbones (resnet_small, vit_small) exist nowhere\n"
        "else: for them there are only safetensors and onnx.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--format",
        required=True,
        help="safetensors (the backbone's own names), timm, torchvision, hf (a folder for"
        " AutoModel.from_pretrained) or onnx.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="a .safetensors or .pth file; for onnx .onnx; for hf a new folder.",
    )
    parser.add_argument(
        "--weights", default="student", help="student, or the method's teacher. Default: student."
    )
    options = parser.parse(argv)

    from .train import export

    done = export(options.run, options.format, options.out, options.weights)
    print(f"{done['path']}: {done['weights']} of {done['backbone']}, {done['tensors']} tensors")
    if done["difference"] is None:
        print(f"not read back: {options.format} cannot be imported here")
    else:
        print(f"read back: features differ by {done['difference']:.1e} of the largest")
    return 0


def _embed(argv: list[str]) -> int:
    parser = _Parser(
        "embed",
        "WHAT FOLDER --out FILE [options]",
        "Write the features of every image below a folder, in the order of their names.",
    )
    parser.add_argument(
        "what",
        metavar="WHAT",
        help="a run's folder or a file of weights (each may end in :teacher), or timm:NAME or"
        " torchvision:NAME for what they publish",
    )
    parser.add_argument("folder", metavar="FOLDER", help="images, in subfolders too")
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help=".npz (arrays features, paths) or .safetensors (features; paths in the metadata).",
    )
    parser.add_argument(
        "--backbone", metavar="NAME", help="of a file that does not say which network it is of."
    )
    parser.add_argument("--image-size", metavar="N", type=int, help="Default: the network's own.")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=256, help="images per pass. Default: 256."
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, default=4, help="decoding threads. Default: 4."
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... Default: auto."
    )
    options = vars(parser.parse(argv))

    from .evaluate import embed

    out = options["out"]
    embedding = embed(options.pop("what"), options.pop("folder"), options.pop("out"), **options)
    N, D = embedding.features.shape
    print(f"{out}: {N} images, {D} features")
    for name, reason in embedding.corrupt.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _list_of(kind: type, words: str):
    def numbers(text: str) -> list:
        try:
            return [kind(name) for name in _names(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None

    return numbers


_numbers, _floats = _list_of(int, "whole numbers"), _list_of(float, "numbers")
_EVALUATE_OPTIONS = ("backbone", "split", "labels", "masks", "image_size", "batch_size")
# Type, metavar and help of what protocols take; their defaults are in their docstrings.
_EVALUATE_SETTINGS = {
    "seeds": (int, "N", "runs or draws of each number, for mean and deviation."),
    "ks": (_numbers, "LIST", "neighbours of knn and knn-loo; k of retrieval's recall@k."),
    "metric": (str, "NAME", "of knn: cosine or l2. Default: cosine."),
    "votes": (str, "NAME", "of knn: softmax, distance or uniform. Default: softmax."),
    "temperature": (float, "X", "of softmax votes. Default: 0.07."),
    "l2_grid": (_floats, "LIST", "candidates of linear and multilabel."),
    "shots": (_numbers, "LIST", "labels per class for kshot and finetune. Default: 1,5,10."),
    "shares": (_floats, "LIST", "of the labels, for subset and finetune: 0.01,0.1 for 1 and 10 %."),
    "preset": (str, "NAME", "of linear-sgd: moco, simclr, dino, mae, lejepa. Default: simclr."),
    "rates": (_floats, "LIST", "learning rates of linear-sgd, one head each."),
    "weight_decays": (_floats, "LIST", "of linear-sgd, one head each."),
    "last_blocks": (_numbers, "LIST", "numbers of last blocks for linear-sgd, one head each."),
    "recipe": (str, "NAME", "of finetune: vit, cnn, simclr, swav. Default: by the network."),
    "epochs": (int, "N", "of linear-sgd, finetune and segmentation."),
    "train_batch_size": (int, "N", "of linear-sgd, finetune and segmentation."),
    "lr": (float, "X", "of finetune and segmentation."),
    "weight_decay": (float, "X", "of finetune and segmentation."),
    "layer_decay": (float, "X", "of finetune: rate of a block over that of the next."),
    "drop_path": (float, "X", "of finetune."),
    "mixup": (float, "X", "of finetune; needs torchvision."),
    "cutmix": (float, "X", "of finetune; needs torchvision."),
    "precision": (str, "NAME", "of finetune: fp32, bf16, auto."),
    "disturbances": (_names, "LIST", "of robustness. Default: all."),
    "shifts": (_names, "LIST", "data sets robustness scores too."),
    "groups": (str, "FILE", "CSV file, image and group, for groups. Default: classes."),
}


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
