"""ResNet, VGG, GoogLeNet, BERT, GPT and Deep Speech, small, beside plain twins that carry the usual parameter names."""

import torch

import bigmodel_models as models
from benchmarks.plain_models import PlainBERT, PlainDeepSpeech, PlainGPT, PlainInception, PlainResNet, PlainVGG
from bigmodel_models.inception import Inception
from bigmodel_models.resnet import BasicBlock, Bottleneck

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
