"""Finds convolution (+ batch norm) (+ a sum) + activation (+ max-pool) in a traced forward, and runs each as one fused call.

A linear layer with its activation is one as well.

A forward is overlaid only where tracing cannot change its meaning: no optional arguments (a branch on one would be frozen
in), no state changed while tracing, no tensor made from constants. Train and eval are traced apart, so that a branch on
`self.training` keeps its meaning; in eval the batch norm is folded into the convolution's scale and shift.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block, conv_sum_block, linear_block
from bigmodel_kernels.nn.linear import LINEAR_LAYERS, has_hooks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, bnn.Conv1d, bnn.Conv2d)  # a subclass may compute anything
_ACTIVATION_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
}
_ACTIVATION_METHODS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")  # the last two are methods


@dataclass
class Overlay:
    """A module whose forward now runs fused calls; `undo()` takes the overlay off."""

    path: str
    module: nn.Module
    chains: list[str]

    def undo(self) -> None:
        self.module.__dict__.pop("forward", None)


@dataclass
class _Chain:
    """Nodes that become one call, in order: conv, then what follows."""

    nodes: list[fx.Node]
    names: list[str]
    norm: fx.Node | None = None
    residual: fx.Node | None = None  # what is added before the activation
    activation: str | tuple[str, float] | None = None
    pool: tuple | None = None  # size, stride, padding

    def last(self) -> fx.Node:
        return self.nodes[-1]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)


class _FusedForward:
    """The overlay: one traced forward for training, one for eval."""

    def __init__(self, module: nn.Module, train: fx.GraphModule, evaluate: fx.GraphModule):
        self.module, self.train, self.evaluate = module, train, evaluate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.train if self.module.training else self.evaluate).forward(*args, **kwargs)


def fuse(model: nn.Module, allowed: Callable[[nn.Module, str], bool], backend: str) -> Iterator[Overlay]:
    """Overlays the forward of `model`, or, where it cannot be traced, of its children; yields what it overlaid."""
    yield from _fuse_module(model, "", allowed, backend)


def _fuse_module(module: nn.Module, path: str, allowed: Callable, backend: str) -> Iterator[Overlay]:
    if not any(isinstance(m, (nn.Conv1d, nn.Conv2d)) for m in module.modules()) or isinstance(
        module, (nn.Conv1d, nn.Conv2d)
    ):
        return
    if type(module).__module__.startswith(("bigmodel_kernels.", "torch.")) and not isinstance(module, nn.Sequential):
        return  # such layers run their own fused calls
    graphs = {mode: _traced(module, mode) for mode in (True, False)}
    if all(graphs.values()) and "forward" not in module.__dict__:
        chains: dict[bool, list[_Chain]] = {}
        for mode, graph in graphs.items():
            found = _find_chains(module, graph) + _find_linears(module, graph)
            chains[mode] = [
                c for c in found if all(allowed(m, _join(path, name)) for m, name in _modules_of(module, c))
            ]
            for chain in chains[mode]:
                _replace(graph, chain, backend)
            graph.lint()
        if any(chains.values()):
            module.forward = _FusedForward(module, *(fx.GraphModule(module, graphs[mode]) for mode in (True, False)))
            yield Overlay(path, module, [" + ".join(c.names) for c in (chains[False] or chains[True])])
    # A traced forward calls all but its nn.Sequential children as they are, so those are looked at on their own.
    for name, child in _called(module) if all(graphs.values()) else module.named_children():
        yield from _fuse_module(child, _join(path, name), allowed, backend)


def _called(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a traced module, those of its nn.Sequential children in their place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            yield from ((_join(name, inner), m) for inner, m in _called(child))
        else:
            yield name, child


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _traced(module: nn.Module, training: bool) -> fx.Graph | None:
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    modes = {m: m.training for m in module.modules()}
    before = {m: dict(m.__dict__) for m in module.modules()}
    try:
        for m in modes:
            m.training = training
        graph = _Tracer().trace(module)
    except Exception:  # the forward runs with stand-ins for tensors, and may raise anything; then it is not traceable
        return None
    finally:
        changed = any(before[m] != {**m.__dict__, "training": modes[m]} for m in modes)
        for m, mode in modes.items():
            m.__dict__.clear()
            m.__dict__.update(before[m])
            m.training = mode
    constants = any(n.op == "get_attr" and n.target.startswith("_tensor_constant") for n in graph.nodes)
    return None if changed or constants else graph


def _layer_of(module: nn.Module) -> Callable[[fx.Node], nn.Module | None]:
    """The layer that a node calls; None for any other node, and for a layer with hooks."""
    layers = dict(module.named_modules())
    return lambda node: layers[node.target] if node.op == "call_module" and not has_hooks(layers[node.target]) else None


def _next_node(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _append_activation(chain: _Chain, layer: Callable) -> None:
    following = _next_node(chain.last())
    if following is not None and (activation := _activation(following, layer)) is not None:
        chain.activation = activation
        chain.nodes.append(following)
        chain.names.append(activation if isinstance(activation, str) else activation[0])


def _find_linears(module: nn.Module, graph: fx.Graph) -> list[_Chain]:
    layer = _layer_of(module)
    chains = []
    for node in graph.nodes:
        if type(layer(node)) in LINEAR_LAYERS and len(node.args) == 1:
            chain = _Chain([node], ["Linear"])
            _append_activation(chain, layer)
            if chain.activation is not None:
                chains.append(chain)
    return chains


def _find_chains(module: nn.Module, graph: fx.Graph) -> list[_Chain]:
    layer = _layer_of(module)
    chains: list[_Chain] = []
    summed: set[fx.Node] = set()
    for node in graph.nodes:
        convolution = layer(node)
        if type(convolution) not in _CONVOLUTIONS or convolution.padding_mode != "zeros" or len(node.args) != 1:
            continue
        chain = _Chain([node], [type(convolution).__name__])
        following = _next_node(node)
        if following is not None and _folds(layer(following), convolution):
            chain.norm = following
            chain.nodes.append(following)
            chain.names.append("BatchNorm")
        following = _next_node(chain.last())
        if following is not None and following not in summed and (other := _summand(following, chain)) is not None:
            chain.residual = other
            summed.add(following)
            chain.nodes.append(following)
            chain.names.append("sum")
        _append_activation(chain, layer)
        following = _next_node(chain.last())
        if following is not None and (pool := _max_pool(following, layer, convolution)) is not None:
            chain.pool = pool
            chain.nodes.append(following)
            chain.names.append(f"max-pool {pool[0]}")
        if len(chain.nodes) > 1 and _may_move(module, graph, chain):
            chains.append(chain)
    return chains


def _summand(node: fx.Node, chain: _Chain) -> fx.Node | None:
    """The other operand, where `node` adds one to the end of the chain."""
    if (
        node.op not in ("call_function", "call_method")
        or node.target not in _SUMS
        or node.kwargs
        or len(node.args) != 2
    ):
        return None
    first, second = node.args
    if node.target in (operator.iadd, "add_") and first is not chain.last():
        return None  # writes into the other
    other = second if first is chain.last() else first
    return other if isinstance(other, fx.Node) and other is not chain.last() else None


def _may_move(module: nn.Module, graph: fx.Graph, chain: _Chain) -> bool:
    """Whether the chain's first node, which is to run in the place of its last, moves past nothing that could write into its
    input."""
    between = list(graph.nodes)
    between = between[between.index(chain.nodes[0]) : between.index(chain.last())]
    return not any(_may_write(module, node) for node in between if node not in chain.nodes)


def _may_write(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        called = module.get_submodule(node.target)
        known = type(called).__module__.startswith(("bigmodel_kernels.", "torch.nn."))
        return not known or getattr(called, "inplace", False)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = name in ("setitem", "iadd", "isub", "imul", "itruediv") or name.endswith("_")
        return in_place or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return node.op == "call_method" and node.target.endswith("_")


def _folds(norm: nn.Module | None, convolution: nn.Module) -> bool:
    kind = nn.BatchNorm1d if isinstance(convolution, nn.Conv1d) else nn.BatchNorm2d
    return type(norm) is kind and norm.track_running_stats


def _activation(node: fx.Node, layer: Callable) -> str | tuple[str, float] | None:
    if node.op == "call_function":
        if node.target is F.leaky_relu:
            options = dict(zip(("input", "negative_slope", "inplace"), node.args)) | dict(node.kwargs)
            return None if options.get("inplace", False) else _leaky(options.get("negative_slope", 0.01))
        inplace = node.kwargs.get("inplace", False) or len(node.args) > 1
        return None if inplace else _ACTIVATION_FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(node.target)
    module = layer(node)
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    if type(module) is nn.LeakyReLU:
        return _leaky(module.negative_slope)
    return _ACTIVATION_MODULES.get(type(module))


def _leaky(slope: Any) -> tuple[str, float] | None:
    return ("leaky_relu", float(slope)) if isinstance(slope, (int, float)) and slope >= 0 else None


def _max_pool(node: fx.Node, layer: Callable, convolution: nn.Module) -> tuple | None:
    """Size, stride and padding of an undilated max-pool; None for anything else."""
    one_dimensional = isinstance(convolution, nn.Conv1d)
    if node.op == "call_function" and node.target in (F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d):
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        options = dict(zip(names, node.args)) | dict(node.kwargs)
    else:
        module = layer(node)
        if type(module) is not (nn.MaxPool1d if one_dimensional else nn.MaxPool2d):
            return None
        options = {
            key: getattr(module, key)
            for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        }

    size = options["kernel_size"]
    stride, padding, dilation = options.get("stride") or size, options.get("padding", 0), options.get("dilation", 1)
    values = [
        v for option in (size, stride, padding) for v in (option if isinstance(option, (tuple, list)) else [option])
    ]
    plain = dilation in (1, (1,), [1], (1, 1), [1, 1]) and all(isinstance(v, int) for v in values)
    whole = not options.get("ceil_mode", False) and not options.get("return_indices", False)
    return (size, stride, padding) if plain and whole else None


def _modules_of(module: nn.Module, chain: _Chain) -> list[tuple[nn.Module, str]]:
    return [(module.get_submodule(n.target), n.target) for n in chain.nodes if n.op == "call_module"]


def _replace(graph: fx.Graph, chain: _Chain, backend: str) -> None:
    convolution = chain.nodes[0]
    with graph.inserting_before(chain.last()):
        layer = graph.get_attr(convolution.target)
        if chain.names[0] == "Linear":
            call = graph.call_function(
                linear_block, (layer, convolution.args[0], chain.activation), {"backend": backend}
            )
        else:
            norm = graph.get_attr(chain.norm.target) if chain.norm is not None else None
            options = {"activation": chain.activation, "pool": chain.pool and ("max", *chain.pool), "backend": backend}
            if chain.residual is None:
                call = graph.call_function(conv_block, (layer, convolution.args[0], norm), options)
            else:
                call = graph.call_function(conv_sum_block, (layer, convolution.args[0], norm, chain.residual), options)
    chain.last().replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
