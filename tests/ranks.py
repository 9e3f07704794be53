"""Processes that stay: four ranks under gloo, started once, each running what tests send them."""

import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from runs import context

WORLD = 4


def _send(pipe, message) -> None:
    pipe.send_bytes(pickle.dumps(message))  # torch's own pickler would open a file for each tensor


def _receive(pipe):
    return pickle.loads(pipe.recv_bytes())


def _serve(rank: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN, as in conftest
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    # Each process takes part in making every group: the first W ranks, for W = 1 to 4, and pairs.
    groups = {W: dist.new_group(list(range(W))) for W in range(1, WORLD + 1)}
    groups["pairs"] = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])[0]
    while True:
        function, group, args = _receive(pipe)
        try:
            torch.manual_seed(0)
            _send(pipe, (True, function(groups[group], *args)))
        except BaseException:
            _send(pipe, (False, traceback.format_exc()))


class Ranks:
    def __init__(self):
        self.processes = []

    def _start(self) -> None:
        store = os.path.join(tempfile.mkdtemp(), "store")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(r, store, theirs), daemon=True)
            for r, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that the end of the process is seen here

    def run(self, function, group, *args, ranks=None, seconds=100):
        """function(process group, *args) on the group's ranks; what each returned.

        function is a module's own, args and results can be pickled. An exception on any rank is
        raised here, with its text; the others may then wait in a collective, so that the next run
        starts new processes.
        """
        if not self.processes:
            self._start()
        ranks = list(ranks or (range(group) if isinstance(group, int) else range(WORLD)))
        for r in ranks:
            _send(self.pipes[r], (function, group, args))
        results, failures = {}, {}
        deadline = time.monotonic() + seconds
        while len(results) + len(failures) < len(ranks):
            waiting = [self.pipes[r] for r in ranks if r not in results and r not in failures]
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                try:
                    fine, result = _receive(pipe)
                except EOFError:
                    fine, result = False, "the process has ended"
                (results if fine else failures)[self.pipes.index(pipe)] = result
            if failures:  # whoever has its own error to tell does so at once
                deadline = min(deadline, time.monotonic() + 3)
        if len(results) == len(ranks):
            return [results[r] for r in ranks]
        self.close()
        silent = sorted(set(ranks) - set(results) - set(failures))
        told = [f"rank {r}: {text}" for r, text in sorted(failures.items())]
        if silent:
            told.append(f"no answer from ranks {silent}")
        raise (RuntimeError if failures else TimeoutError)("\n".join(told))

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
        self.processes = []
