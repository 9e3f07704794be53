"""fastssl: kernels for self-supervised learning, and the loop around them."""

import importlib.metadata
import importlib.util
import warnings

__version__ = "0.1.0"

if importlib.util.find_spec("fastssl.kernels") is None:
    raise ImportError(
        "fastssl.kernels is missing: this is a bare checkout on the path, not an installation. "
        "Run `pip install -e . --no-build-isolation` in the checkout."
    )

from fastssl import extension, losses, ops, schedules
from fastssl.dist import LOCAL
from fastssl.gradcache import GradCache
from fastssl.patching import patch, unpatch
from fastssl.queue import FeatureQueue

if extension.why_missing:
    warnings.warn(
        f"fastssl: {extension.why_missing}. CPU losses run on the plain PyTorch reference, "
        "which holds all logits.",
        stacklevel=2,
    )

try:
    importlib.metadata.distribution("fastssl")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    warnings.warn(
        "fastssl: the distribution `fastssl` in this environment is an unrelated TLS certificate "
        "client that installs files under the same name. Run `pip uninstall fastssl`, then "
        "reinstall `fastssl-kernels`.",
        stacklevel=2,
    )

__all__ = [
    "LOCAL",
    "FeatureQueue",
    "GradCache",
    "extension",
    "losses",
    "ops",
    "patch",
    "schedules",
    "unpatch",
]
