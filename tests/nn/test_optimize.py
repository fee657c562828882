"""optimize(model): the same results, a report that tells all, and the way back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigmodel_kernels as bmk


class TextbookCNN(nn.Module):
    """Written in plain torch.nn, as in the book."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(16 * 7 * 7, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = x.view(-1, 16 * 7 * 7)
        return self.fc(F.dropout(x, 0.5, self.training))


class Branches(nn.Module):
    """A forward that cannot be traced, around blocks that can."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = TextbookCNN()

    def forward(self, x, extra=None):
        x = self.stem(x)
        if x.sum() > 1e9:
            x = x * 0
        return x if extra is None else x + extra


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, 2, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x):
        x, _ = self.lstm(x)
        x, _ = self.attend(x, x, x)
        return self.encoder(x)


def outputs_and_gradients(model, x):
    torch.manual_seed(7)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, twin, x):
    (y, gradients), (expected, expected_gradients) = outputs_and_gradients(model, x), outputs_and_gradients(twin, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, g in gradients.items():
        torch.testing.assert_close(g, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


IMAGES = torch.randn(4, 1, 28, 28)


@pytest.mark.parametrize("training", [True, False])
def test_textbook_cnn_is_fused_with_the_same_results(training):
    model = TextbookCNN().train(training)
    twin = copy.deepcopy(model)
    report = bmk.optimize(model)
    assert [e.note for e in report.replaced if e.kind == "forward"] == [
        "fused Conv2d + relu + max-pool 2",
        "fused Conv2d + relu + max-pool 2",
    ]
    assert_same(model, twin, IMAGES)
    assert [c.op for c in bmk.explain(model, IMAGES).calls] == ["conv", "conv", "linear"]
    assert list(model.state_dict()) == list(twin.state_dict())


class Stem(nn.Module):
    """ResNet's stem with a leaky ReLU, and a head of linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.LeakyReLU(0.2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.fc1 = nn.Linear(8 * 8 * 8, 256)
        self.fc2 = nn.Linear(256, 4)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.conv(x)))).flatten(1)
        return self.fc2(F.leaky_relu(self.fc1(x), 0.1))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("training", [True, False])
def test_padded_pool_slope_and_linear_layers_are_fused(training, backend):
    model = Stem().train(training)
    twin = copy.deepcopy(model)
    report = bmk.optimize(model, backend=backend)
    assert [e.note for e in report.replaced if e.kind == "forward"] == [
        "fused Conv2d + BatchNorm + leaky_relu + max-pool 3",
        "fused Linear + leaky_relu",
    ]
    assert_same(model, twin, torch.randn(40, 3, 32, 32))
    with torch.no_grad():
        calls = [c.op for c in bmk.explain(model, torch.randn(192, 3, 32, 32)).calls]
    assert calls == ["conv", "linear", "linear"]


