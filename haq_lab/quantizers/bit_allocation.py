"""Choose 4 or 8 bits for each linear, so that an average number of bits is kept and the predicted error is smallest.

    bits = allocate({"q": Choice(weights=100, error=0.3), "down": Choice(weights=300, error=2.0)}, average=5.0)

This is a knapsack: giving a linear 8 bits costs four more bits for each of its weights, and saves its error. It is
solved greedily by error saved per weight. The error left exceeds that of the best choice by at most one linear's error.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Bits = Literal[8, 4]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Choice:
    """One linear, or several that must have equal bits.

    Attributes:
        weights: Number of weights.
        error: Predicted error that 8 bits save over 4.
    """

    weights: int
    error: float


def allocate(choices: Mapping[Key, Choice], average: float) -> dict[Key, Bits]:
    """Choose the bits of each linear.

    Args:
        choices: The linears by key.
        average: Largest average number of bits of a weight, from 4 to 8.

    Returns:
        8 or 4 for each key.
    """
    total = sum(choice.weights for choice in choices.values())
    room = (average - 4) / 4 * total  # weights that may have 8 bits
    bits: dict[Key, Bits] = dict.fromkeys(choices, 4)
    for key in sorted(choices, key=lambda key: -choices[key].error / choices[key].weights):
        if choices[key].weights <= room:
            bits[key] = 8
            room -= choices[key].weights
    return bits
