"""bmk.nn.LSTM, LSTMCell and LayerNormLSTM against torch.nn: results, gradients, state, errors, and what models do to layers."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

OPTIONS = [
    {},
    {"num_layers": 3},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


def twins(dtype=torch.float32, inputs=5, hidden=7, **options):
    """The same layer of torch.nn and of bmk.nn."""
    theirs = nn.LSTM(inputs, hidden, **options).to(dtype)
    ours = bmk.nn.LSTM(inputs, hidden, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def states(layer, batch, dtype=torch.float32):
    cells = layer.num_layers * (2 if layer.bidirectional else 1)
    shapes = [(cells, *batch, layer.proj_size or layer.hidden_size), (cells, *batch, layer.hidden_size)]
    return tuple(make(*shape, seed=5 + i, dtype=dtype) for i, shape in enumerate(shapes))


def flatten(result):
    output, (h_n, c_n) = result
    return (output.data if isinstance(output, PackedSequence) else output), h_n, c_n


def assert_same(ours, theirs, *args, **tolerance):
    """Results, and the gradients of all parameters."""
    actual, expected = flatten(ours(*args)), flatten(theirs(*args))
    for a, e in zip(actual, expected):
        assert a.shape == e.shape
        assert a.stride() == e.stride()
    torch.testing.assert_close(actual, expected, **tolerance)
    parameters = list(ours.parameters()), list(theirs.parameters())
    grads = [torch.autograd.grad([t.square().sum() for t in r], p) for r, p in zip((actual, expected), parameters)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_same_as_torch(options, dtype, with_state):
    ours, theirs = twins(dtype, **options)
    x = make(4, 3, 5, dtype=dtype)
    batch = x.shape[0] if ours.batch_first else x.shape[1]
    args = (x, states(ours, [batch], dtype)) if with_state else (x,)
    assert_same(ours, theirs, *args, **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unbatched(options):
    ours, theirs = twins(**options)
    assert_same(ours, theirs, make(4, 5))
    assert_same(ours, theirs, make(4, 5), states(ours, []))


@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed(options, sorted_already):
    ours, theirs = twins(**options)
    lengths = torch.tensor([6, 4, 4, 1] if sorted_already else [4, 1, 6, 4])
    x = make(*((4, 6) if ours.batch_first else (6, 4)), 5)
    packed = pack_padded_sequence(x, lengths, batch_first=ours.batch_first, enforce_sorted=sorted_already)
    assert_same(ours, theirs, packed)
    assert_same(ours, theirs, packed, states(ours, [4]))
    output = pad_packed_sequence(ours(packed)[0], batch_first=ours.batch_first)[0]
    torch.testing.assert_close(output, pad_packed_sequence(theirs(packed)[0], batch_first=ours.batch_first)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sorted_already", [False, True])
def test_pad_packed_sequence(batch_first, sorted_already):
    lengths = [6, 4, 4, 1] if sorted_already else [4, 1, 6, 4]
    x = make(4, 6, 3, dtype=torch.float64) if batch_first else make(6, 4, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=sorted_already)
    data = packed.data.requires_grad_()

    def padded(function, data):
        return function(packed._replace(data=data), batch_first, padding_value=-2.0, total_length=8)

    expected, lengths = padded(pad_packed_sequence, data)
    actual, actual_lengths = padded(bmk.nn.pad_packed_sequence, data)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_lengths, lengths)
    upstream = make(*expected.shape, dtype=torch.float64, seed=1)
    assert torch.equal(*(torch.autograd.grad(y, data, upstream)[0] for y in (actual, expected)))
    assert torch.autograd.gradgradcheck(lambda data: padded(bmk.nn.pad_packed_sequence, data)[0], (data,))
    with torch.no_grad():
        assert torch.equal(padded(bmk.nn.pad_packed_sequence, data)[0], expected)
    with pytest.raises(ValueError, match="total_length=5"):
        bmk.nn.pad_packed_sequence(packed, total_length=5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_moves_both_ways(options):
    ours, theirs = bmk.nn.LSTM(5, 7, **options), nn.LSTM(5, 7, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    x = make(3, 2, 5)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_same_seed_same_parameters():
    torch.manual_seed(1)
    ours = bmk.nn.LSTM(3, 4, 2, bidirectional=True)
    torch.manual_seed(1)
    theirs = nn.LSTM(3, 4, 2, bidirectional=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


WRONG_CALLS = {
    "4-D": lambda m: m(torch.zeros(3, 2, 5, 1)),
    "input_size": lambda m: m(torch.zeros(3, 2, 6)),
    "no steps": lambda m: m(torch.zeros(0, 2, 5)),
    "dtype": lambda m: m(torch.zeros(3, 2, 5).double()),
    "integers": lambda m: m(torch.zeros(3, 2, 5, dtype=torch.int64)),
    "h size": lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 2, 6), torch.zeros(1, 2, 7))),
    "h layers": lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(2, 2, 7), torch.zeros(1, 2, 7))),
    "h batch": lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 3, 7), torch.zeros(1, 2, 7))),
    "c size": lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 2, 7), torch.zeros(1, 2, 8))),
    "c batch": lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 2, 7), torch.zeros(1, 1, 7))),
    "unbatched state": lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 7), torch.zeros(1, 7))),
    "batched state": lambda m: m(torch.zeros(3, 5), (torch.zeros(1, 2, 7), torch.zeros(1, 2, 7))),
    "no tensor": lambda m: m("x"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_fail_as_torchs(name):
    ours, theirs = twins()
    with pytest.raises(Exception) as expected:  # noqa: PT011  (whatever torch raises)
        WRONG_CALLS[name](theirs)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        WRONG_CALLS[name](ours)


def test_wrong_packed_input_is_named():
    """Torch's own says which matrices cannot be multiplied."""
    ours, _ = twins()
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"):
        ours(pack_padded_sequence(torch.zeros(3, 2, 6), torch.tensor([3, 2])))
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match weight dtype"):
        ours(pack_padded_sequence(torch.zeros(3, 2, 5).double(), torch.tensor([3, 2])))


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 3),
        (3, 0),
        (3, 4, 0),
        (3, 4.0),
        (2.5, 4),
        (3, 4, 1, True, False, 1.5),
        (3, 4, 1, True, False, True),
        (3, 4, 1, 1),
        (3, 4, 1, True, 1),
        (3, 4, 1, True, False, 0.0, False, -1),
        (3, 4, 1, True, False, 0.0, False, 4),
    ],
    ids=str,
)
def test_wrong_constructors_fail_as_torchs(arguments):
    with pytest.raises((ValueError, TypeError)) as expected:
        nn.LSTM(*arguments)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        bmk.nn.LSTM(*arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 3}], ids=str
)
def test_compiles_whole_in_training_and_eval(options, training):
    ours, _ = twins(**options)
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (4, 6, 9):
        assert_same(compiled, ours, make(steps, 3, 5))
    with torch.no_grad():
        torch.testing.assert_close(flatten(compiled(make(5, 3, 5))), flatten(ours(make(5, 3, 5))))


