"""Cases that fail and die, for tests of the measuring processes, which import this."""

import os
import signal

import torch

from fastssl.bench.cases import Case
from fastssl.bench.measure import Work


class Fake(Case):
    """Ours and a baseline, each of which does what its name in `sizes` says."""

    module = None

    def work(self) -> Work:
        return Work(traffic=2**21)

    def make(self):
        return {name: lambda what=what: DO[what]() for name, what in self.sizes}, ["absent one"]


def no_memory():
    raise torch.OutOfMemoryError("no room")


DO = {
    "fine": lambda: (torch.ones(3),),
    "wrong": lambda: (torch.zeros(3),),
    "no memory": no_memory,
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
