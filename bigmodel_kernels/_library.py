"""The one place that knows torch.library: an op's schema, fake, implementation and gradient.

An op `foo` becomes two operators, `bigmodel_kernels::foo_fwd` and `foo_bwd`, each with a last argument `str backend`,
and one autograd.Function around the pair (half the call cost of register_autograd, and torch.compile sees two opaque
ops). The backend is chosen on real tensors: before the autograd.Function in eager mode, inside the operator under
torch.compile, so that a compiled graph never has a device, a shape or an environment variable frozen in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bigmodel_kernels import _extension, _registry

_definitions = torch.library.Library("bigmodel_kernels", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_ops: dict[str, Op] = {}


def needs_grad(*args: Any) -> bool:
    """Whether a gradient may be asked for through one of these (tensors, lists of tensors, anything else)."""
    if torch.is_grad_enabled():
        for a in args:
            if a.requires_grad if isinstance(a, torch.Tensor) else isinstance(a, (list, tuple)) and needs_grad(*a):
                return True
    return False


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents, by torch.autograd.forward_ad or torch.func.jvp, which a kernel of ours would lose."""
    return torch.autograd.forward_ad._current_level >= 0


# Asked once: torch.compile of torch 2.11 and before does not trace the question.
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for this type of device; False for one that has none, such as meta."""
    return kind in _AUTOCAST and torch.is_autocast_enabled(kind)


def autocast(*tensors: Any) -> tuple:
    """Casts floating tensors to the autocast dtype of their device where autocast is on, as torch's own ops do."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = next(t for t in tensors if isinstance(t, torch.Tensor))
    kind = first.device.type
    if not autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return type(t)(cast(x) for x in t)
        castable = isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if castable else t

    return tuple(cast(t) for t in tensors)