def test_compiles_with_inductor():
    ours, _ = twins(num_layers=2)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), ours)
    compiled = torch.compile(model, fullgraph=True)
    x = make(3, 2, 4)
    expected, actual = model(x)[0], compiled(x)[0]
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_functional_call_uses_the_given_weights():
    ours, theirs = twins()
    _, others = twins()
    x = make(3, 2, 5)
    actual = torch.func.functional_call(ours, dict(others.named_parameters()), (x,))
    torch.testing.assert_close(flatten(actual), flatten(others(x)))
    torch.testing.assert_close(flatten(ours(x)), flatten(theirs(x)))
    doubled = {k: v.double() for k, v in ours.named_parameters()}
    assert torch.func.functional_call(ours, doubled, (x.double(),))[0].dtype == torch.float64


def test_copies_moves_and_pickles():
    ours, theirs = twins(num_layers=2)
    x = make(3, 2, 5)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    torch.testing.assert_close(copied(x)[0], theirs(x)[0])
    assert copied._flat_weights[0] is copied.weight_ih_l0
    file = io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x)[0], theirs(x)[0])
    wide = copied.double()
    assert wide._flat_weights[0] is wide.weight_ih_l0
    assert wide(x.double())[0].dtype == torch.float64
    wide.flatten_parameters()
    wide.weight_ih_l0 = nn.Parameter(torch.zeros(28, 5, dtype=torch.float64))
    assert not torch.allclose(wide(x.double())[0], theirs.double()(x.double())[0])


