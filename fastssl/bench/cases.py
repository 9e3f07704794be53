"""What can be measured: groups of cases, each a module with

    SIZES     {device: {case: [sizes by letter]}}
    DTYPES    {case: [dtype]}
    SCALING   [(case, letter that grows, its values, other sizes, expected exponent)]
    work      (case, dtype, **sizes) -> Work
    make      (case, dtype, device, **sizes) -> (providers by name, names of the absent)

The first provider is "ours", the second the baseline that every reader knows.
"""

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from ..extras import nearest
from .measure import Work

GROUPS = "losses sinkhorn sigreg optim augment step methods".split()
SHORT_FLOP = 6e10
"""Of a case of the short selection at most."""


@dataclass(frozen=True)
class Case:
    """One row of a result."""

    group: str
    name: str
    sizes: tuple[tuple[str, int | str], ...]
    """Letters and values."""
    dtype: str
    device: str

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f".{self.group}", __package__)

    def work(self) -> Work:
        return self.module.work(self.name, self.dtype, **dict(self.sizes))

    def make(self) -> tuple[dict, list[str]]:
        return self.module.make(self.name, self.dtype, self.device, **dict(self.sizes))

    def __str__(self) -> str:
        return f"{self.name} {' '.join(f'{k}={v}' for k, v in self.sizes)} {self.dtype}"


def cases(
    groups: Sequence[str] | None = None,
    device: str = "cpu",
    *,
    names: Sequence[str] | None = None,
    sizes: dict[str, Sequence[int | str]] | None = None,
    dtypes: Sequence[str] | None = None,
    short: bool = False,
) -> list[Case]:
    """The cases that fit.

    Args:
        groups: among `GROUPS`; None: all. names: of cases; None: all of the groups.
        sizes: values by letter in the place of a case's own; letters it lacks are passed over.
        dtypes: None: all that the case has.
        short: of each case two sizes, the second smallest and the largest of up to 60 GFLOP;
            the smallest where all are larger.

    Raises:
        ValueError: an unknown group, device, case, letter or dtype, or nothing left.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu, cuda or auto, got {device!r}.")
    known = [g for g in GROUPS if groups is None or g in groups]
    for group in groups or ():
        if group not in GROUPS:
            raise ValueError(f"bench: group must be a known one, got {group!r}. "
                             f"{nearest(group, GROUPS)}")  # fmt: skip
    modules = {g: importlib.import_module(f".{g}", __package__) for g in known}
    every = {name for module in modules.values() for name in module.SIZES[device]}
    for name in names or ():
        if name not in every:
            raise ValueError(f"bench: case must be a known one, got {name!r}. "
                             f"{nearest(name, sorted(every))}")  # fmt: skip
    letters = {
        x for m in modules.values() for all_sizes in m.SIZES[device].values() for x in all_sizes[0]
    }
    for letter in sizes or ():
        if letter not in letters:
            raise ValueError(
                f"bench: sizes must be of letters that cases have, {', '.join(sorted(letters))}, "
                f"got {letter!r}."
            )
    found = []
    for group, module in modules.items():
        for name, own in module.SIZES[device].items():
            if names is not None and name not in names:
                continue
            for dtype in module.DTYPES[name]:
                if dtypes is not None and dtype not in dtypes:
                    continue
                each = [
                    Case(group, name, tuple(s.items()), dtype, device)
                    for s in _with_sizes(own, sizes or {})
                ]
                found += _short(each) if short else each
    if not found:
        raise ValueError(
            f"bench: nothing fits groups {groups}, cases {names}, dtypes {dtypes}. "
            "`fastssl bench --list` prints what there is."
        )
    return found


def scaling_cases(
    groups: Sequence[str] | None, device: str, names: Sequence[str] | None = None
) -> list[tuple[str, float, list[Case]]]:
    """(letter, expected exponent, cases with that size growing) of each curve."""
    curves = []
    for group in GROUPS:
        if groups is not None and group not in groups:
            continue
        module = importlib.import_module(f".{group}", __package__)
        for name, letter, values, others, exponent in module.SCALING:
            if names is not None and name not in names:
                continue
            dtype = module.DTYPES[name][0]
            grown = [
                Case(group, name, tuple((others | {letter: v}).items()), dtype, device)
                for v in values
            ]
            curves.append((letter, exponent, grown))
    return curves


def _with_sizes(own: list[dict], given: dict) -> list[dict]:
    given = {k: v for k, v in given.items() if k in own[0]}
    found = []
    for one in own:
        for values in itertools.product(*given.values()):
            sizes = one | dict(zip(given, values, strict=True))
            if sizes not in found:
                found.append(sizes)
    return found


def _short(each: list[Case]) -> list[Case]:
    each = sorted(each, key=lambda case: case.work().flop or case.work().traffic)
    small = [case for case in each if case.work().flop <= SHORT_FLOP] or each[:1]
    return small if len(small) <= 2 else [small[1], small[-1]]
