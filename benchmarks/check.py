"""Check, then time: the result and every gradient against float64, by the error rule of bigmodel_kernels.testing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contestant import DTYPES, FWD, Contestant
from bigmodel_kernels import testing

# A stock rewrite that is further than this from the truth computes something else. It is no figure of precision.
SAME_COMPUTATION = {"fp32": 1e-3, "bf16": 5e-2}


class WrongBaseline(RuntimeError):
    """A contestant that is not ours computes something else: the comparison would mean nothing."""


@dataclass(frozen=True)
class Check:
    """One tensor against float64; `baseline_max_err` is the error of stock eager in the same dtype."""

    tensor: str
    rel_l2: float
    max_err: float
    baseline_max_err: float
    ok: bool
    message: str


def results(contestant: Contestant, pass_: str) -> dict[str, Tensor]:
    """The output or outputs, and for training the gradient of every leaf, by name."""
    if pass_ == FWD:
        output = contestant.infer()
        return {"output": output} if isinstance(output, Tensor) else {f"output {i}": o for i, o in enumerate(output)}
    contestant.prepare_training()
    output, gradients = contestant.train()
    return {"output": output.detach()} | dict(zip(map("grad {}".format, contestant.leaves()), gradients, strict=True))


def check(
    ours: Contestant, stock: list[Contestant], pass_: str, dtype: str, *, steps: int = 0, whole: bool = False
) -> list[Check]:
    """Compares `ours` with the float64 run of `stock[0]`; raises WrongBaseline if another contestant does not match."""
    exact = results(stock[0].converted("float64", dtype=torch.float64), pass_)
    baseline = results(stock[0], pass_)
    for rival in stock:
        for name, value in (baseline if rival is stock[0] else results(rival, pass_)).items():
            error = testing.relative_l2(value, exact[name])
            if not error <= SAME_COMPUTATION[dtype]:
                raise WrongBaseline(f"{rival.name}: {name} differs from the float64 run of eager by {error:.1e}")
    actual = results(ours, pass_)
    if actual.keys() != exact.keys():
        raise WrongBaseline(f"ours has {sorted(actual)}, stock has {sorted(exact)}")
    checks = []
    for name, value in actual.items():
        gradient = name.startswith("grad")
        known = (value, exact[name], baseline[name])
        if whole:
            report = testing.check_whole_model(*known, dtype=DTYPES[dtype], name=name)
        else:
            report = testing.check_error(*known, dtype=DTYPES[dtype], gradient=gradient, steps=steps, name=name)
        checks.append(
            Check(name, report.rel_l2, report.max_err, report.baseline_max_err, bool(report.ok), report.message)
        )
    return checks
