"""The large models as one writes them in plain torch.nn, with the parameter names that are shared most.

They are what the models of `bigmodel_models` are compared with: by the benchmarks in time, by the tests in every result.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class PlainBlock(nn.Module):
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


class PlainResNet(nn.Module):
    def __init__(self, layers, widths, bottleneck, small, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.small, c = small, widths[0]
        for i, (count, width) in enumerate(zip(layers, widths), 1):
            blocks = []
            for j in range(count):
                blocks.append(PlainBlock(c, width, 2 if i > 1 and j == 0 else 1, bottleneck))
                c = width * (4 if bottleneck else 1)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.stages = len(layers)
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))


class PlainVGG(nn.Module):
    def __init__(self, layers, batch_norm, grid, hidden, classes):
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
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        widths = (c * grid * grid, hidden, hidden)
        linears = [[nn.Linear(*pair), nn.ReLU(), nn.Dropout(0.0)] for pair in itertools.pairwise(widths)]
        self.classifier = nn.Sequential(*linears[0], *linears[1], nn.Linear(hidden, classes))

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class PlainBasic(nn.Sequential):
    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)
        self.relu = nn.ReLU()


class PlainInception(nn.Module):
    def __init__(self, c, ch1, ch3, ch5, proj, third):
        super().__init__()
        self.branch1 = PlainBasic(c, ch1, 1)
        self.branch2 = nn.Sequential(PlainBasic(c, ch3[0], 1), PlainBasic(*ch3, 3))
        self.branch3 = nn.Sequential(PlainBasic(c, ch5[0], 1), PlainBasic(*ch5, third))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), PlainBasic(c, proj, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.branch1, self.branch2, self.branch3, self.branch4)], 1)


class PlainBERTLayer(nn.Module):
    def __init__(self, e, heads, wide):
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict({name: nn.Linear(e, e) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": dense_norm(e, e)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(e, wide)})
        self.output = dense_norm(wide, e)

    def forward(self, x, mask):  # [B, S, E], [B, 1, 1, S] or None
        project, after = self.attention["self"], self.attention["output"]
        q, k, v = (project[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = after["LayerNorm"](x + after["dense"](y))
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + y)


class PlainBERT(nn.Module):
    """Hugging Face's BertForMaskedLM, by names and meaning."""

    def __init__(self, vocab, e, layers, heads, wide, max_length):
        super().__init__()
        tables = {"word": nn.Embedding(vocab, e, 0), "position": nn.Embedding(max_length, e)}
        tables["token_type"] = nn.Embedding(2, e)
        embeddings = {f"{name}_embeddings": table for name, table in tables.items()}
        embeddings["LayerNorm"] = nn.LayerNorm(e, eps=1e-12)
        for table in tables.values():
            nn.init.normal_(table.weight, std=0.02)
        encoder = nn.ModuleDict({"layer": nn.ModuleList(PlainBERTLayer(e, heads, wide) for _ in range(layers))})
        self.bert = nn.ModuleDict({"embeddings": nn.ModuleDict(embeddings), "encoder": encoder})
        decoder = nn.Linear(e, vocab)
        decoder.weight = tables["word"].weight
        predictions = nn.ModuleDict({"transform": dense_norm(e, e), "decoder": decoder})
        predictions.bias = decoder.bias
        self.cls = nn.ModuleDict({"predictions": predictions})

    def forward(self, tokens, segments=None, padding=None):  # [B, S] each -> [B, S, vocab]
        tables = self.bert["embeddings"]
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = tables["word_embeddings"](tokens) + tables["position_embeddings"].weight[: tokens.shape[1]]
        x = tables["LayerNorm"](x + tables["token_type_embeddings"](segments))
        mask = None if padding is None else ~padding[:, None, None]
        for layer in self.bert["encoder"]["layer"]:
            x = layer(x, mask)
        head = self.cls["predictions"]
        return head["decoder"](head["transform"]["LayerNorm"](F.gelu(head["transform"]["dense"](x))))


def dense_norm(a, b):
    return nn.ModuleDict({"dense": nn.Linear(a, b), "LayerNorm": nn.LayerNorm(b, eps=1e-12)})


