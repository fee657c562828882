"""ResNet, VGG, GoogLeNet, BERT, GPT and Deep Speech against plain PyTorch twins that carry the usual parameter names."""

import pytest
import torch

import bigmodel_models as models
from benchmarks.plain_models import PlainBERT, PlainDeepSpeech, PlainGPT, PlainInception, PlainResNet, PlainVGG
from bigmodel_models.inception import BasicConv2d, Inception
from bigmodel_models.resnet import BasicBlock, Bottleneck
from tests.models.twins import check_twins, check_weights_move_back

SMALL = (4, 6, "pool", 8, "pool")


def image(size):
    return (torch.randn(3, 3, size, size),)


def bert_inputs():
    padding = torch.arange(9) >= torch.tensor([[9], [4], [7]])
    return torch.randint(1, 11, (3, 9)), torch.randint(2, (3, 9)), padding


def speech_inputs():
    x = torch.randn(3, 30, 21)
    return x, torch.tensor([21, 30, 9])


CASES = {
    "resnet": (
        lambda: models.ResNet(BasicBlock, (1, 2, 1), 5, widths=(4, 6, 8)),
        lambda: PlainResNet((1, 2, 1), (4, 6, 8), False, False, 5),
        lambda: image(37),
    ),
    "resnet-bottleneck": (
        lambda: models.ResNet(Bottleneck, (2, 1), 5, widths=(4, 6), small_images=True),
        lambda: PlainResNet((2, 1), (4, 6), True, True, 5),
        lambda: image(11),
    ),
    "vgg": (
        lambda: models.VGG(SMALL, 5, grid=2, hidden_size=9, dropout=0.0),
        lambda: PlainVGG(SMALL, False, 2, 9, 5),
        lambda: image(14),
    ),
    "vgg-norm": (
        lambda: models.VGG(SMALL, 5, batch_norm=True, grid=2, hidden_size=9, dropout=0.0),
        lambda: PlainVGG(SMALL, True, 2, 9, 5),
        lambda: image(14),
    ),
    "inception-5": (
        lambda: Inception(3, 4, (3, 5), (2, 3), 2, 5),
        lambda: PlainInception(3, 4, (3, 5), (2, 3), 2, 5),
        lambda: image(9),
    ),
    "inception-3": (
        lambda: Inception(3, 4, (3, 5), (2, 3), 2, 3),
        lambda: PlainInception(3, 4, (3, 5), (2, 3), 2, 3),
        lambda: image(9),
    ),
    "bert": (
        lambda: models.BERTForMaskedLM(11, 12, 2, 3, 20, max_length=12, dropout=0.0),
        lambda: PlainBERT(11, 12, 2, 3, 20, 12),
        bert_inputs,
    ),
    "gpt": (
        lambda: models.GPT(11, 12, 2, 3, max_length=16, dropout=0.0),
        lambda: PlainGPT(11, 12, 2, 3, 16),
        lambda: (torch.randint(11, (3, 13)),),
    ),
    "deepspeech": (
        lambda: models.DeepSpeech(5, 21, 8, 2, channels=(3, 4)),
        lambda: PlainDeepSpeech(5, 21, 8, 2, True, (3, 4)),
        speech_inputs,
    ),
    "deepspeech-one-way": (
        lambda: models.DeepSpeech(5, 21, 8, 1, channels=(3, 4), bidirectional=False),
        lambda: PlainDeepSpeech(5, 21, 8, 1, False, (3, 4)),
        speech_inputs,
    ),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_same_weights_same_outputs_and_gradients(case, training, backend):
    build, build_twin, make_inputs = CASES[case]
    check_twins(build(), build_twin(), make_inputs(), training=training, backend=backend)


@pytest.mark.parametrize("case", CASES)
def test_weights_move_back(case):
    build, build_twin, make_inputs = CASES[case]
    check_weights_move_back(build(), build_twin(), make_inputs())


PARAMETERS = {  # of the published models
    "resnet18": (models.resnet18, 11_689_512),
    "resnet34": (models.resnet34, 21_797_672),
    "resnet50": (models.resnet50, 25_557_032),
    "vgg11": (models.vgg11, 132_863_336),
    "vgg16-norm": (lambda: models.vgg16(batch_norm=True), 138_365_992),
    "googlenet": (lambda: models.GoogLeNet(third_kernel=3), 13_004_888),
    "bert-base": (models.BERT, 109_482_240),
    "gpt2-small": (models.GPT, 124_439_808),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_of_the_published_models(name):
    build, expected = PARAMETERS[name]
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == expected


def test_whole_networks_run():
    """GoogLeNet's joints, and the names that torchvision gives the ends of each network."""
    with torch.no_grad():
        model = models.GoogLeNet(7).eval()
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
        output = model.train()(torch.randn(2, 3, 64, 64))
        assert [t.shape for t in output] == [(2, 7)] * 3
        assert bool(model.loss(torch.randn(2, 3, 64, 64), torch.tensor([1, 2])).isfinite())
        assert models.SmallInception()(torch.randn(2, 1, 28, 28)).shape == (2, 10)
        assert models.vgg_small()(torch.randn(2, 1, 28, 28)).shape == (2, 10)
        assert models.resnet20(in_channels=1)(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    names = models.GoogLeNet(7).state_dict()
    for name in ("conv1.conv.weight", "inception4e.branch3.1.bn.running_var", "aux2.fc1.weight", "fc.bias"):
        assert name in names
    assert isinstance(models.GoogLeNet(7).inception3a.branch1, BasicConv2d)