def test_parametrized_weight():
    ours, _ = twins()
    nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    ours(make(3, 2, 5))[0].sum().backward()
    assert ours.parametrizations.weight_hh_l0.original1.grad is not None


def test_backward_in_eval_mode_and_twice():
    ours, theirs = twins(torch.float64)
    ours.eval()
    x = make(3, 2, 5, dtype=torch.float64, requires_grad=True)
    penalty = []
    for layer in (ours, theirs):
        (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        penalty.append(torch.autograd.grad(g.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*penalty)


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_gives_torchs_dtypes(packed):
    ours, theirs = twins()
    x = make(3, 2, 5)
    x = pack_padded_sequence(x, torch.tensor([3, 2])) if packed else x
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = flatten(ours(x)), flatten(theirs(x))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    actual[0].float().sum().backward()
    assert ours.weight_ih_l0.grad.dtype == torch.float32


def test_torch_backend_is_torchs_own():
    ours, theirs = twins(num_layers=3, dropout=0.5)
    x = make(4, 3, 5)
    with bmk.use_backend("torch"):
        torch.manual_seed(7)
        actual = ours(x)[0]
    torch.manual_seed(7)
    assert torch.equal(actual, theirs(x)[0])


def test_dropout_statistics():
    ours, _ = twins(num_layers=2, dropout=0.25, hidden=64)
    with torch.no_grad():  # the second layer passes on the sign of what it gets
        torch.manual_seed(0)
        kept = [ours(make(30, 40, 5))[0] for _ in range(2)]
    assert not torch.equal(*kept)
    ours.eval()
    assert torch.equal(ours(make(4, 3, 5))[0], ours(make(4, 3, 5))[0])


def test_empty_batch():
    ours, theirs = twins(num_layers=2, bidirectional=True)
    assert_same(ours, theirs, torch.zeros(3, 0, 5))


def test_other_dtypes_and_devices_go_to_torch():
    ours, theirs = twins(torch.float16)
    x = make(3, 2, 5, dtype=torch.float16)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    shapes = bmk.nn.LSTM(5, 7, device="meta")(torch.zeros(3, 2, 5, device="meta"))
    assert shapes[0].shape == (3, 2, 7)


# ---- LSTMCell ----------------------------------------------------------------------------------------------------


def cells(bias=True, dtype=torch.float32):
    theirs, ours = nn.LSTMCell(5, 7, bias, dtype=dtype), bmk.nn.LSTMCell(5, 7, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [[], [0], [1], [6]], ids=str)
def test_cell_same_as_torch(batch, bias, with_state, dtype):
    ours, theirs = cells(bias, dtype)
    x = make(*batch, 5, dtype=dtype)
    args = (x, (make(*batch, 7, dtype=dtype, seed=2), make(*batch, 7, dtype=dtype, seed=3))) if with_state else (x,)
    actual, expected = ours(*args), theirs(*args)
    torch.testing.assert_close(actual, expected)
    grads = [
        torch.autograd.grad([t.square().sum() for t in r], list(m.parameters()))
        for r, m in ((actual, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*grads)


def test_cell_compiles_whole():
    ours, theirs = cells()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 6):
        args = make(batch, 5), (make(batch, 7, seed=2), make(batch, 7, seed=3))
        torch.testing.assert_close(compiled(*args), theirs(*args))


WRONG_CELL_CALLS = {
    "3-D": lambda m: m(torch.zeros(2, 5, 1)),
    "state 3-D": lambda m: m(torch.zeros(2, 5), (torch.zeros(2, 7, 1), torch.zeros(2, 7))),
    "input_size": lambda m: m(torch.zeros(2, 6)),
    "h size": lambda m: m(torch.zeros(2, 5), (torch.zeros(2, 6), torch.zeros(2, 7))),
    "c size": lambda m: m(torch.zeros(2, 5), (torch.zeros(2, 7), torch.zeros(2, 6))),
    "h batch": lambda m: m(torch.zeros(2, 5), (torch.zeros(3, 7), torch.zeros(3, 7))),
    "c batch": lambda m: m(torch.zeros(2, 5), (torch.zeros(2, 7), torch.zeros(1, 7))),
    "one state": lambda m: m(torch.zeros(2, 5), (torch.zeros(2, 7),)),
}


@pytest.mark.parametrize("name", WRONG_CELL_CALLS)
def test_wrong_cell_calls_fail_as_torchs(name):
    ours, theirs = cells()
    with pytest.raises(Exception) as expected:  # noqa: PT011  (whatever torch raises)
        WRONG_CELL_CALLS[name](theirs)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        WRONG_CELL_CALLS[name](ours)


# ---- LayerNormLSTM -----------------------------------------------------------------------------------------------


def plain_layer_norm_lstm(m, x, h, c):
    """The formula, one step and one layer at a time, in the layer's own parameters."""
    outputs = []
    for t in range(x.shape[0]):
        below = x[t]
        for n in range(m.num_layers):
            pre = m.norm_ih[n](below @ m.ih[n].weight.T) + m.norm_hh[n](h[n] @ m.hh[n].weight.T)
            i, f, g, o = pre.chunk(4, 1)
            c[n] = f.sigmoid() * c[n] + i.sigmoid() * g.tanh()
            below = h[n] = o.sigmoid() * m.norm_c[n](c[n]).tanh()
        outputs.append(below)
    return torch.stack(outputs), torch.stack(h), torch.stack(c)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layer_norm_lstm(num_layers, batch_first):
    m = bmk.nn.LayerNormLSTM(5, 7, num_layers, batch_first, dtype=torch.float64)
    x = make(4, 3, 5, dtype=torch.float64)
    hx = [make(num_layers, 3, 7, dtype=torch.float64, seed=s) for s in (2, 3)]
    output, h, c = plain_layer_norm_lstm(m, x, list(hx[0]), list(hx[1]))
    given = x.transpose(0, 1) if batch_first else x
    actual, actual_states = m(given, hx)
    torch.testing.assert_close(actual, output.transpose(0, 1) if batch_first else output)
    torch.testing.assert_close(actual_states, (h, c))
    assert torch.autograd.gradcheck(lambda t: m(t)[0], given.requires_grad_(), fast_mode=True)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flatten(compiled(given)), flatten(m(given)))
    unbatched, _ = m(given[0] if batch_first else given[:, 0])
    torch.testing.assert_close(unbatched, m(given)[0][0] if batch_first else m(given)[0][:, 0])


@pytest.mark.parametrize("wanted", ["block", "layer"])
def test_layer_norm_lstm_on_a_backend_without_its_kernels_says_so(wanted):
    m = bmk.nn.LayerNormLSTM(5, 7)
    if wanted == "layer":
        m.backend = "cuda"
    with (
        bmk.use_backend("cuda" if wanted == "block" else "auto"),
        pytest.raises(NotImplementedError, match="no cuda kernel of"),
    ):
        m(torch.zeros(3, 2, 5))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "must be positive", lambda: bmk.nn.LayerNormLSTM(0, 3)),
        (ValueError, "dropout must be a probability", lambda: bmk.nn.LayerNormLSTM(2, 3, dropout=2)),
        (ValueError, "Expected input to be 2D or 3D", lambda: bmk.nn.LayerNormLSTM(2, 3)(torch.zeros(2))),
        (RuntimeError, "Expected 2, got 4", lambda: bmk.nn.LayerNormLSTM(2, 3)(torch.zeros(3, 2, 4))),
        (
            RuntimeError,
            r"Expected hidden\[0\] size \(1, 2, 3\)",
            lambda: bmk.nn.LayerNormLSTM(2, 3)(torch.zeros(3, 2, 2), [torch.zeros(1, 1, 3)] * 2),
        ),
    ],
)
def test_layer_norm_lstm_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
