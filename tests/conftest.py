import os
import signal
import types

import pytest
import torch
from ranks import Ranks

import fastssl

# A CPU-only torch cannot run PyPI's torchvision, but can import it once its two missing operator
# schemas exist; timm, open_clip and lightly import it wherever it is installed.
if not torch.backends.cuda.is_built():
    _vision = torch.library.Library("torchvision", "FRAGMENT")
    _vision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _vision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# The jobs that a shell puts in the background ignore Ctrl-C, and so does all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    def _patch_once(fn, patch=interpreter._patch_lang):
        """At every call of a device function Triton patches its whole language again."""
        used = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if used and not any(tl.core.is_builtin(module.load) for module in used):
            return types.SimpleNamespace(restore=lambda: None)
        return patch(fn)

    interpreter._patch_lang = _patch_once
    # Computed for every sum and product of int32, and looked at by nobody without debug.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)

# Uninitialised memory is filled with NaN: a kernel that leaves an element out cannot pass.
torch.use_deterministic_algorithms(True, warn_only=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def umask_027():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def ranks():
    """Four processes under gloo, started once: see `ranks.py`."""
    ranks = Ranks()
    yield ranks
    ranks.close()


# Which products the CPU kernels run on: as found, all of the library's, everything in fp32.
CPU_PATHS = {"found": -1, "library": 8 | 32, "fp32": 0}


@pytest.fixture(params=CPU_PATHS)
def cpu_path(request):
    if fastssl.extension.why_missing:
        if request.param != "found":
            pytest.skip("the extension is not built: only the reference runs")
        yield
        return
    torch.ops.fastssl.override_cpu_features(CPU_PATHS[request.param])
    yield
    torch.ops.fastssl.override_cpu_features(-1)
