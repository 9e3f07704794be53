"""fastssl info: versions, hardware, kernels in use."""

from .parser import Parser


def run(argv: list[str]) -> int:
    Parser("info", "", "Print versions, hardware, and which kernel serves each operation.").parse(
        argv
    )
    from ..info import info

    print(info())
    return 0
