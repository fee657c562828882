"""Training: what it learns, that a run is repeatable and resumable to the bit, and that backends agree step by step."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bigmodel_kernels as bmk
import bigmodel_models as models
from bigmodel_models import data
from bigmodel_models.__main__ import main
from bigmodel_models.checkpoint import load_checkpoint
from bigmodel_models.errors import TrainingError
from bigmodel_models.tasks import TASKS, explained, frechet_distance
from bigmodel_models.train import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bar"), [("cnn", 0.97), ("rnn", 0.93), ("transformer", 0.93)])
def test_digits_are_learnt(name, bar):
    result = train(name, data="digits")
    assert result.metric >= bar
    assert result.seconds < 120


@pytest.mark.parametrize(
    ("name", "variant", "epochs", "bar"),
    [
        ("autoencoder", "conv", 3, 0.6),
        ("autoencoder", "dense", 10, 0.4),
        ("mlp", "narrow", 3, 0.7),
    ],
)
def test_the_others_learn(name, variant, epochs, bar):
    result = train(name, variant=variant, epochs=epochs)
    assert result.metric >= bar
    tenth = len(result.losses) // 10
    assert sum(result.losses[-tenth:]) < 0.6 * sum(result.losses[:tenth])


def test_without_relu_only_the_linear_part_is_learnt():
    # the target: 8 causes as they are and 4 as 2 |cause|, whose variance is 4 (1 - 2 / pi) each
    linear_share = 8 / (8 + 4 * 4 * (1 - 2 / torch.pi))
    result = train("mlp", variant="narrow-linear", epochs=6)
    assert linear_share - 0.1 < result.metric < linear_share + 0.05


def test_the_gan_comes_nearer():
    result = train("gan", epochs=2)
    assert result.metrics[-1] < 0.5 * result.metrics[0]
    assert set(result.series) == {"generator loss", "discriminator loss"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["cnn", "rnn", "transformer"])
def test_loss_curves_of_the_backends_agree(name, seed):
    """Two runs of 50 steps, each on its own weights, at a tenth of the tuned rate.

    At the tuned rate a rounding that turns a ReLU or a maximum over decides where a run goes: PyTorch with and without oneDNN
    is up to 8.8e-4 apart after 50 steps of the CNN (seeds 0 to 5), as ours and PyTorch are (1.1e-3).
    """
    lr = TASKS[name].lr / 10
    ours = train(name, backend="auto", max_steps=50, seed=seed, lr=lr)
    stock = train(name, backend="torch", max_steps=50, seed=seed, lr=lr)
    assert set(stock.kernels.values()) == {"torch"}
    assert len(ours.losses) == 50
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(stock.losses), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["cnn", "rnn", "transformer"])
def test_backends_agree_on_the_same_weights(name):
    """50 steps at the tuned rate, each taken by PyTorch; at each one, loss and gradient of both backends."""
    task = TASKS[name]
    model = task.builders["default"]()
    optimizers = task.optimizers(model, task.lr)
    digits = data.digits()
    x = task.inputs(digits.train_x, digits)
    apart = []
    for batch in torch.randperm(len(x)).repeat(3).split(task.batch_size)[:50]:
        results = []
        for backend in ("auto", "torch"):
            with bmk.use_backend(backend):
                loss = task.loss(model, x[batch], digits.train_y[batch])
                gradient = torch.autograd.grad(loss, tuple(model.parameters()))
                results.append((loss.item(), torch.cat([part.flatten() for part in gradient])))
        (ours, our_gradient), (stock, stock_gradient) = results
        assert ours == pytest.approx(stock, rel=5e-6)
        apart.append(((our_gradient - stock_gradient).norm() / stock_gradient.norm()).item())
        with bmk.use_backend("torch"):
            task.step(model, optimizers, x[batch], digits.train_y[batch])
    assert statistics.median(apart) < 2e-6
    assert max(apart) < 5e-3  # a step where one rounding puts a ReLU or a maximum on its other side


@pytest.fixture
def little_text(monkeypatch):
    """A part of the text, for runs of a second."""
    whole = data.text()
    parts = (whole.train_x[:192], whole.train_y[:192], whole.test_x[:32], whole.test_y[:32])
    monkeypatch.setattr(data, "text", lambda: data.DataSet("topics", *parts))


@pytest.fixture
def little_data(monkeypatch):
    """A part of all data: epochs of a few small steps, where what counts is where they begin and end."""
    text, images, tones = data.text(), data.synthetic_images(320, 80), data.tones(48, 8)
    parts = (text.train_x[:48], text.train_y[:48], text.test_x[:8], text.test_y[:8])
    monkeypatch.setattr(data, "text", lambda: data.DataSet("topics", *parts))
    monkeypatch.setattr(data, "synthetic_images", lambda: images)
    monkeypatch.setattr(data, "tones", lambda: tones)


@pytest.mark.parametrize(
    ("name", "variant", "steps", "bar"),
    [
        ("resnet", "resnet8", 45, 0.9),
        ("vgg", "norm", 45, 0.9),
        ("inception", "default", 35, 0.9),
        ("wavenet", "tiny", 60, 0.8),
        ("gpt", "tiny", 60, 0.75),
    ],
)
def test_the_large_ones_begin_to_learn(name, variant, steps, bar):
    result = train(name, variant=variant, max_steps=steps)
    assert sum(result.losses[-5:]) < bar * sum(result.losses[:5])
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_bits_of_a_model_that_knows_nothing():
    task = TASKS["gpt"]
    x = torch.randint(data.CHARACTERS, (5, 7))
    logits = torch.zeros(5, 7, data.CHARACTERS)
    assert task.evaluate(lambda part: logits[: len(part)], x, x) == pytest.approx(7.0)


class TestResume:
    @pytest.mark.parametrize(
        ("name", "variant"),
        [("cnn", None), ("rnn", None), ("gan", "dense"), ("gan", "conv"), ("gpt", "tiny"), ("wavenet", "tiny")],
    )
    def test_goes_on_to_the_bit(self, name, variant, tmp_path, little_data):
        # one thread: with more, the order of a sum may differ from run to run
        sequence = name in ("gpt", "wavenet")
        options = {"variant": variant, "batch_size": 16 if sequence else 64, "seed": 5, "threads": 1}
        options["data"] = None if sequence else "synthetic"
        whole = train(name, epochs=2, out=tmp_path / "whole", **options)
        train(name, epochs=1, out=tmp_path / "half", **options)
        torch.rand(3)  # the state of the caller's generator is no part of a run
        rest = train(name, epochs=2, out=tmp_path / "rest", resume=tmp_path / "half/checkpoint.safetensors", threads=1)
        assert rest.series == whole.series
        assert rest.metrics == whole.metrics
        expected = load_file(tmp_path / "whole/checkpoint.safetensors")
        resumed = load_file(tmp_path / "rest/checkpoint.safetensors")
        assert expected.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in expected.items())

    def test_the_same_seed_gives_the_same_run_and_another_does_not(self):
        runs = [train("cnn", data="synthetic", max_steps=3, seed=seed, threads=1).losses for seed in (1, 1, 2)]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]

    def test_the_checkpoint_fits_the_plain_twin(self, tmp_path, little_data):
        result = train("rnn", data="synthetic", epochs=1, out=tmp_path)
        checkpoint = load_checkpoint(tmp_path / "checkpoint.safetensors")
        twin = nn.LSTM(28, 128, 2, batch_first=True)
        twin.load_state_dict({key[5:]: value for key, value in checkpoint.model.items() if key.startswith("lstm.")})
        x = torch.randn(2, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(result.model.eval()(x), result.model.fc(twin(x)[0][:, -1]), rtol=1e-5, atol=1e-6)

    def test_wrong_resumes(self, tmp_path, little_data):
        train("cnn", data="synthetic", epochs=1, out=tmp_path)
        path = tmp_path / "checkpoint.safetensors"
        with pytest.raises(TrainingError, match=r"holds a cnn.*train cnn"):
            train("rnn", resume=path)
        with pytest.raises(TrainingError, match=r"holds 1 already.*above that, got 1"):
            train("cnn", resume=path, epochs=1)
        with pytest.raises(TrainingError, match=r"--lr: .*trained with 0.001, got 0.5"):
            train("cnn", resume=path, lr=0.5)
        with pytest.raises(TrainingError, match=r"does not exist: pass the checkpoint.safetensors"):
            train("cnn", resume=tmp_path / "nothing.safetensors")
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(TrainingError, match=r"is not a safetensors file or is cut off"):
            train("cnn", resume=path)
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(TrainingError, match=r"was not written by this training command"):
            train("cnn", resume=path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "bert"}, "model: .*cnn.*'bert'"),
        ({"name": "gan", "variant": "deep"}, "variant: gan has conv, dense; got 'deep'"),
        ({"name": "mlp", "data": "digits"}, "data: mlp trains on synthetic, got 'digits'"),
        ({"name": "cnn", "epochs": 0}, "epochs: .*at least 1, got 0"),
        ({"name": "cnn", "batch_size": 9999}, "batch_size: 9999 is above the 1347"),
        ({"name": "cnn", "lr": -1.0}, "lr: .*positive.*-1.0"),
        ({"name": "cnn", "lr": float("nan")}, "lr: .*positive.*nan"),
        ({"name": "cnn", "backend": "fast"}, "backend: expected one of auto, .*'fast'"),
        ({"name": "cnn", "lr": 1e9, "max_steps": 20}, "loss became .* try a lower --lr than 1e[+]09"),
    ],
)
def test_wrong_settings(options, words):
    with pytest.raises(TrainingError, match=words):
        train(**options)


def test_a_missing_backend_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrainingError, match=r"'cuda' cannot run here: .*'auto'"):
        train("cnn", backend="cuda")
    with pytest.raises(TrainingError, match=r"device 'cuda' is not usable"):
        train("cnn", device="cuda")


def test_a_run_leaves_the_caller_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train("cnn", data="synthetic", max_steps=2, threads=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_default_settings_are_those_of_the_textbook():
    assert isinstance(TASKS["mlp"].builders["wide"](), models.BigModel)
    for task in TASKS.values():
        expected = {"mlp": "synthetic", "gpt": "topics", "wavenet": "tones"}.get(task.name, "digits")
        assert task.data_names[0] == expected
        assert dataclasses.is_dataclass(task)


class TestMetrics:
    def test_explained(self):
        target = torch.randn(100, 3)
        assert explained(target, target) == 1.0
        assert explained(target.mean(dim=0).expand(100, 3), target) == pytest.approx(0.0, abs=1e-6)

    def test_frechet_distance(self):
        real = torch.randn(4000, 1, 5, 5)
        assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)
        # two Gaussians of the same covariance are as far apart as their means; over 20 of 25 unit variances
        shift = frechet_distance(real + 1.0, real)
        assert 0.5 < shift < 1.5
        assert frechet_distance(real * 2.0, real) == pytest.approx(1.0, abs=0.1)  # (2 - 1)^2 in each direction


def command(*arguments, folder, **environment):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "bigmodel_models", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class TestCommand:
    def test_train_and_resume(self, tmp_path):
        first = command(
            "train", "cnn", "--data", "synthetic", "--epochs", "1", folder=tmp_path, BIGMODEL_BACKEND="torch"
        )
        assert first.returncode == 0, first.stderr
        assert "test accuracy" in first.stdout
        folder = tmp_path / "runs/cnn"
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["name"] == "cnn"
        assert metrics["epochs"] == 1
        assert len(metrics["losses"]) == 20
        assert metrics["kernels"] == {"conv": "torch", "linear": "torch"}, "the environment chose the backend"
        again = command(
            "train",
            "cnn",
            "--epochs",
            "2",
            "--resume",
            "runs/cnn/checkpoint.safetensors",
            "--out",
            "on",
            folder=tmp_path,
        )
        assert again.returncode == 0, again.stderr
        assert len(json.loads((tmp_path / "on/metrics.json").read_text())["losses"]) == 40

    @pytest.mark.parametrize("name", ["gan", "autoencoder"])
    def test_pictures(self, name, tmp_path, capsys):
        assert main(["train", name, "--variant", "dense", "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out/samples.png").read_bytes().startswith(b"\x89PNG")
        assert "samples.png" in capsys.readouterr().out

    def test_text(self, tmp_path, capsys, little_text):
        arguments = ["train", "gpt", "--variant", "tiny", "--epochs", "1", "--out", str(tmp_path)]
        assert main(arguments) == 0
        assert "test bits per character" in capsys.readouterr().out
        lines = (tmp_path / "samples.txt").read_text().splitlines()
        assert lines[0].startswith("gpt (tiny) on topics")
        assert sum(line.count("[model:]") for line in lines[1:]) == 3

    def test_audio(self, tmp_path):
        assert main(["train", "wavenet", "--variant", "tiny", "--epochs", "1", "--out", str(tmp_path)]) == 0
        with wave.open(str(tmp_path / "samples.wav")) as file:
            assert (file.getframerate(), file.getnframes()) == (8000, 4000)

    def test_list(self, tmp_path):
        done = command("list", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        for name in TASKS:
            assert name in done.stdout

    def test_errors_are_one_line_and_no_traceback(self, tmp_path):
        done = command("train", "mlp", "--data", "digits", folder=tmp_path)
        assert done.returncode == 2
        assert done.stderr == "error: data: mlp trains on synthetic, got 'digits'\n"

    @pytest.mark.parametrize("arguments", [["train", "bert"], ["train", "cnn", "--epochs", "many"], []])
    def test_wrong_words_show_the_usage(self, arguments, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "usage: python -m bigmodel_models" in capsys.readouterr().err
