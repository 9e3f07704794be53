"""Processes that stay: four ranks under gloo, started once, each running what tests send them."""

import os
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4


def _serve(rank: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    # Each process takes part in making every group: the first W ranks, for W = 1 to 4, and pairs.
    groups = {W: dist.new_group(list(range(W))) for W in range(1, WORLD + 1)}
    groups["pairs"] = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])[0]
    while (task := pipe.recv()) is not None:
        function, group, args = task
        try:
            torch.manual_seed(0)
            pipe.send((True, function(groups[group], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    def __init__(self):
        context = mp.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(r, store, theirs), daemon=True)
            for r, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, group, *args, ranks=None, seconds=100):
        """function(process group, *args) on the group's ranks; what each returned.

        function is a module's own, args and results can be pickled. An exception on any rank is
        raised here, with its text.
        """
        ranks = ranks or (range(group) if isinstance(group, int) else range(WORLD))
        for r in ranks:
            self.pipes[r].send((function, group, args))
        answers = []
        for r in ranks:
            if not self.pipes[r].poll(seconds):
                raise TimeoutError(f"rank {r} has not answered within {seconds} s")
            answers.append(self.pipes[r].recv())
        for r, (fine, result) in zip(ranks, answers, strict=True):
            if not fine:
                raise RuntimeError(f"rank {r}: {result}")
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
