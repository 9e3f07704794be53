"""What the commands' options are read with."""

import argparse
import os
import shutil
import textwrap

from ..extras import nearest


class Parser(argparse.ArgumentParser):
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
                self.error(f"unknown option {name}. {nearest(name, known)}")
            self.error(f"unexpected argument {argument!r}")
        return options

    def error(self, message: str):
        message = message.rstrip(" .")
        stop = "" if message.endswith("?") else "."
        raise ValueError(f"{message}{stop} See `{self.prog} --help`.")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def list_of(kind: type, words: str):
    def numbers(text: str) -> list:
        try:
            return [kind(name) for name in names(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None

    return numbers


def main_rank() -> bool:
    """Whether this is the one process, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"
