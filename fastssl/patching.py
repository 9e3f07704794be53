"""This library's losses and optimizers inside libraries that one cannot edit."""

import importlib
import sys
import warnings
from types import ModuleType

from fastssl import losses
from fastssl.extras import nearest
from fastssl.optim import bnb

# Library: its distribution, the module that has the names, and the names that are replaced.
LIBRARIES = {
    "lightly": (
        "lightly",
        "lightly.loss",
        (
            "NTXentLoss",
            "DCLLoss",
            "DCLWLoss",
            "SwaVLoss",
            "DINOLoss",
            "IBOTPatchLoss",
            "KoLeoLoss",
            "VICRegLoss",
            "BarlowTwinsLoss",
            "LeJEPALoss",
        ),
    ),
    "open_clip": ("open_clip_torch", "open_clip.loss", ("ClipLoss", "SigLipLoss")),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes.optim", bnb.NAMES),
}

_replaced: dict[str, dict[type, type]] = {}
"""Of each library: its class under each of ours that is in place."""


def patch(library: str) -> list[str]:
    """Put this library's classes in the place of another's, in all of its loaded modules.

    What the library makes from then on is ours, for instance by `open_clip.create_loss(args)` or
    lightly's training command, and so is what is imported from it. Subclasses the library has made
    of its own class (open_clip's CoCaLoss and DistillClipLoss) and existing instances stay as they
    are. A second call changes nothing.

    Args:
        library: "open_clip" (ClipLoss, SigLipLoss), "lightly" (NTXentLoss, DCLLoss, DCLWLoss,
            SwaVLoss, DINOLoss, IBOTPatchLoss, KoLeoLoss, VICRegLoss, BarlowTwinsLoss, LeJEPALoss)
            or "bitsandbytes" (of `bitsandbytes.optim` Adam, AdamW, SGD, Lion, RMSprop, Adagrad,
            LARS, LAMB, AdEMAMix, each also with 8bit and 32bit behind it, with bitsandbytes'
            arguments and defaults; see fastssl.optim.bnb. Its Paged classes stay: ours do not page
            to the host).

    Returns:
        The names now bound to our classes, such as "open_clip.factory.ClipLoss".

    Raises:
        ValueError: another library. ImportError: it is not installed.

    Notes: warns of modules outside the library that hold the old class by an earlier
        `from open_clip import ClipLoss`; names inside functions or objects are not seen. While
        patched, `isinstance(x, open_clip.ClipLoss)` asks for our class, and a subclass made of
        that name derives from it and has its methods only: `forward`, no `get_logits`.

    Example:
        >>> fastssl.patch("open_clip")[0]  # doctest: +SKIP
        'open_clip.loss.ClipLoss'
        >>> loss = open_clip.create_loss(args)  # doctest: +SKIP
    """
    distribution, home, names = _known("patch", library)
    try:
        home = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(
            f"patch: {library} is not installed. Install it with: pip install {distribution}"
        ) from error
    pairs = {}
    for name in names:
        original = getattr(home, name, None)
        if original is None or original in _replaced.get(library, ()):  # an older release, or ours
            continue
        ours = bnb.drop_in(original) if library == "bitsandbytes" else getattr(losses, name)
        if ours is not None:
            pairs[original] = ours
    _replaced.setdefault(library, {}).update({ours: original for original, ours in pairs.items()})
    swapped, elsewhere = _swap(library, pairs)
    if elsewhere:
        warnings.warn(
            f"patch: {', '.join(elsewhere)} still refer to {library}'s own classes, as they were "
            f'imported before. Call fastssl.patch("{library}") above those imports.',
            stacklevel=2,
        )
    return swapped


def unpatch(library: str | None = None) -> list[str]:
    """Undo `patch`, for one library or for all.

    Args:
        library: as for `patch`; None for all of them.

    Returns:
        The names now bound to the library's own classes again; what other modules imported while
        patched stays ours.

    Raises:
        ValueError: a library that `patch` does not know.

    Example:
        >>> from fastssl import unpatch
        >>> unpatch()
        []
    """
    if library is None:
        return [name for known in LIBRARIES for name in unpatch(known)]
    _known("unpatch", library)
    return _swap(library, _replaced.pop(library, {}))[0]


def _known(function: str, library: str) -> tuple[str, str, tuple[str, ...]]:
    if library not in LIBRARIES:
        hint = nearest(str(library), LIBRARIES)
        raise ValueError(f"{function}: library must be a known one, got {library!r}. {hint}")
    return LIBRARIES[library]


def _swap(library: str, pairs: dict[type, type]) -> tuple[list[str], list[str]]:
    """Rebind the library's own names for the keys of `pairs`: those names, and others' names."""
    new = {id(old): new for old, new in pairs.items()}  # globals need not be hashable
    swapped, elsewhere = [], []
    for module in [module for module in sys.modules.values() if isinstance(module, ModuleType)]:
        own = module.__name__.partition(".")[0] == library
        for name, held in list(vars(module).items()):
            if id(held) in new:
                (swapped if own else elsewhere).append(f"{module.__name__}.{name}")
                if own:
                    setattr(module, name, new[id(held)])
    return swapped, elsewhere
