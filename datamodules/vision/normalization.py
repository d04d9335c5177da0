"""Means and standard deviations of pixels, each under the name of the convention it belongs to.

Repositories that say they normalise CIFAR-10 do not do the same: figures are comparable within a convention only.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Normalization:
    """A pixel value v of 0 to 255 becomes (v / 255 - mean) / std.

    Args:
        mean: one for each channel, or one for all.
        std: likewise, positive.

    Raises:
        ValueError: the two differ in length, or a std is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.std or min(self.std) <= 0:
            raise ValueError(
                f"normalization: mean {tuple(self.mean)} and std {tuple(self.std)}, expected as many of each, every "
                f"std positive"
            )


CONVENTIONS = {
    # 0 to 1, as s4 feeds MNIST.
    "unit": Normalization((0.0,), (1.0,)),
    # -1 to 1, timm's "inception".
    "half": Normalization((0.5,), (0.5,)),
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # The std over all pixels of the training set.
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # The same cut to three places, in src/dataloaders/basic.py of s4: its published sCIFAR figures.
    "cifar10-s4": Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    # The mean over images of the std within each: example.py of s4, and many CIFAR repositories.
    "cifar10-per-image": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # s4's for grey CIFAR-10, the image task of the Long Range Arena.
    "cifar10-grey-s4": Normalization((122.6 / 255,), (61.0 / 255,)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": Normalization((0.1307,), (0.3081,)),
    "fashion-mnist": Normalization((0.2860,), (0.3530,)),
}

_GREY = {"cifar10": "cifar10-grey-s4", "mnist": "mnist", "fashion-mnist": "fashion-mnist"}
_COLOR = {"cifar10": "cifar10", "cifar100": "cifar100", "mnist": "mnist", "fashion-mnist": "fashion-mnist"}


def default_name(data: str, channels: int) -> str:
    """The convention for ``data`` when none is named: its own, else ``half`` for grey and ``imagenet`` for colour."""
    return _GREY.get(data, "half") if channels == 1 else _COLOR.get(data, "imagenet")


def named(name: str) -> Normalization:
    """The constants of a convention.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CONVENTIONS:
        near = difflib.get_close_matches(name, CONVENTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"normalization: {name!r}, expected one of {', '.join(CONVENTIONS)}{hint}")
    return CONVENTIONS[name]


def resolve(normalization: str | Normalization, channels: int) -> Normalization:
    """The constants, checked against the number of channels.

    Raises:
        ValueError: no convention of that name, or one for another number of channels.
    """
    found = named(normalization) if isinstance(normalization, str) else normalization
    if len(found.mean) not in (1, channels):
        raise ValueError(
            f"normalization: {normalization!r} is for {len(found.mean)} channels and the images have {channels}; "
            f"name another one, or set color"
        )
    return found
