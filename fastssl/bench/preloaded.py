"""Imported once by the server that the measuring processes are forked from."""

import atexit
import contextlib
import gc
import importlib
import logging

from . import augment, losses, methods, optim, running, sigreg, sinkhorn, step  # noqa: F401

logging.disable(logging.ERROR)  # what others' optional parts lack is not this command's to say
for _name in (
    "open_clip.loss",
    "lightly.loss",
    "pytorch_metric_learning.losses",
    "bitsandbytes.optim",
    "torchvision.transforms.v2",
    "kornia.augmentation",
    "torch._dynamo",  # by optimizers
):
    with contextlib.suppress(Exception):  # absent or broken: said where it is used
        importlib.import_module(_name)
logging.disable(logging.NOTSET)

gc.collect()
gc.freeze()  # or every process would walk and copy all of that at each collection
atexit.register(gc.unfreeze)
