"""ResNet, VGG, GoogLeNet, BERT, GPT and Deep Speech against plain PyTorch twins that carry the usual parameter names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bigmodel_models as models
from bigmodel_models.inception import BasicConv2d, Inception
from bigmodel_models.resnet import BasicBlock, Bottleneck
from tests.models.twins import check_twins, check_weights_move_back


class TwinBlock(nn.Module):
    """torchvision's BasicBlock and Bottleneck, by names and meaning."""

    def __init__(self, c_in, c, stride, bottleneck):
        super().__init__()
        out = 4 * c if bottleneck else c
        sizes = (
            [(c_in, c, 1, 1), (c, c, 3, stride), (c, out, 1, 1)] if bottleneck else [(c_in, c, 3, stride), (c, c, 3, 1)]
        )
        self.depth = len(sizes)
        for i, (a, b, kernel, step) in enumerate(sizes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        if stride != 1 or c_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class TwinResNet(nn.Module):
    def __init__(self, layers, widths, bottleneck, small):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.small, c = small, widths[0]
        for i, (count, width) in enumerate(zip(layers, widths), 1):
            blocks = []
            for j in range(count):
                blocks.append(TwinBlock(c, width, 2 if i > 1 and j == 0 else 1, bottleneck))
                c = width * (4 if bottleneck else 1)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.stages = len(layers)
        self.fc = nn.Linear(c, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))


class TwinVGG(nn.Module):
    def __init__(self, layers, batch_norm):
        super().__init__()
        modules, c = [], 3
        for entry in layers:
            if entry == "pool":
                modules.append(nn.MaxPool2d(2, 2))
            else:
                modules += [
                    nn.Conv2d(c, entry, 3, padding=1),
                    *([nn.BatchNorm2d(entry)] if batch_norm else []),
                    nn.ReLU(),
                ]
                c = entry
        self.features = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        hidden = [
            nn.Linear(4 * c, 9),
            nn.ReLU(),
            nn.Dropout(0),
            nn.Linear(9, 9),
            nn.ReLU(),
            nn.Dropout(0),
            nn.Linear(9, 5),
        ]
        self.classifier = nn.Sequential(*hidden)

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class TwinBasic(nn.Sequential):
    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)
        self.relu = nn.ReLU()


class TwinInception(nn.Module):
    def __init__(self, c, ch1, ch3, ch5, proj, third):
        super().__init__()
        self.branch1 = TwinBasic(c, ch1, 1)
        self.branch2 = nn.Sequential(TwinBasic(c, ch3[0], 1), TwinBasic(*ch3, 3))
        self.branch3 = nn.Sequential(TwinBasic(c, ch5[0], 1), TwinBasic(*ch5, third))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), TwinBasic(c, proj, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.branch1, self.branch2, self.branch3, self.branch4)], 1)