class PlainProjection(nn.Module):
    """A linear layer with its weight as [in, out]."""

    def __init__(self, a, b):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(a, b) * 0.02), nn.Parameter(torch.zeros(b))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class PlainGPTBlock(nn.Module):
    def __init__(self, e, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(e), nn.LayerNorm(e)
        self.attn = nn.ModuleDict({"c_attn": PlainProjection(e, 3 * e), "c_proj": PlainProjection(e, e)})
        self.mlp = nn.ModuleDict({"c_fc": PlainProjection(e, 4 * e), "c_proj": PlainProjection(4 * e, e)})

    def forward(self, x):  # [B, S, E]
        return self.rest(x, F.scaled_dot_product_attention(*self.project(x), is_causal=True))

    def step(self, x, keys, values, length):  # [B, 1, E], [B, H, capacity, D] twice
        q, k, v = self.project(x)
        keys[:, :, length], values[:, :, length] = k[:, :, 0], v[:, :, 0]
        return self.rest(x, F.scaled_dot_product_attention(q, keys[:, :, : length + 1], values[:, :, : length + 1]))

    def project(self, x):
        packed = self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in packed)

    def rest(self, x, y):
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """Hugging Face's GPT2LMHeadModel, by names and meaning."""

    def __init__(self, vocab, e, layers, heads, max_length):
        super().__init__()
        parts = {"wte": nn.Embedding(vocab, e), "wpe": nn.Embedding(max_length, e)}
        parts["h"] = nn.ModuleList(PlainGPTBlock(e, heads) for _ in range(layers))
        self.transformer = nn.ModuleDict(parts | {"ln_f": nn.LayerNorm(e)})
        for table in (parts["wte"], parts["wpe"]):
            nn.init.normal_(table.weight, std=0.02)
        self.lm_head = nn.Linear(e, vocab, bias=False)
        self.lm_head.weight = parts["wte"].weight

    def forward(self, tokens):  # [B, S] -> [B, S, vocab]
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"].weight[: tokens.shape[1]]
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


class PlainDeepSpeech(nn.Module):
    def __init__(self, classes, frequencies, h, layers, both=True, channels=(32, 32)):
        super().__init__()
        first, second = channels
        kernels = ((1, first, (41, 11), 2, (20, 5)), (first, second, (21, 11), (2, 1), (10, 5)))
        self.convs = nn.ModuleList(nn.Conv2d(*sizes, bias=False) for sizes in kernels)
        self.conv_norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        bands = ((frequencies - 1) // 2) // 2 + 1
        sizes = [second * bands] + [h] * (layers - 1)
        self.rnns = nn.ModuleList(nn.LSTM(size, h, bidirectional=both) for size in sizes)
        self.rnn_norms = nn.ModuleList(nn.BatchNorm1d(h) for _ in sizes)
        self.fc = nn.Linear(h, classes, bias=False)
        self.h = h

    def forward(self, x, lengths):  # [B, T, F], [B] -> [T', B, classes]
        x = x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x.device)
        x = x.transpose(1, 2)[:, None]
        for layer, norm in zip(self.convs, self.conv_norms):
            x = F.hardtanh(norm(layer(x)), 0, 20)
            lengths = (lengths - 1) // layer.stride[1] + 1
            x = x * (torch.arange(x.shape[-1]) < lengths[:, None])[:, None, None].to(x.device)
        x = x.flatten(1, 2).permute(2, 0, 1)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        for rnn, norm in zip(self.rnns, self.rnn_norms):
            y = rnn(packed)[0].data
            packed = packed._replace(data=norm(y.unflatten(1, (-1, self.h)).sum(1)))
        return F.log_softmax(pad_packed_sequence(packed._replace(data=self.fc(packed.data)))[0], -1)


class PlainWaveNet(nn.Module):
    def __init__(self, classes, channels, skips, layers, stacks):
        super().__init__()
        self.embedding = nn.Embedding(classes, channels)
        self.layers = nn.ModuleList()
        for i in range(layers * stacks):
            parts = {
                "conv": nn.Conv1d(channels, 2 * channels, 2, dilation=2 ** (i % layers)),
                "out": nn.Conv1d(channels, channels, 1),
                "skip": nn.Conv1d(channels, skips, 1),
            }
            if i == layers * stacks - 1:
                del parts["out"]
            self.layers.append(nn.ModuleDict(parts))
        self.hidden = nn.Linear(skips, skips)
        self.fc = nn.Linear(skips, classes)

    def forward(self, codes):  # [B, T] -> [B, T, classes]
        x, total = self.embedding(codes).mT, 0
        for layer in self.layers:
            first, second = layer["conv"](F.pad(x, (layer["conv"].dilation[0], 0))).chunk(2, 1)
            a = first.tanh() * second.sigmoid()
            total = total + layer["skip"](a)
            x = x + layer["out"](a) if "out" in layer else None
        return self.fc(self.hidden(total.mT.relu()).relu())
