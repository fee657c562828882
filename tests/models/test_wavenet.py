"""WaveNet against its plain PyTorch twin; streaming against the whole sequence; mu-law; generation."""

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
import bigmodel_models as models
from benchmarks.plain_models import PlainWaveNet
from bigmodel_models.wavenet import mu_law_decode, mu_law_encode

SIZES = (17, 6, 10, 3, 2)  # classes, channels, skip channels, layers of a stack, stacks


def codes(batch=2, length=40, seed=0):
    return torch.randint(SIZES[0], (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_same_weights_same_outputs_and_gradients(backend):
    ours, twin = models.WaveNet(*SIZES).double(), PlainWaveNet(*SIZES).double()
    twin.load_state_dict(ours.state_dict())
    with bmk.use_backend(backend):
        out = ours(codes())
        out.square().mean().backward()
    expected = twin(codes())
    expected.square().mean().backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-11, msg=name)


def test_every_layer_runs_its_op():
    model = models.WaveNet(*SIZES)
    calls = bmk.explain(model, codes()).calls
    assert [call.op for call in calls] == ["gated_conv"] * 6 + ["linear"] * 2


def test_steps_give_what_the_whole_sequence_gives():
    model, x = models.WaveNet(*SIZES).double(), codes()
    whole = model(x)
    for backend in ("auto", "torch"):
        states = model.initial_state(2)
        with torch.no_grad(), bmk.use_backend(backend):
            for t in range(x.shape[1]):
                logits, states = model.step(x[:, t], states)
                torch.testing.assert_close(logits, whole[:, t])


def test_receptive_field():
    model, x = models.WaveNet(*SIZES).double(), codes()
    assert model.receptive_field == 15
    before, changed = model(x), x.clone()
    changed[:, 10] = (changed[:, 10] + 1) % SIZES[0]
    differs = (model(changed) != before).any(2).any(0)
    assert not differs[:10].any()
    assert differs[10]
    assert differs[24]
    assert not differs[25:].any()


def test_generates_what_it_has_learnt():
    """A wave of period 8: after some updates the most likely samples go on with it, from any phase."""
    torch.manual_seed(0)
    model = models.WaveNet(32, 16, 16, 3, 1)
    wave = mu_law_encode(0.8 * torch.sin(torch.arange(72) * torch.pi / 4), 32)
    batch = torch.stack([wave[i : i + 64] for i in range(8)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    drawn = model.generate(24, batch[:, :16], temperature=0)
    assert drawn.shape == (8, 24)
    assert (drawn == batch[:, 16:40]).double().mean() > 0.95


def test_generation_is_drawn_from_the_generator():
    model = models.WaveNet(*SIZES)
    first, second, third = (model.generate(20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (1, 20)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert model.generate(0).shape == (1, 0)


@pytest.mark.parametrize("classes", [16, 256])
def test_mu_law(classes):
    audio = torch.arange(-1000, 1001, dtype=torch.float64) / 1000
    code = mu_law_encode(audio, classes)
    assert code[0] == 0
    assert code[-1] == classes - 1
    assert code[1000] == classes // 2
    assert (code.diff() >= 0).all()
    error = (mu_law_decode(code, classes) - audio).abs()
    # half a step of the companded scale, whose slope at x is (1 + mu |x|) log(1 + mu) / mu, at the step's far end
    mu = classes - 1
    half = (1 + mu) ** (1 / mu)
    assert (error <= (1 / mu + audio.abs()) * (half - 1) + 1e-6).all()
    assert torch.equal(mu_law_encode(mu_law_decode(code, classes), classes), code)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.WaveNet(num_layers=0), "num_layers: .*got 0"),
        (lambda: models.WaveNet(*SIZES)(torch.randn(2, 5)), "codes: .*float32"),
        (lambda: models.WaveNet(*SIZES).generate(3, torch.ones(4).long()), r"start: .*\[4\]"),
    ],
)
def test_wrong_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
