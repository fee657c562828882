"""What a layer remembers of its calls: whether "auto" gave all of one to PyTorch's own ops.

To check a call, choose its backend and go there takes 6 us, longer than PyTorch takes for a product of 64 x 64. Where the choice
was PyTorch's, the next call of the same kind goes straight to torch.nn's forward, which takes any arguments and words its own
errors: what a kind leaves out, such as another weight, can make a choice stale but no result wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import _registry

_MOST_KINDS = 256


def is_torchs(layer: torch.nn.Module, x: Tensor, weight: Tensor | None, *more: Hashable) -> bool | None:
    """Whether calls of this kind go to torch.nn's forward; None where that is not known, nor to be known: while a compiler, a
    tracer or `explain` looks, and where a backend is named.

    `weight` says whether there will be a gradient (None: if any is recorded), `more` what else tells kinds of calls apart.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return None
    choices = layer.__dict__.get("_choices")
    if choices is None or x.is_nested or not _registry.is_free(layer.backend):
        return None
    return choices.get(_kind(x, weight, more))


def remembering(layer: torch.nn.Module, x: Tensor, weight: Tensor | None, *more: Hashable) -> Callable[..., Any]:
    """`run` such that run(call, *args, **kwargs) is call(*args, **kwargs), whose choices `is_torchs` knows from then on."""

    def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plain = type(x) is Tensor and not torch.compiler.is_compiling() and not x.is_nested
        if not plain or not _registry.is_free(layer.backend):
            return call(*args, **kwargs)
        names: set[str] = set()
        with _registry.listening(lambda op, chosen, *rest: names.add(chosen)):
            result = call(*args, **kwargs)
        if names:
            choices = layer.__dict__.setdefault("_choices", {})
            if len(choices) >= _MOST_KINDS:
                choices.clear()
            choices[_kind(x, weight, more)] = names == {"torch"}
        return result

    return run


def _kind(x: Tensor, weight: Tensor | None, more: tuple) -> tuple:
    save = torch.is_grad_enabled() and (weight is None or weight.requires_grad or x.requires_grad)
    return save, x.shape, x.stride(), x.dtype, x.is_cpu, torch._C._is_any_autocast_enabled(), more
