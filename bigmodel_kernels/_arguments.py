"""Checks of arguments that are no tensors; each returns the value, or raises with the argument's name."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch


def flag(name: str, value: Any) -> bool:
    """A bool, as PyTorch takes it: never whatever is true or false by Python's rules."""
    if value is True or value is False:
        return value
    if isinstance(value, torch.SymBool) or type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def number(name: str, value: Any) -> float:
    """A real number that float64 holds."""
    if type(value) is float:
        return value
    if isinstance(value, (bool, torch.SymBool)) or not isinstance(value, (float, Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float holds, got one of {value.bit_length()} bits") from None


def integer(name: str, value: Any) -> int:
    """An int of 64 bits."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, (bool, torch.SymBool)) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not isinstance(value, torch.SymInt) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    return value
