"""fastssl: self-supervised learning from the command line.

  fastssl methods                           what can be trained
  fastssl pretrain METHOD DATA --out RUN    learn a backbone without labels
  fastssl evaluate CKPT                     measure what its features are worth
  fastssl compare METHOD [METHOD ...]       methods side by side on one data set
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

Exit codes: 0 done; 1 a result below its bound (demo) or a method that failed
(compare); 2 an error, in one line on stderr; 130 interrupted (Ctrl-C),
143 terminated (SIGTERM), both saved.
"""

import importlib
import os
import sys
import warnings

from ..extras import nearest

COMMANDS = "methods pretrain evaluate compare report embed export demo info".split()
# What a user can cause: one message, no traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code.

    0; 1 for a result below its bound or a method that failed; 2 for an error; 130 and 143
    for a run that SIGINT (Ctrl-C) or SIGTERM stopped and that can be resumed.
    """
    argv = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(__doc__.strip(), file=sys.stdout if argv else sys.stderr, flush=True)
            return 0 if argv else 2
        if argv[0] == "--version":
            from fastssl import __version__

            print(f"fastssl {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command {argv[0]!r}. {nearest(argv[0], COMMANDS)}")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command = importlib.import_module(f".{argv[0]}", __name__)  # only its imports
            code = command.run(argv[1:])
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


def _dashed(argument: str) -> str:
    """--batch_size is --batch-size; values and =values stay as they are."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)