class Op:
    """One operation of the library.

    Args:
        name: the stem, `foo`; the backends are the modules of `bigmodel_kernels.ops.foo`.
        fwd, bwd: schemas without name and backend: "(Tensor x, Tensor[] weights, int n) -> (Tensor y, Tensor saved)".
            The last arguments of bwd are all the arguments of fwd, in order, so that both choose the same backend. A last
            argument `save` of fwd, a bool or an int, tells whether a gradient may be asked for.
        fake_fwd, fake_bwd: shapes, dtypes and exact strides of the results; called without `backend`.
        prefer: `prefer(*args)` is the order in which "auto" tries the backends for these arguments.
        backward: `backward(op, args, outputs, grads, needs, backend)` returns one gradient (None, or a list for a list)
            per forward argument, by calling `op.bwd(..., backend)`. `outputs` are all outputs of fwd; `grads` holds None for an
            output that nothing used; `needs` tells per argument (per element of a list) whether its gradient is wanted.
        differentiable: `differentiable(*args)` gives the same outputs in plain torch ops; gradients of gradients go through it.
        results: how many of the outputs are the op's results; those after them are saved for the backward only and carry
            no gradient.
        complete: `complete(outputs, *args)` adds the outputs that a backend may leave out, which the operator has to give.
        reads_results: `reads_results(*args)` says whether the backward reads the results themselves, for all of them or, as a
            tuple, for each. Those that it does not read are not saved, so that the caller may overwrite them, as an in-place ReLU
            after a layer does; the backward gets None.
    """

    def __init__(
        self,
        name: str,
        fwd: str,
        bwd: str,
        *,
        fake_fwd: Callable,
        fake_bwd: Callable,
        prefer: Callable[..., tuple[str, ...]],
        backward: Callable,
        differentiable: Callable,
        results: int,
        reads_results: Callable[..., bool | tuple[bool, ...]] = lambda *args: True,
        complete: Callable = lambda outputs, *args: outputs,
    ):
        self.name = name
        self.prefer = prefer
        self._tensors = {"fwd": _tensor_arguments(fwd), "bwd": _tensor_arguments(bwd)}
        self.arity = len(torch._C.parse_schema(f"{name}{fwd}").arguments)
        self._lists = _list_arguments(fwd)
        self._told = " save)" in fwd
        self._operators = {
            "fwd": self._define(f"{name}_fwd", fwd, fake_fwd, "fwd"),
            "bwd": self._define(f"{name}_bwd", bwd, fake_bwd, "bwd"),
        }
        self.backward, self.differentiable, self.results = backward, differentiable, results
        self.reads_results, self.complete = reads_results, complete
        _ops[name] = self

    def _define(self, name: str, schema: str, fake: Callable, direction: str):
        def implementation(*args: Any):
            *rest, backend = args
            forward_args = tuple(rest[-self.arity :])
            if backend == "auto":
                backend = _registry.select(self.name, backend, self.prefer, forward_args)
            else:
                _registry.require(self.name, backend, forward_args)
            with torch.no_grad():  # the gradient is _Pair's business, whoever calls the operator
                outputs = run_backend(self.name, backend, direction, rest)
                return self.complete(outputs, *rest) if direction == "fwd" else outputs

        return _operator(name, schema, implementation, fake)

    def __call__(self, *args: Any, backend: str):
        """Runs the op on its validated arguments; returns the results, after which all or none of what is saved may follow."""
        compiling = torch.compiler.is_compiling()
        plain = not compiling and is_plain_eager(self._tensors["fwd"], args)
        by_choice = not compiling and _registry.wanted(backend) == "auto"
        if compiling:
            _registry.check_name(backend)
        elif by_choice and self._is_torch_only(args, plain):
            backend = "torch"
        else:
            backend = _registry.select(self.name, backend, self.prefer, args)
            if backend != "torch" and in_forward_mode():
                raise RuntimeError(
                    f"{self.name}: backend {backend!r} has no forward-mode derivative; 'auto' and 'torch' have PyTorch's"
                )
        if backend == "torch" and not compiling:
            return _registry.module(self.name, "torch").call(*args)
        if not (args[-1] if self._told else needs_grad(*[args[i] for i in self._tensors["fwd"]])):
            if not plain:
                return self.fwd(*args, backend)
            return run_backend(self.name, backend, "fwd", args, "infer")
        flat, lengths = _flatten(args, self._lists)
        if compiling:
            flat = _each_once(flat)
        if by_choice:
            tensors = [flat[i] for i in self.tensors_at(lengths)]
            if any([t.is_inference() for t in tensors if t is not None]):  # autograd saves no such tensor
                return _registry.module(self.name, "torch").call(*args)
        if plain:
            call = Call(self, backend, flat, lengths)
            return call([flat[i] for i in call.at])
        return _Pair.apply(self.name, backend, lengths, *flat)

    def tensors_at(self, lengths: tuple[int, ...]) -> Sequence[int]:
        """Which arguments of fwd are tensors, those that are left out included, once `_flatten` has laid out the lists."""
        if not lengths:
            return self._tensors["fwd"]
        of_flat = [i in self._tensors["fwd"] for i, n in enumerate(lengths) for _ in range(abs(n))]
        return [i for i, is_tensor in enumerate(of_flat) if is_tensor]

    def _is_torch_only(self, args: Sequence, plain: bool) -> bool:
        """Whether only PyTorch's own ops know what is asked of them here: the transforms of torch.func, forward-mode derivatives,
        and tensors of other libraries' classes, such as distributed or quantized ones."""
        if in_forward_mode():
            return True
        if plain:
            return False
        if torch._C._are_functorch_transforms_active():
            return True
        tensors = [args[i] for i in self._tensors["fwd"]]
        return any(
            type(t) not in _PLAIN and not type(t).__module__.startswith("torch._subclasses")
            for a in tensors
            for t in (a if isinstance(a, (list, tuple)) else (a,))
        )

    def fwd(self, *args: Any):
        """The forward on the backend named last, which has been selected for these arguments; no gradient."""
        return self._run("fwd", args)

    def bwd(self, *args: Any):
        """The backward; as `fwd`. Outside the operator, which fixes their layout, gradients may lie as by `bwd_freely`."""
        return self._run("bwd", args, "bwd_freely")

    def _run(self, direction: str, args: tuple, rather: str = ""):
        # In plain eager mode straight to the backend: the dispatcher's round trip through Python costs as much as a small call.
        if args[-1] != "auto" and is_plain_eager(self._tensors[direction], args):
            return run_backend(self.name, args[-1], direction, args[:-1], rather)
        return self._operators[direction](*args)