class Block(nn.Module):
    """ResNet's block; `add` says how the shortcut is added."""

    def __init__(self, add, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(4, channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(4, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.add = add

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(self.add(y, self.downsample(x)))


def _add_in_place(y, shortcut):
    y += shortcut
    return y


SUMS = {
    "plus": lambda y, shortcut: y + shortcut,
    "the other way about": lambda y, shortcut: shortcut + y,
    "in place": _add_in_place,
    "method": lambda y, shortcut: y.add(shortcut),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", SUMS)
def test_the_sum_of_a_residual_block_is_fused(how, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Sequential(Block(SUMS[how])))
    model.train(training)
    twin = copy.deepcopy(model)
    report = bmk.optimize(model)
    notes = [(e.path, e.note) for e in report.replaced if e.kind == "forward"]
    assert ("2.0", "fused Conv2d + BatchNorm + sum + relu") in notes
    assert ("2.0", "fused Conv2d + BatchNorm + relu") in notes
    assert_same(model, twin, torch.randn(2, 3, 12, 12))
    images = IMAGES.expand(-1, 3, -1, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == twin(images).dtype
    report.revert()
    assert_same(model, twin, torch.randn(2, 3, 12, 12))


class Sum(nn.Module):
    def __init__(self, summand):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("summand", summand)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x) + self.summand), 2)


@pytest.mark.parametrize(
    "summand",
    [torch.randn(2, 8, 8, 8), torch.randn(8, 1, 1), torch.randn(()), torch.randn(2, 8, 8, 8).double()],
    ids=["same shape", "channels", "number", "float64"],
)
def test_what_is_added_may_be_broadcast_or_promoted(summand):
    model = Sum(summand)
    twin = copy.deepcopy(model)
    report = bmk.optimize(model)
    assert any("fused Conv2d + sum + relu + max-pool 2" in e.note for e in report.replaced)
    x = torch.randn(2, 3, 8, 8)
    assert model(x).dtype == twin(x).dtype
    assert_same(model, twin, x)
    if summand.dim() < 4:
        torch.testing.assert_close(model(x[0]), twin(x[0]), rtol=1e-4, atol=1e-5)


class WritesBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = x + 0
        y = self.conv(x)
        x.mul_(0)
        return F.relu(y)


def test_a_convolution_does_not_move_past_a_write_into_its_input():
    model = WritesBetween().eval()
    twin = copy.deepcopy(model)
    bmk.optimize(model)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_training_mode_is_asked_at_each_call():
    model = TextbookCNN()
    bmk.optimize(model)
    model.eval()
    assert torch.equal(model(IMAGES), model(IMAGES))
    model.train()
    assert not torch.equal(model(IMAGES), model(IMAGES))  # dropout


@pytest.mark.parametrize("training", [True, False])
def test_norm_is_folded_in_eval_and_runs_in_training(training):
    model = Branches().train(training)
    model.stem[1].running_mean.normal_()
    model.stem[1].running_var.uniform_(0.5, 2)
    twin = copy.deepcopy(model)
    report = bmk.optimize(model)
    assert any(e.path == "stem" and "BatchNorm + relu + max-pool 2" in e.note for e in report.replaced)
    assert_same(model, twin, torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(model.stem[1].running_mean, twin.stem[1].running_mean)
    model.eval()
    model.stem[1].train()  # a norm left in training inside a model in eval
    twin.eval()
    twin.stem[1].train()
    assert_same(model, twin, torch.randn(2, 3, 16, 16))


def test_layers_change_class_and_nothing_else():
    model = Recurrent()
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    hooked = []
    model.lstm.register_forward_hook(lambda *_: hooked.append(1))
    report = bmk.optimize(model)
    assert type(model.lstm) is bmk.nn.LSTM
    assert not isinstance(model.lstm, nn.LSTM)
    assert isinstance(model.attend, bmk.nn.MultiheadAttention)
    assert all(isinstance(m, bmk.nn.TransformerEncoderLayer) for m in model.encoder.layers)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert_same(model, twin, torch.randn(3, 6, 5))
    assert hooked
    assert "isinstance(m, nn.LSTM) is now False" in str(report)
    model.load_state_dict(twin.state_dict(), strict=True)


@pytest.mark.parametrize("make", [TextbookCNN, Branches, Recurrent])
def test_revert_gives_everything_back(make):
    model = make()
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    report = bmk.optimize(model)
    assert report.replaced
    report.revert()
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    report.revert()  # once more does nothing
    assert bmk.optimize(model).replaced


def test_optimizing_twice_changes_nothing_more():
    model = TextbookCNN()
    bmk.optimize(model)
    assert not bmk.optimize(model).replaced


def test_filter_strict_and_subclasses():
    class MyConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), MyConv(4, 4, 3), nn.ReLU())
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"strict=True(?s:.*)a subclass of nn.Conv2d"):
        bmk.optimize(model, strict=True)
    assert type(model[0]) is nn.Conv2d
    report = bmk.optimize(model, filter_fn=lambda module, path: path != "0")
    assert {e.path: e.note for e in report.kept} == {
        "0": "left out by filter_fn",
        "2": "a subclass of nn.Conv2d, whose changes would be lost",
    }
    assert not report.replaced
    bmk.optimize(model)
    assert_same(model, twin, torch.randn(2, 1, 9, 9))


def test_hooks_on_a_fused_layer_still_run():
    model = TextbookCNN()
    seen = []
    model.pool.register_forward_hook(lambda *_: seen.append("pool"))
    bmk.optimize(model)
    model(IMAGES)
    assert seen == ["pool", "pool"]


def test_what_a_trace_would_freeze_is_left_alone():
    class Counts(TextbookCNN):
        calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    class Draws(TextbookCNN):
        def forward(self, x):
            return super().forward(x) + torch.rand(10)

    for make in (Counts, Draws):
        model = make().eval()
        report = bmk.optimize(model)
        assert not [e for e in report.replaced if e.kind == "forward"]
        assert getattr(model, "calls", 0) == 0
        assert not torch.equal(model(IMAGES), model(IMAGES)) or make is Counts


def test_survives_copy_move_and_compile():
    model = TextbookCNN().eval()
    bmk.optimize(model)
    expected = model(IMAGES)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(copied(IMAGES), expected)
    copied = copied.double()
    assert copied(IMAGES.double()).dtype == torch.float64
    compiled = torch.compile(copied.float(), fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_backend_is_handed_down(backend):
    for model, x in ((TextbookCNN(), IMAGES), (Recurrent(), torch.randn(3, 6, 5))):
        report = bmk.optimize(model, backend=backend)
        assert {c.backend for c in bmk.explain(model, x).calls} == {backend}
        report.revert()


def test_bad_arguments_are_refused():
    model = TextbookCNN()
    with pytest.raises(ValueError, match="backend must be one of"):
        bmk.optimize(model, backend="gpu")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        bmk.optimize([model])
