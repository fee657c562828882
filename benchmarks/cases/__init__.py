"""The cases: what is computed, at which sizes, and by whom. One file per op, named after it, one for whole models."""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch._inductor.exc import InductorError

import bigmodel_kernels as bmk
from benchmarks.baselines import compiled
from benchmarks.contestant import DTYPES, FWD, PASSES, TRAIN, Contestant

OPS = ("attention", "conv", "linear", "lstm", "norm", "cross_entropy")
MODELS = ("cnn", "rnn", "transformer", "resnet", "bert", "gpt", "deepspeech")
SEED = 20_26


@dataclass
class Problem:
    """One case made concrete: `stock[0]` is what a user writes first, and the formula that float64 is run on."""

    ours: Contestant
    stock: list[Contestant]
    flops: float  # of the forward pass
    backward: float = 2.0  # flops of the backward pass over those of the forward pass
    steps: int = 0  # time steps of a recurrence: the error caps grow with their square root
    whole: bool = False  # a deep model: held to the error of plain PyTorch in the same dtype
    compile: list[str] = field(default_factory=lambda: ["eager"])  # the stock contestants that are compiled as well

    def contestants(self) -> list[Contestant]:
        return [self.ours, *self.stock]

    def backend(self, pass_: str) -> str:
        """The backend or backends that ours runs on: the choice may be another one where gradients follow."""
        with torch.set_grad_enabled(pass_ == TRAIN):
            return bmk.explain(self.ours.forward, *self.ours.inputs).backend


@dataclass(frozen=True)
class Case:
    """`build(dtype, pass)` draws inputs and weights from a fixed seed."""

    group: str  # the op, or the name of a model
    name: str
    build: Callable[[torch.dtype, str], Problem]
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[str, ...] = ("fp32",)
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the report: a case in one pass and one dtype."""

    case: Case
    pass_: str
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.case.group} {self.case.name} {self.pass_} {self.dtype}"

    def build(self, *, compile: bool) -> Problem:
        """The contestants of this row; with `compile`, torch.compile joins them."""
        torch.manual_seed(SEED)
        problem = self.case.build(DTYPES[self.dtype], self.pass_)
        for contestant in problem.contestants():
            if isinstance(contestant.forward, torch.nn.Module):
                contestant.forward.train(self.pass_ == TRAIN)
        if compile:
            torch._dynamo.reset()  # a code object is compiled only a few times before dynamo gives up on it
            for contestant in [c for c in problem.stock if c.name in problem.compile]:
                try:
                    problem.stock.append(compiled(contestant, self.pass_))
                except InductorError as error:  # its C++ for the gradient of a bfloat16 gate does not compile
                    reason = str(error).strip().splitlines()[0]
                    print(f"{self.id}: torch.compile fails on {contestant.name!r} ({reason})", file=sys.stderr)
        return problem

    def flops(self, problem: Problem) -> float:
        return problem.flops * (1.0 if self.pass_ == FWD else 1.0 + problem.backward)

    def traffic(self, problem: Problem) -> float:
        """The bytes that must move: inputs and weights read and the output written; for training all of them read once
        more with the output's gradient, and the gradients written."""
        ours = problem.ours
        output = ours.infer()
        results = size_of(output if isinstance(output, tuple) else (output,))
        operands = size_of((*ours.inputs, *ours.parameters.values()))
        if self.pass_ == FWD:
            return operands + results
        return 2 * operands + size_of(ours.leaves().values()) + 3 * results


def all_cases() -> list[Case]:
    """Every case, ops first."""
    files = (*OPS, "models")
    return [case for name in files for case in importlib.import_module(f"benchmarks.cases.{name}").CASES]


def rows(
    groups: tuple[str, ...] = OPS + MODELS,
    passes: tuple[str, ...] = PASSES,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    *,
    name: str = "",
    quick: bool = False,
) -> list[Row]:
    """The lines of a report, in the order of the cases; `name` is a part of the case's name."""
    return [
        Row(case, pass_, dtype)
        for case in all_cases()
        if case.group in groups and name in case.name and (case.quick or not quick)
        for dtype in case.dtypes
        if dtype in dtypes
        for pass_ in case.passes
        if pass_ in passes
    ]


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def on_grid(values: torch.Tensor, step: float) -> torch.Tensor:
    """`values` rounded to multiples of `step`, in place.

    A ReLU at 0 and a tie in a max-pool are jumps of the gradient: where rounding decides the side, two right results
    differ by one whole gradient. With inputs and weights on a coarse grid the sums before them are exact in every
    implementation, so every implementation jumps at the same places.
    """
    with torch.no_grad():
        return values.div_(step).round_().mul_(step)
