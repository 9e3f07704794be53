"""fastssl pretrain: learn a backbone from images without labels."""

import argparse
import inspect
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args

from .parser import Parser, main_rank


def run(argv: list[str]) -> int:
    from ..config import from_dict, read_yaml

    # The method's own options are known only once the method is: from the first word, or the file.
    first = Parser("pretrain", "", "")
    for name in ("--config", "--out", "--data", "--recipe"):
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
    positional = argv[0] if argv and not argv[0].startswith("-") else None
    data = positional or early.data or base.get("data")
    parser = _pretrain_parser(method, data, early.recipe or base.get("recipe"))
    options = vars(parser.parse(argv))
    if method is None:
        parser.error("METHOD is missing: give it first, or in --config")

    options.pop("config")
    own = {name: options.pop(name) for name in _method_options(method) if name in options}
    given = options | {"method": method, "method_args": own}
    from_dict(given, "command line")  # first, so that a message blames the right place
    given["method_args"] = (base.get("method_args") or {}) | own
    config = from_dict(base | given, early.config or "config")

    from ..methods.published import figures
    from ..train import pretrain

    try:
        done = pretrain(config)
    except (KeyboardInterrupt, SystemExit) as stop:
        if Path(config.out, "config.yaml").is_file() and main_rank():
            print(f"resume with: fastssl pretrain --resume --out {shlex.quote(config.out)}")
        return getattr(stop, "code", 130)
    if main_rank():
        seconds, loss = done.metrics["seconds"], done.metrics["loss"]
        print(f"{done.path}: {done.metrics['steps']} steps in {seconds:.0f} s, loss {loss:.3f}")
        print(f"next: fastssl evaluate {shlex.quote(str(done.path))} --random --plots")
        for figure in figures(config.recipe, config.method):
            print(f"published by others: {figure}")
    return 0


# The fields of `PretrainConfig` as the help lists them; those that are new come last.
GROUPS = {
    "the run": "recipe out resume seed save_every keep log_every monitor trackers",
    "images": "image_size max_side workers hold_out",
    "network": "backbone init_from init_heads freeze",
    "optimisation": "epochs batch_size chunk optimizer optimizer_args lr lr_schedule"
    " warmup_epochs min_lr layer_decay bias_lr_factor weight_decay final_weight_decay max_grad_norm"
    " sam_rho sam_adaptive",
    "machine": "device precision compile parallel",
}


def _pretrain_parser(method: str | None, data: str | None, recipe: str | None) -> Parser:
    """Options made of the fields of `PretrainConfig` and the keyword arguments of the method."""
    from ..config import PretrainConfig, field_help, type_name
    from ..methods import METHODS

    own = (method or "").rpartition(":")[2]
    parser = Parser(
        "pretrain",
        "METHOD [DATA] [--out RUN] [options]",
        f"Learn a backbone from images without labels. METHOD: {', '.join(METHODS)} (`fastssl "
        "methods` tells what they are), or FILE.py:CLASS, a method of your own. What is not given "
        "comes from --config, then from --recipe, by default the method's for the data."
        + (
            f" The defaults below are those of {own} on {recipe or data or 'digits'}."
            if own
            else ""
        )
        + "\n\nAn interrupted run is saved; go on with: fastssl pretrain --resume --out RUN",
    )
    text, defaults = field_help(), _defaults(method, data, recipe)
    parser.add_argument("data", nargs="?", default=argparse.SUPPRESS, help=text["data"])
    parser.add_argument("--data", metavar="DATA", default=argparse.SUPPRESS, help="The same.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; options override.")
    known = {f.name: f for f in fields(PretrainConfig)}
    groups = {title: names.split() for title, names in GROUPS.items()}
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
            default = defaults.get(name, known[name].default)
            if default is not None:
                help_text += f" Default: {default}."
            _add(group, name, help_text.strip(), metavar=_metavar(kind))
    if method is None:
        return parser
    group = parser.add_argument_group(f"options of {own}")
    for name, (kind, default, text) in _method_options(method).items():
        default = defaults["method_args"].get(name, default)
        if default is not None:
            text = f"{text} Default: {default}.".strip()
        _add(group, name, text, metavar=_metavar(kind))
    return parser


def _defaults(method: str | None, data: str | None, recipe: str | None) -> dict:
    """What unset fields become: of the recipe, by default that for the data, which are `digits`."""
    from ..config import PretrainConfig
    from ..methods import method_class
    from ..methods.recipes import resolve

    if method is None:
        return {}
    method_class(method)  # refuses unknown names
    config = vars(resolve(PretrainConfig(method=method, data=data or "digits", recipe=recipe)))
    return {name: value for name, value in config.items() if value is not None}


def _method_options(method: str) -> dict[str, tuple[type, object, str]]:
    """Type, default and text of each keyword argument of a method's class."""
    from ..config import argument_help, method_arguments
    from ..methods import method_class

    cls = method_class(method)
    parameters = inspect.signature(cls.__init__).parameters
    text = argument_help(cls)
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
    from ..config import type_name

    names = {"a whole number": "N", "a number": "X", "text": "TEXT", "a list": "LIST"}
    names |= {"a mapping": "NAME=X", "a file": "FILE"}
    name = type_name(kind).removesuffix(" or none")
    choices = "|".join(name.replace(" or ", ", ").split(", "))
    return names.get(name, choices if len(choices) < 40 else "NAME")
