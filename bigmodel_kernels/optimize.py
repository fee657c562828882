"""optimize(model): torch.nn layers become this library's, in place, with a report and a way back.

Two steps, each undone by `PatchReport.revert()`:
1. Layers. A torch.nn layer that has a drop-in here changes its class and nothing else: the object, its parameters, hooks
   and state_dict keys stay, so optimizers and references to it stay valid.
2. Fusion. Where a module's forward can be traced (torch.fx), convolution + activation + max-pool runs as one call, in eval
   mode with the batch norm folded in. The module keeps its children; only its `forward` is overlaid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from bigmodel_kernels import _fusion, _registry
from bigmodel_kernels import nn as bnn

_DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(bnn, name)
    for name in (
        "LSTM",
        "LSTMCell",
        "Linear",
        "RMSNorm",
        "MultiheadAttention",
        "TransformerEncoderLayer",
        "TransformerDecoderLayer",
        "Transformer",
        "Conv1d",
        "Conv2d",
        "ConvTranspose1d",
        "ConvTranspose2d",
    )
}


@dataclass(frozen=True)
class Entry:
    """One module of the report: where it is, what it was, what became of it or why it was kept."""

    path: str
    kind: str
    note: str


@dataclass
class PatchReport:
    """What `optimize` replaced and what it kept, and why. Print it; undo it with `revert()`."""

    replaced: list[Entry] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Gives every module its own class and forward back. Parameters, hooks and buffers were never touched."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        rows = [(e.path or "(root)", e.kind, "-> " + e.note) for e in self.replaced]
        rows += [(e.path or "(root)", e.kind, "kept: " + e.note) for e in self.kept]
        widths = [max((len(r[i]) for r in rows), default=0) for i in range(2)]
        counts = f"{len(self.replaced)} replaced, {len(self.kept)} kept"
        head = f"bigmodel_kernels: {counts} (0 parameters copied, state_dict keys unchanged)"
        lines = [f"  {path:{widths[0]}}  {kind:{widths[1]}}  {note}" for path, kind, note in rows]
        return "\n".join([head, *lines, "undo: report.revert()"])


def optimize(
    model: nn.Module,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    backend: str = "auto",
) -> PatchReport:
    """Makes `model` use this library's layers and fused calls, in place.

    Args:
        model: any module; its parameters, buffers, hooks and state_dict keys are left as they are.
        filter_fn: `filter_fn(module, path)` says whether a module may be changed; all may by default.
        strict: raise RuntimeError, with nothing changed, if an eligible layer would be kept.
        backend: the backend of every replaced layer: "auto", or a name, which never falls back.

    Returns:
        The report: `print(report)`, `report.replaced`, `report.kept`, `report.revert()`.

    `isinstance(layer, nn.LSTM)` is False for a replaced LSTM (torch.compile refuses subclasses of nn.LSTM); for the
    other layers isinstance stays True.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, path), got {type(filter_fn).__name__}")
    _registry.check_name(backend)
    report = PatchReport()
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    for path, module in model.named_modules():
        eligible = next((kind for kind in _DROP_INS if isinstance(module, kind)), None)
        if eligible is None or type(module) in _DROP_INS.values():
            continue
        kind = type(module).__name__
        if filter_fn is not None and not filter_fn(module, path):
            report.kept.append(Entry(path, kind, "left out by filter_fn"))
        elif type(module) is not eligible:
            report.kept.append(Entry(path, kind, f"a subclass of nn.{eligible.__name__}, whose changes would be lost"))
        else:
            swaps.append((module, _DROP_INS[eligible]))
            note = "bigmodel_kernels.nn" + ("; isinstance(m, nn.LSTM) is now False" if eligible is nn.LSTM else "")
            report.replaced.append(Entry(path, kind, note))
    if strict and report.kept:
        raise RuntimeError(f"strict=True, but some eligible layers would be kept; nothing was changed.\n{report}")
    for module, drop_in in swaps:
        report._undo.append(_swap(module, drop_in, backend))
    for overlay in _fusion.fuse(model, filter_fn or (lambda module, path: True), backend):
        report.replaced.extend(Entry(overlay.path, "forward", f"fused {chain}") for chain in overlay.chains)
        report._undo.append(overlay.undo)
    return report


def _swap(module: nn.Module, drop_in: type[nn.Module], backend: str) -> Callable[[], None]:
    original = type(module)
    module.__class__ = drop_in
    if backend != "auto":
        module.backend = backend

    def undo() -> None:
        module.__class__ = original
        module.__dict__.pop("backend", None)

    return undo
