"""LSTM layers against torch.nn.LSTM and LSTMCell."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bigmodel_kernels as bmk
from benchmarks.cases import Case, Problem
from benchmarks.contestant import FWD, PASSES, TRAIN, Contestant


class Sequence(nn.Module):
    """The outputs of a whole dense sequence."""

    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:  # [T, B, I] -> [T, B, H]
        return self.lstm(x)[0]


class Packed(Sequence):
    """Sequences of different lengths as PyTorch's manual has it: pack, run, pad."""

    pad = staticmethod(pad_packed_sequence)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # [T, B, I], [B] -> [T, B, H], zero past each length
        packed = pack_padded_sequence(x, lengths)
        return self.pad(self.lstm(packed)[0])[0]


class PackedAndPadded(Packed):
    """The same with this library's pad_packed_sequence."""

    pad = staticmethod(bmk.nn.pad_packed_sequence)


class PaddedMasked(Sequence):
    """The rewrite for one direction: run over the padding as well, and erase what it gave."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        valid = torch.arange(x.shape[0])[:, None] < lengths  # [T, B]
        return self.lstm(x)[0] * valid[..., None].to(x.dtype)


class Step(Sequence):
    """One step of a stream."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # [B, I], [B, H], [B, H]
        _, (h, c) = self.lstm(x[None], (h[None], c[None]))
        return h[0], c[0]


class CellStep(Sequence):
    """The same through a cell."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.lstm(x, (h, c))


def lstm_flops(tokens: int, inputs: int, hidden: int, layers: int, directions: int) -> float:
    widths = [inputs] + [hidden * directions] * (layers - 1)
    return float(sum(2 * tokens * directions * 4 * hidden * (width + hidden) for width in widths))


def build(dtype, pass_, *, t, b, i, h, layers=1, bidirectional=False, lengths=None, packed=PackedAndPadded) -> Problem:
    arguments = {"num_layers": layers, "bidirectional": bidirectional}
    stock = nn.LSTM(i, h, **arguments).to(dtype)
    ours = bmk.nn.LSTM(i, h, **arguments).to(dtype)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(t, b, i).to(dtype).requires_grad_(pass_ == TRAIN)
    tokens = t * b
    if lengths is None:
        inputs, form, ours_form = (x,), Sequence, Sequence
    else:
        steps = torch.linspace(*lengths, b).long()
        inputs, form, ours_form, tokens = (x, steps), Packed, packed, int(steps.sum())
    contestants = [Contestant("eager", form(stock), inputs)]
    if lengths is not None:
        contestants.append(Contestant("padded + mask", PaddedMasked(stock), inputs))
    return Problem(
        ours=Contestant("ours", ours_form(ours), inputs),
        stock=contestants,
        flops=lstm_flops(tokens, i, h, layers, 1 + bidirectional),
        steps=t,
        # dynamo takes neither packed sequences nor the backward pass of oneDNN's LSTM
        compile=["eager"] if pass_ == FWD and lengths is None else [],
    )


def build_step(dtype, pass_, *, b, h, cell) -> Problem:
    lstm, stock_cell = nn.LSTM(h, h).to(dtype), nn.LSTMCell(h, h).to(dtype)
    weights = {name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()}
    stock_cell.load_state_dict(weights)
    ours = (bmk.nn.LSTMCell if cell else bmk.nn.LSTM)(h, h).to(dtype)
    ours.load_state_dict(weights if cell else lstm.state_dict())
    inputs = tuple(torch.randn(b, h).to(dtype) for _ in range(3))
    contestants = [Contestant("LSTM", Step(lstm), inputs), Contestant("LSTMCell", CellStep(stock_cell), inputs)]
    return Problem(
        ours=Contestant("ours", (CellStep if cell else Step)(ours), inputs),
        stock=contestants,
        flops=lstm_flops(b, h, h, 1, 1),
        steps=1,
        compile=["LSTM", "LSTMCell"],
    )


def case(name: str, *, passes=PASSES, dtypes=("fp32",), quick=False, **sizes) -> Case:
    return Case("lstm", name, partial(build, **sizes), passes, dtypes, quick)


CASES = [
    case("T28 B64 I28 H128 L2", t=28, b=64, i=28, h=128, layers=2, quick=True),
    case("T100 B32 I10 H8 L2", t=100, b=32, i=10, h=8, layers=2),
    case("T100 B32 H256", t=100, b=32, i=256, h=256, dtypes=("fp32", "bf16")),
    case("packed T200 B16 H256 (200..40)", t=200, b=16, i=256, h=256, lengths=(200, 40)),
    case(
        "packed T200 B16 H256 (200..40), torch's padding",
        t=200,
        b=16,
        i=256,
        h=256,
        lengths=(200, 40),
        packed=Packed,
        passes=(TRAIN,),
    ),
    case("bidirectional T100 B16 H128", t=100, b=16, i=128, h=128, bidirectional=True),
    Case("lstm", "step LSTM B1 H512", partial(build_step, b=1, h=512, cell=False), (FWD,)),
    Case("lstm", "step LSTMCell B1 H512", partial(build_step, b=1, h=512, cell=True), (FWD,)),
]
