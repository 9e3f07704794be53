"""The optimizers under names that timm's factory knows."""

import inspect

from fastssl.extras import require

from . import rules
from .blockwise import Blockwise


def register_timm() -> list[str]:
    """Make timm's `create_optimizer_v2` and training script know the optimizers of this package.

    A name is "fastssl_" and the class's in small letters, with "32bit" where it has no 8:
    "fastssl_adamw8bit", "fastssl_lars32bit". timm reads what follows the last "_" of a name, so
    "adamw8bit" says the same. As with timm's own, momentum is 0.9 and SGD Nesterov's unless told
    otherwise. A second call changes nothing.

    Returns:
        The names.

    Raises:
        ImportError: timm is not installed, or older than 1.0.12, which has no registry.

    Example:
        >>> from timm.optim import create_optimizer_v2
        >>> names = register_timm()
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = create_optimizer_v2(model, opt="fastssl_adamw8bit", lr=1e-3)
    """
    timm = require("timm", "vision")
    factory = require("timm.optim._optim_factory", "vision")
    if not hasattr(factory, "default_registry"):
        raise ImportError(
            "register_timm: timm must have a registry of optimizers (1.0.12 or later), got "
            f"{timm.__version__}. Update it with: pip install -U timm"
        )
    names = []
    for cls in vars(rules).values():
        if not (isinstance(cls, type) and issubclass(cls, Blockwise)) or cls is Blockwise:
            continue
        short = cls.__name__.lower() + ("32bit" if cls.bits == 32 else "")
        names.append(f"fastssl_{short}")
        if names[-1] in factory.default_registry.list_optimizers():
            continue
        arguments = inspect.signature(cls).parameters
        info = factory.OptimInfo(
            name=names[-1],
            opt_class=cls,
            description=f"fastssl {cls.__name__}, states of {cls.bits} bits",
            has_eps="eps" in arguments,
            has_momentum="momentum" in arguments,
            has_betas="betas" in arguments,
            num_betas=len(arguments["betas"].default) if "betas" in arguments else 2,
            defaults={"nesterov": True} if "nesterov" in arguments else None,
        )
        factory.default_registry.register(info)
        factory.default_registry.register_alias(short, names[-1])
    return names
