"""Processes forked from one that has imported it all, and runs in them, which may be killed."""

import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import wait
from pathlib import Path

import torch

from fastssl.methods import METHODS

IMAGES_ONLY = [name for name, cls in METHODS.items() if not hasattr(cls, "reads_captions")]
"""Methods that train on images without captions."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(  # torch._dynamo: by optimizers
    "pytest fastssl.train fastssl.methods PIL.Image yaml safetensors.torch torch._dynamo "
    "torch.distributed.fsdp torch.distributed.checkpoint torch.distributed.tensor".split()
)


def needed(method, folder, channels=3):
    """The arguments that a method cannot do without: a file, which is written into the folder."""
    if method != "distill":
        return {}
    from fastssl.models import ResNetSmall
    from fastssl.models.classifier import Classifier, packed

    path = Path(folder) / f"teacher{channels}.safetensors"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            head = torch.nn.Linear(128, 3)
            model = Classifier(ResNetSmall(channels, 8), torch.nn.Sequential(), head)
        head.weight.data *= 20  # so that it says different things of different images
        about = {"channels": str(channels), "image_size": "8"}
        path.write_bytes(packed(model, backbone="resnet_small", **about))
    return {"teacher": str(path)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _begin(rank, world, port, function, args):
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*args)


def start(function, *args, world=1):
    """Processes that call function(*args) as the ranks of a torchrun would."""
    port = free_port() if world > 1 else 0
    processes = [
        context.Process(target=_begin, args=(rank, world, port, function, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def run(function, *args, world=1, ends=0, seconds=100):
    """Waits for them, and checks their exit codes."""
    processes = start(function, *args, world=world)
    waiting = {p.sentinel for p in processes}
    while waiting:
        ended = wait(waiting, seconds)
        waiting -= set(ended)
        if not ended or any(p.exitcode not in (None, ends) for p in processes):
            break
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    assert [p.exitcode for p in processes] == [ends] * world


def pretrained(settings, kill_at=None, watch=None):
    """A run; at the end of step `kill_at` all its ranks are killed. Of the step after `watch` each
    rank's sample numbers and views are saved in the run's folder."""
    import torch.distributed as dist

    from fastssl.config import PretrainConfig
    from fastssl.train import pretrain

    method = METHODS[settings["method"]]
    steps, after_step, loss = [settings.get("begun", 0)], method.after_step, method.loss

    def counted(self, step, *progress):
        after_step(self, step, *progress)
        steps[0] = step
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, batch):
        if steps[0] == watch:
            world = dist.get_world_size() if dist.is_initialized() else 1
            rank = dist.get_rank() if world > 1 else 0
            torch.save((batch.index, batch.views), f"{settings['out']}/seen_{rank}_of_{world}.pt")
        return loss(self, batch)

    method.after_step, method.loss = counted, watched
    settings = {k: v for k, v in settings.items() if k != "begun"}
    pretrain(PretrainConfig(**settings))