class TwinBERT(nn.Module):
    """Hugging Face's BertForMaskedLM, by names and meaning; its parameters are made by hand."""

    def __init__(self, vocab, e, layers, heads, wide):
        super().__init__()
        self.heads, self.layers = heads, layers
        linears = {"cls.predictions.transform.dense": (e, e), "cls.predictions.decoder": (e, vocab)}
        norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
        for i in range(layers):
            layer = f"bert.encoder.layer.{i}."
            linears |= {layer + f"attention.self.{name}": (e, e) for name in ("query", "key", "value")}
            linears |= {layer + "attention.output.dense": (e, e), layer + "intermediate.dense": (e, wide)}
            linears[layer + "output.dense"] = (wide, e)
            norms += [layer + "attention.output.LayerNorm", layer + "output.LayerNorm"]
        tables = {"word": vocab, "position": 12, "token_type": 2}
        values = {f"bert.embeddings.{name}_embeddings.weight": (size, e) for name, size in tables.items()}
        for name, (a, b) in linears.items():
            values |= {name + ".weight": (b, a), name + ".bias": (b,)}
        values |= {name + kind: (e,) for name in norms for kind in (".weight", ".bias")}
        for name, shape in values.items():
            parent = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.register_parameter(last, nn.Parameter(torch.randn(shape) * 0.1))
        predictions = self.cls.predictions
        predictions.bias = predictions.decoder.bias
        predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def linear(self, name, x):
        return F.linear(x, self.get_parameter(name + ".weight"), self.get_parameter(name + ".bias"))

    def norm(self, name, x):
        return F.layer_norm(
            x, x.shape[-1:], self.get_parameter(name + ".weight"), self.get_parameter(name + ".bias"), 1e-12
        )

    def forward(self, tokens, segments, padding):
        tables = self.bert.embeddings
        x = F.embedding(tokens, tables.word_embeddings.weight, padding_idx=0)
        x = x + tables.position_embeddings.weight[: tokens.shape[1]] + tables.token_type_embeddings.weight[segments]
        x = self.norm("bert.embeddings.LayerNorm", x)
        for i in range(self.layers):
            name = f"bert.encoder.layer.{i}."
            q, k, v = (
                self.linear(name + f"attention.self.{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            scores = q @ k.mT / q.shape[-1] ** 0.5
            y = scores.masked_fill(padding[:, None, None], float("-inf")).softmax(-1) @ v
            y = self.linear(name + "attention.output.dense", y.transpose(1, 2).flatten(2))
            x = self.norm(name + "attention.output.LayerNorm", x + y)
            y = self.linear(name + "output.dense", F.gelu(self.linear(name + "intermediate.dense", x)))
            x = self.norm(name + "output.LayerNorm", x + y)
        x = self.norm("cls.predictions.transform.LayerNorm", F.gelu(self.linear("cls.predictions.transform.dense", x)))
        return self.linear("cls.predictions.decoder", x)


class TwinGPT(nn.Module):
    """Hugging Face's GPT2LMHeadModel, by names and meaning."""

    def __init__(self, vocab, e, layers, heads):
        super().__init__()

        def project(a, b):
            module = nn.Module()
            module.weight, module.bias = nn.Parameter(torch.randn(a, b) * 0.1), nn.Parameter(torch.randn(b) * 0.1)
            return module

        self.heads = heads
        block = {"ln_1": lambda: nn.LayerNorm(e), "ln_2": lambda: nn.LayerNorm(e)}
        block["attn"] = lambda: nn.ModuleDict({"c_attn": project(e, 3 * e), "c_proj": project(e, e)})
        block["mlp"] = lambda: nn.ModuleDict({"c_fc": project(e, 4 * e), "c_proj": project(4 * e, e)})
        blocks = [nn.ModuleDict({name: make() for name, make in block.items()}) for _ in range(layers)]
        parts = {"wte": nn.Embedding(vocab, e), "wpe": nn.Embedding(16, e), "h": nn.ModuleList(blocks)}
        self.transformer = nn.ModuleDict(parts | {"ln_f": nn.LayerNorm(e)})
        self.lm_head = nn.Linear(e, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens):
        parts, length = self.transformer, tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = parts["wte"](tokens) + parts["wpe"].weight[:length]
        for block in parts["h"]:
            attn, mlp = block["attn"], block["mlp"]
            q, k, v = (block["ln_1"](x) @ attn["c_attn"].weight + attn["c_attn"].bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            y = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, float("-inf")).softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2) @ attn["c_proj"].weight + attn["c_proj"].bias
            y = F.gelu(block["ln_2"](x) @ mlp["c_fc"].weight + mlp["c_fc"].bias, approximate="tanh")
            x = x + y @ mlp["c_proj"].weight + mlp["c_proj"].bias
        return self.lm_head(parts["ln_f"](x))


class TwinDeepSpeech(nn.Module):
    def __init__(self, h, layers, both):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(1, 3, (41, 11), 2, (20, 5), bias=False), nn.Conv2d(3, 4, (21, 11), (2, 1), (10, 5), bias=False)]
        )
        self.conv_norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(4)])
        sizes = [4 * 6] + [h] * (layers - 1)
        self.rnns = nn.ModuleList(nn.LSTM(size, h, bidirectional=both) for size in sizes)
        self.rnn_norms = nn.ModuleList(nn.BatchNorm1d(h) for _ in sizes)
        self.fc = nn.Linear(h, 5, bias=False)
        self.h = h

    def forward(self, x, lengths):
        x = x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        x = x.transpose(1, 2)[:, None]
        for layer, norm in zip(self.convs, self.conv_norms):
            x = F.hardtanh(norm(layer(x)), 0, 20)
            lengths = (lengths - 1) // layer.stride[1] + 1
            x = x * (torch.arange(x.shape[-1]) < lengths[:, None])[:, None, None]
        x = x.flatten(1, 2).permute(2, 0, 1)
        for rnn, norm in zip(self.rnns, self.rnn_norms):
            y, _ = pad_packed_sequence(rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
            y = y.unflatten(2, (-1, self.h)).sum(2)
            valid = torch.arange(y.shape[0])[:, None] < lengths
            x = torch.zeros_like(y)
            x[valid] = norm(y[valid])
        return F.log_softmax(self.fc(x), -1)


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
        lambda: TwinResNet((1, 2, 1), (4, 6, 8), False, False),
        lambda: image(37),
    ),
    "resnet-bottleneck": (
        lambda: models.ResNet(Bottleneck, (2, 1), 5, widths=(4, 6), small_images=True),
        lambda: TwinResNet((2, 1), (4, 6), True, True),
        lambda: image(11),
    ),
    "vgg": (
        lambda: models.VGG(SMALL, 5, grid=2, hidden_size=9, dropout=0.0),
        lambda: TwinVGG(SMALL, False),
        lambda: image(14),
    ),
    "vgg-norm": (
        lambda: models.VGG(SMALL, 5, batch_norm=True, grid=2, hidden_size=9, dropout=0.0),
        lambda: TwinVGG(SMALL, True),
        lambda: image(14),
    ),
    "inception-5": (
        lambda: Inception(3, 4, (3, 5), (2, 3), 2, 5),
        lambda: TwinInception(3, 4, (3, 5), (2, 3), 2, 5),
        lambda: image(9),
    ),
    "inception-3": (
        lambda: Inception(3, 4, (3, 5), (2, 3), 2, 3),
        lambda: TwinInception(3, 4, (3, 5), (2, 3), 2, 3),
        lambda: image(9),
    ),
    "bert": (
        lambda: models.BERTForMaskedLM(11, 12, 2, 3, 20, max_length=12, dropout=0.0),
        lambda: TwinBERT(11, 12, 2, 3, 20),
        bert_inputs,
    ),
    "gpt": (
        lambda: models.GPT(11, 12, 2, 3, max_length=16, dropout=0.0),
        lambda: TwinGPT(11, 12, 2, 3),
        lambda: (torch.randint(11, (3, 13)),),
    ),
    "deepspeech": (
        lambda: models.DeepSpeech(5, 21, 8, 2, channels=(3, 4)),
        lambda: TwinDeepSpeech(8, 2, True),
        speech_inputs,
    ),
    "deepspeech-one-way": (
        lambda: models.DeepSpeech(5, 21, 8, 1, channels=(3, 4), bidirectional=False),
        lambda: TwinDeepSpeech(8, 1, False),
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
