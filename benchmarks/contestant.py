"""What is timed: a contestant is one way to compute a case, with its own inputs (values shared, layout its own)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

FWD, TRAIN = "fwd", "fwd+bwd"
PASSES = (FWD, TRAIN)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Contestant:
    """`forward(*inputs)` gives a Tensor, or a tuple of them where no gradient is asked for.

    Gradients go to the inputs that require them and to the parameters of `forward`.
    """

    name: str
    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    compiled: Callable[..., Tensor] | None = None  # `forward` as torch.compile made it, where that is what runs
    grad_output: Tensor | None = field(default=None, repr=False)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.forward.named_parameters()) if isinstance(self.forward, nn.Module) else {}

    def leaves(self) -> dict[str, Tensor]:
        """What a gradient is asked for, by name: `input[i]` and the parameter names."""
        inputs = {f"input[{i}]": x for i, x in enumerate(self.inputs) if x.requires_grad}
        return inputs | {name: p for name, p in self.parameters.items() if p.requires_grad}

    def converted(
        self, name: str, *, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
    ) -> "Contestant":
        """The same computation on copies of inputs and parameters, in another dtype or memory format."""

        def convert(x: Tensor) -> Tensor:
            moved = x.detach().clone()
            if dtype is not None and x.is_floating_point():
                moved = moved.to(dtype)
            if memory_format is not None and x.dim() == 4:
                moved = moved.contiguous(memory_format=memory_format)
            return moved.requires_grad_(x.requires_grad)

        forward = self.forward
        if isinstance(forward, nn.Module):
            forward = copy.deepcopy(forward)
            if dtype is not None:
                forward = forward.to(dtype)
            if memory_format is not None:
                forward = forward.to(memory_format=memory_format)
        return Contestant(name, forward, tuple(map(convert, self.inputs)))

    def call(self) -> Tensor | tuple[Tensor, ...]:
        function = self.forward if self.compiled is None else self.compiled
        return function(*self.inputs)

    def infer(self) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return self.call()

    def prepare_training(self, seed: int = 1) -> None:
        """Draws the output's gradient: the same values for every contestant, in the layout of this one's output."""
        output = self.call().detach()
        if output.dim() == 0:  # a loss
            self.grad_output = torch.ones_like(output)
            return
        values = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        self.grad_output = torch.empty_like(output).copy_(values)

    def train(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Forward, backward, and an SGD step of length zero: it counts as a new version of the weights, so that nothing
        derived from them can be carried over from call to call, as nothing could in training."""
        output = self.call()
        gradients = torch.autograd.grad(output, tuple(self.leaves().values()), self.grad_output)
        parameters = [p for p in self.parameters.values() if p.requires_grad]
        if parameters:
            with torch.no_grad():
                torch._foreach_add_(parameters, list(gradients[-len(parameters) :]), alpha=-0.0)
        return output, gradients

    def step(self, pass_: str) -> Callable[[], object]:
        return self.infer if pass_ == FWD else self.train