class ForwardOp:
    """An operation without a gradient, which may write into some of its arguments: one operator, `bigmodel_kernels::foo`.

    Args:
        name: the stem, `foo`; the backends are the modules of `bigmodel_kernels.ops.foo`, which have `supports` and `fwd`.
        schema: as of `Op`, with what is written into marked "Tensor(a!) state"; no result is one of the arguments.
        fake, prefer: as `fake_fwd` and `prefer` of `Op`.
    """

    def __init__(self, name: str, schema: str, *, fake: Callable, prefer: Callable[..., tuple[str, ...]]):
        self.name, self.prefer = name, prefer
        self._tensors = _tensor_arguments(schema)
        self._operator = _operator(name, schema, self._run, fake)

    def _run(self, *args: Any):
        *rest, backend = args
        backend = _registry.select(self.name, backend, self.prefer, tuple(rest))
        with torch.no_grad():
            return run_backend(self.name, backend, "fwd", rest)

    def __call__(self, *args: Any, backend: str):
        return (self._run if is_plain_eager(self._tensors, args) else self._operator)(*args, backend)


def run_backend(name: str, backend: str, direction: str, args: Sequence, rather: str = ""):
    """The backend's function on these arguments, that named `rather` if it has it; lack of memory is told as PyTorch tells it."""
    try:
        module = _registry.module(name, backend)
        return getattr(module, rather if rather and hasattr(module, rather) else direction)(*args)
    except RuntimeError as error:
        if (lack := _extension.lack_of_memory(error, name, args)) is None:
            raise
        raise lack from error


def _operator(name: str, schema: str, implementation: Callable, fake: Callable):
    """`bigmodel_kernels::<name>`, whose last argument is the backend; the fake is called without it."""
    arguments, arrow, returns = schema.rpartition(") ->")
    _definitions.define(f"{name}{arguments}, str backend{arrow}{returns}", tags=_TAGS)
    _definitions.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bigmodel_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_definitions)
    return getattr(torch.ops.bigmodel_kernels, name).default


def is_plain_eager(tensors: Sequence[int], args: Sequence) -> bool:
    """Whether nobody watches or replaces calls of operators: no compiler, mode, transform or tensor subclass among the
    arguments at the positions `tensors`."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    for i in tensors:
        if type(args[i]) not in _PLAIN:
            a = args[i]
            if not (isinstance(a, (list, tuple)) and _PLAIN.issuperset(map(type, a))):
                return False
    return True


def have_plain_sizes(tensors: Sequence) -> bool:
    """Whether all of these are tensors of no other library, or None, with numbers as sizes, by which results can be kept."""
    return _PLAIN.issuperset(map(type, tensors)) and not torch.compiler.is_compiling()


def are_plain_eager(tensors: Sequence) -> bool:
    """`is_plain_eager` of arguments that are all to be tensors or None."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return _PLAIN.issuperset(map(type, tensors)) and not torch._C._are_functorch_transforms_active()


_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def _tensor_arguments(schema: str) -> tuple[int, ...]:
    """The positions of the arguments that are tensors or lists of tensors."""
    arguments = torch._C.parse_schema(f"f{schema}").arguments
    return tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))


def _list_arguments(schema: str) -> tuple[int, ...]:
    """The positions of those that are lists of tensors."""
    arguments = torch._C.parse_schema(f"f{schema}").arguments
    return tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type) and "List" in str(a.type))


def _flatten(args: Sequence, lists: Sequence[int]) -> tuple[Sequence, tuple[int, ...]]:
    """Lists of tensors laid out flat, since autograd sees tensors only at the top, with the length of each by argument, -1 for
    what is no such list; no lengths where there is none."""
    if not lists:
        return args, ()
    flat: list = []
    for i, a in enumerate(args):
        flat.extend(a) if i in lists else flat.append(a)
    return flat, tuple(len(a) if i in lists else -1 for i, a in enumerate(args))


