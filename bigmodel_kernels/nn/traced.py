"""Layers under torch.fx.symbolic_trace, which takes the layers of torch.nn as wholes and would look into those of others, and
under torch.jit.script."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Proxy


def traced(layer: torch.nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """layer(*args), of which some are proxies, as one node of their graph; forward(*args) where the layer is the graph's root, or
    of a class of somebody else's, which may do more than this call."""
    tracer = next(a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)).tracer
    if tracer.root is layer or not type(layer).__module__.startswith("bigmodel_kernels."):
        return forward(*args, **kwargs)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, kwargs)


def traced_whole(forward: Callable) -> Callable:
    """The forward of a layer that becomes one node of a graph."""

    @functools.wraps(forward)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and any(isinstance(a, Proxy) for a in (*args, *kwargs.values())):
            return traced(self, functools.partial(forward, self), *args, **kwargs)
        return forward(self, *args, **kwargs)

    return call


def refuse_script(layer: torch.nn.Module) -> None:
    """The `__prepare_scriptable__` of every layer: torch.jit.script asks for it before it compiles anything, and would stumble
    over the choice of a backend, which is Python. A layer of torch.nn given in place of ours would be put into the very model
    that is scripted."""
    name = type(layer).__name__
    stock = f", or torch.nn.{name}, which has the same state_dict" if hasattr(torch.nn, name) else ""
    raise RuntimeError(
        f"torch.jit.script cannot compile bigmodel_kernels.nn.{name}, which chooses its backend in Python: "
        f"use torch.jit.trace or torch.compile{stock} (after bmk.optimize: report.revert())"
    )
