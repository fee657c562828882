"""Calls that are known: a model makes the same few again and again, and to check their arguments and to choose their backend
takes longer than a small one, or a twentieth of a middling one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bigmodel_kernels import _registry
from bigmodel_kernels._library import Call, Op, are_plain_eager, in_forward_mode

_MOST = 4096


class Plans:
    """The plans of an op's valid calls on the CPU: functions of its tensors, which are its first arguments, alone, under all that
    the checks and the choice of the backend depend on.

    A backend's `plan(*args)` makes one for arguments such as these; None where the call records for a backward of ours.
    """

    def __init__(self, op: Op):
        self._op = op
        self._plans: dict[tuple, Callable] = {}

    def look_up(self, backend: str, tensors: Sequence, options: tuple) -> tuple[tuple | None, Callable | None]:
        """The key of a call, None where it cannot have one, and its plan, None where it has none yet.

        `tensors` are x, the weight, and those that may be None.
        """
        if not are_plain_eager(tensors) or not _registry.is_free(backend):
            return None, None
        key = _key(tensors, options)
        try:
            return key, self._plans.get(key)
        except TypeError:  # lists have no hash
            return None, None

    def remember(self, key: tuple, args: tuple, save: bool) -> None:
        """Keeps the plan for the op's arguments `args`, those of the call of this key, which records for a backward if `save`."""
        op = self._op
        name = _registry.select(op.name, "auto", op.prefer, args)
        plan = _registry.module(op.name, name).plan(*args) if name in ("cpu", "torch") else None
        if plan is None and save and name == "cpu":
            plan = _recording(Call(op, name, args))
        if plan is not None:
            if len(self._plans) >= _MOST:
                self._plans.clear()
            self._plans[key] = plan


def _recording(call: Call) -> Callable:
    return lambda *tensors: call(tensors)[0]


def _key(tensors: Sequence, options: tuple) -> tuple | None:
    # Few calls and no comprehensions: right after a kernel each takes microseconds.
    x, weight = tensors[:2]
    if x is None or weight is None or not (x.is_cpu and weight.is_cpu):
        return None
    if torch._C._is_any_autocast_enabled() or in_forward_mode():
        return None
    save = False
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                save = True
                break
    if save:
        for t in tensors:
            if t is not None and t.is_inference():  # autograd saves no such tensor
                return None
    rest = []
    for t in tensors[2:]:
        rest += (None,) if t is None else (t.shape, t.dtype, t.device)
    kinds = tuple(map(type, options))  # True, 1 and 1.0 are one key else, and not all of them are valid
    return x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, *rest, save, kinds, *options