def _each_once(flat: Sequence) -> list:
    """torch.compile does not trace an autograd.Function that is given a tensor twice: from the second time on it is a view."""
    once: list = []
    for a in flat:
        twice = isinstance(a, torch.Tensor) and any(a is b for b in once)
        once.append(a.view_as(a) if twice else a)
    return once


def _unflatten(flat: Sequence, lengths: tuple[int, ...]) -> Sequence:
    if not lengths:
        return flat
    args = []
    i = 0
    for n in lengths:
        args.append(flat[i] if n < 0 else list(flat[i : i + n]))
        i += 1 if n < 0 else n
    return args


class _Pair(torch.autograd.Function):
    """Any op's fwd and bwd as one differentiable function. The op is found by its name, which dynamo can trace."""

    @staticmethod
    def forward(name, backend, lengths, *flat):
        return _ops[name].fwd(*_unflatten(flat, lengths), backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, ctx.backend, ctx.lengths, *flat = inputs
        ctx.tensor_at = [isinstance(a, torch.Tensor) for a in flat]
        ctx.constants = [None if is_tensor else a for a, is_tensor in zip(flat, ctx.tensor_at)]
        op, outputs = _ops[ctx.name], output if isinstance(output, tuple) else (output,)
        _keep(ctx, op, itertools.compress(flat, ctx.tensor_at), _unflatten(flat, ctx.lengths), outputs)
        if len(outputs) > op.results:
            ctx.mark_non_differentiable(*outputs[op.results :])

    @staticmethod
    def backward(ctx, *grads):
        op = _ops[ctx.name]
        inputs = sum(ctx.tensor_at)
        saved = ctx.saved_tensors
        if not torch.compiler.is_compiling():  # torch.func.vjp's pullback runs after the transform
            saved, grads = (tuple(map(unwrapped, tensors)) for tensors in (saved, grads))
        tensors = iter(saved[:inputs])
        flat = [next(tensors) if is_tensor else c for is_tensor, c in zip(ctx.tensor_at, ctx.constants)]
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *gradients(op, ctx.backend, flat, ctx.lengths, needs, saved[inputs:], grads)


class _EagerPair(torch.autograd.Function):
    """`_Pair` in the older form with the context in forward, which torch.func does not take: `apply` then need not inspect the
    signature of forward on every call, half of what a small call costs. It looks at every argument, hence at tensors only."""

    @staticmethod
    def forward(ctx, call, *tensors):
        op, args = call.op, _unflatten(call.fill(tensors), call.lengths)
        outputs = run_backend(op.name, call.backend, "fwd", args)
        ctx.call = call
        if not isinstance(outputs, tuple):
            outputs = outputs.data if outputs._is_view() else outputs
            _keep(ctx, op, tensors, args, (outputs,))
            return outputs
        # What is saved stays in here: autograd takes its time over every output.
        results, saved = outputs[: op.results], outputs[op.results :]
        for o in results:
            if o._is_view():
                # PyTorch refuses to write into a result that is a view made in here, though nobody else sees its base.
                results = tuple([o.data if o._is_view() else o for o in results])
                break
        _keep(ctx, op, tensors, args, results + saved)
        return results

    @staticmethod
    def backward(ctx, *grads):
        call, inputs, saved = ctx.call, len(ctx.call.at), ctx.saved_tensors
        flat = call.fill(saved[:inputs])
        needs = [False] * len(flat)
        for i, need in zip(call.at, ctx.needs_input_grad[1:]):
            needs[i] = need
        found = gradients(call.op, call.backend, flat, call.lengths, needs, saved[inputs:], grads)
        return None, *[found[i] for i in call.at]


def function_apply(function: type[torch.autograd.Function]) -> Callable:
    """What `function.apply` does outside torch.func, in a third of the time; tensors are to come as `unwrapped` gives them."""
    return super(torch.autograd.Function, function).apply


def unwrapped(t: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor that outlived a transform, which no Parameter is, without its wrapper."""
    return _unwrap_if_dead(t) if type(t) is torch.Tensor else t


_apply_eagerly = function_apply(_EagerPair)


class Call:
    """A call of an op, on a backend selected for it, that records for its backward, apart from its tensors; serves many calls."""

    __slots__ = ("at", "backend", "constants", "first", "lengths", "op")

    def __init__(self, op: Op, backend: str, flat: Sequence, lengths: tuple[int, ...] = ()):
        self.op, self.backend, self.lengths = op, backend, lengths
        self.at = op.tensors_at(lengths)
        self.first = self.at[-1] == len(self.at) - 1  # the tensors are, before all else
        if self.first:
            self.constants = flat[len(self.at) :]
        else:
            self.constants = list(flat)
            for i in self.at:
                self.constants[i] = None

    def fill(self, tensors: Sequence) -> list:
        """All arguments, laid out flat."""
        if self.first:
            return [*tensors, *self.constants]
        flat = list(self.constants)
        for i, t in zip(self.at, tensors):
            flat[i] = t
        return flat

    def __call__(self, tensors: Sequence):
        """The op's results; `tensors` are all there may be, in order, None for those left out."""
        return _apply_eagerly(self, *[unwrapped(t) for t in tensors])


def _keep(ctx, op: Op, tensors: Iterable, args: Sequence, outputs: tuple) -> None:
    """Into the context what the backward needs: the `tensors` among `args`, and of the outputs what it reads."""
    read = op.reads_results(*args)
    if read is False:
        outputs = (None,) * op.results + outputs[op.results :]
    elif read is not True:
        outputs = (*[o if r else None for o, r in zip(outputs, read)], *outputs[op.results :])
    ctx.save_for_backward(*tensors, *outputs)
    ctx.set_materialize_grads(False)


def is_plainly_grad(grad: torch.Tensor) -> bool:
    """Whether a backward of tensors, with this upstream gradient, has no graph to record and nobody who watches its calls."""
    return (
        not torch.is_grad_enabled()
        and are_plain_eager((grad,))
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def gradients(
    op: Op,
    backend: str,
    flat: Sequence,  # the arguments
    lengths: tuple[int, ...],
    needs: Sequence[bool],  # per argument
    outputs: tuple,  # what was kept of them
    grads: Sequence,
) -> Sequence:  # per argument
    """The gradients of an op, whatever the backward is asked to record."""
    grads = grads[: op.results]
    if all(g is None for g in grads):
        return (None,) * len(flat)
    if not torch.compiler.is_compiling():
        # torch.func asks for a graph even where no gradient of the gradient can be wanted.
        if needs_grad(*flat, *grads):
            return _gradient_with_graph(op.differentiable, flat, lengths, needs, grads)
        if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):  # is_grads_batched
            with torch.enable_grad():
                return _gradient_with_graph(op.differentiable, flat, lengths, needs, grads, create_graph=False)
    found = op.backward(op, _unflatten(flat, lengths), outputs, grads, _unflatten(needs, lengths), backend)
    if not lengths:
        return found
    out: list = []
    for g, n in zip(found, lengths):
        out.extend([g] if n < 0 else (g if g is not None else [None] * n))
    return out


def _gradient_with_graph(
    differentiable: Callable,
    flat: Sequence,
    lengths: tuple[int, ...],
    needs: Sequence[bool],
    grads: Sequence,
    create_graph: bool = True,
) -> list:
    """The gradient as a differentiable function of inputs and upstream gradients: autograd through the plain formula."""
    # Views of their own: of a tensor that is given as two arguments, each is to get its own part of the gradient.
    flat = [a.view_as(a) if need else a for a, need in zip(flat, needs)]
    args = _unflatten(flat, lengths)
    outputs = differentiable(*args)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    used = [(o, g) for o, g in zip(outputs, grads) if g is not None]
    wanted = [a for a, need in zip(flat, needs) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used], wanted, [g for _, g in used], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needs]
