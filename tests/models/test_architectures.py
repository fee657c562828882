"""The published sizes of the large models, and whole networks from end to end."""

import pytest
import torch

import bigmodel_models as models
from bigmodel_models.inception import BasicConv2d

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
