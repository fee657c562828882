"""What BERT, GPT and Deep Speech do by themselves: masks, lengths, caches, losses, wrong input."""

import pytest
import torch
from torch import nn

import bigmodel_models as models
from bigmodel_models.resnet import BasicBlock
from tests.models.architecture_twins import bert_inputs, speech_inputs


class TestBERT:
    def test_padding_changes_nothing(self):
        model = models.BERTForClassification(3, 11, 12, 2, 3, 20, max_length=12).double().eval()
        tokens, segments, padding = bert_inputs()
        out = model(tokens, segments, padding)
        torch.testing.assert_close(out[1:2], model(tokens[1:2, :4], segments[1:2, :4]))

    def test_learns_a_masked_word(self):
        torch.manual_seed(0)
        model = models.BERTForMaskedLM(8, 16, 1, 2, 32, max_length=6, dropout=0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(100):
            tokens = torch.randint(2, 8, (32, 1)).expand(-1, 4).clone()  # four times the same word
            labels = torch.full_like(tokens, -100)
            labels[:, 2], tokens[:, 2] = tokens[:, 2], 1  # 1 stands for the mask
            loss = model.loss(tokens, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.25 * losses[0]

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda m: models.BERT(11, 10, 1, 4), ValueError, "hidden_size: .*num_heads=4, got 10"),
            (lambda m: m(torch.ones(2, 13).long()), ValueError, r"tokens: .*up to 12, got \[2, 13\]"),
            (lambda m: m(torch.ones(2, 3).long(), torch.zeros(2, 4).long()), ValueError, "segments: "),
            (lambda m: m(torch.ones(2, 3).long(), None, torch.zeros(2, 3)), TypeError, "padding_mask: .*torch.bool"),
            (lambda m: m.pooled(torch.ones(2, 3, 12)), RuntimeError, "pooler=False"),
        ],
    )
    def test_wrong_input(self, make, error, words):
        model = models.BERT(11, 12, 1, 3, 20, max_length=12, pooler=False)
        with pytest.raises(error, match=words):
            make(model)


class TestGPT:
    def build(self, **options):
        return models.GPT(11, 12, 2, 3, **{"max_length": 16, **options}).double().eval()

    def test_the_cache_changes_nothing(self):
        """Greedy decoding token by token, and reading everything anew for each token."""
        model, prompt = self.build(), torch.randint(11, (3, 5))
        torch.manual_seed(3)
        with torch.no_grad():
            model.transformer["wte"].weight.normal_()
        tokens = prompt
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        assert torch.equal(model.generate(prompt, 6), tokens[:, 5:])
        cache = model.new_cache(3, 11)
        torch.testing.assert_close(model.prefill(prompt, cache), model(prompt)[:, -1])
        for i in range(5, 11):
            torch.testing.assert_close(model.step(tokens[:, i], cache), model(tokens[:, : i + 1])[:, -1])

    def test_prompts_of_several_lengths(self):
        model, prompt, lengths = self.build(), torch.randint(11, (3, 7)), torch.tensor([3, 7, 1])
        together = model.generate(prompt, 5, lengths=lengths)
        for row, n in enumerate(lengths.tolist()):
            assert torch.equal(together[row : row + 1], model.generate(prompt[row : row + 1, :n], 5))

    def test_draws(self):
        model, prompt = self.build(), torch.randint(11, (2, 4))
        draw = [
            model.generate(prompt, 8, temperature=1.0, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        ]
        assert torch.equal(draw[0], draw[1])
        assert not torch.equal(draw[0], draw[2])
        greedy = model.generate(prompt, 8)
        assert torch.equal(model.generate(prompt, 8, temperature=2.0, top_k=1), greedy)
        assert torch.equal(model.generate(prompt, 8, temperature=1e-9), greedy)

    def test_generation_ends(self):
        model = self.build()
        model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))  # every token alike: 0 is the first
        assert model.generate(torch.tensor([[1], [2]]), 9, end_token=0).tolist() == [[0], [0]]
        assert model.generate(torch.tensor([[1], [2]]), 3).shape == (2, 3)

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda m, x: models.GPT(11, 10, 1, 4), ValueError, "embedding_dim: .*num_heads=4, got 10"),
            (lambda m, x: m(torch.ones(2, 17).long()), ValueError, r"tokens: .*1 to 16, got \[2, 17\]"),
            (lambda m, x: m.generate(x, 12), ValueError, "capacity: .*max_length=16, got 17"),
            (lambda m, x: m.generate(x, 2, lengths=torch.tensor([0, 5])), ValueError, r"lengths: .*\[0, 5\]"),
            (lambda m, x: m.generate(x, 2, temperature=-1.0), ValueError, "temperature: .*-1.0"),
            (lambda m, x: m.generate(x, 2, temperature=1.0, top_k=0), ValueError, "top_k: .*0"),
            (lambda m, x: m.generate(x, 0), ValueError, "max_new_tokens: .*0"),
            (lambda m, x: m.train().generate(x, 2), RuntimeError, "eval"),
        ],
    )
    def test_wrong_input(self, make, error, words):
        with pytest.raises(error, match=words):
            make(self.build(), torch.ones(2, 5).long())


class TestDeepSpeech:
    def build(self, **options):
        return models.DeepSpeech(5, 21, 8, 2, channels=(3, 4, 5), **options).double()

    @pytest.mark.parametrize("convolutions", [1, 2, 3])
    def test_lengths_give_what_each_sequence_gives_alone(self, convolutions):
        model = self.build(convolutions=convolutions).eval()
        x, lengths = speech_inputs()
        x = x.double()
        past = torch.arange(30) >= lengths[:, None]
        x[past] = float("nan")
        out, frames = model(x, lengths)
        for row, n in enumerate(lengths.tolist()):
            alone, count = model(x[row : row + 1, :n])
            assert count.tolist() == [frames[row]]
            torch.testing.assert_close(out[: frames[row], row : row + 1], alone)
        torch.testing.assert_close(out.exp().sum(-1), torch.ones_like(out[..., 0]))

    def test_learns_to_spell(self):
        torch.manual_seed(0)
        model = models.DeepSpeech(4, 48, 16, 1, convolutions=1, channels=(4,))
        sounds = torch.randn(4, 48)
        targets = torch.tensor([[1, 2, 3], [3, 1, 2], [2, 3, 1], [1, 3, 0]])
        target_lengths = torch.tensor([3, 3, 3, 2])
        x = sounds[targets].repeat_interleave(8, 1)  # 8 frames a letter
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss = model.loss(x, target_lengths * 8, targets, target_lengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.3
        assert model.eval().transcribe(x, target_lengths * 8) == [[1, 2, 3], [3, 1, 2], [2, 3, 1], [1, 3]]

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: models.DeepSpeech(1), "num_classes: .*1"),
            (lambda: models.DeepSpeech(5, convolutions=4), "convolutions: .*1 to 3.*4"),
            (lambda: models.DeepSpeech(5, 21, 4, 1)(torch.ones(2, 9, 20)), r"x: .*\[B, T, 21\], got \[2, 9, 20\]"),
            (
                lambda: models.DeepSpeech(5, 21, 4, 1)(torch.ones(2, 9, 21), torch.tensor([9, 10])),
                r"lengths: .*\[9, 10\]",
            ),
        ],
    )
    def test_wrong_input(self, make, words):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: models.ResNet(BasicBlock, (1, 1, 1, 1, 1)), "layers: .*1 to 4"),
        (lambda: models.VGG(("pool", 4)), "layers: .*channels first"),
        (lambda: models.GoogLeNet(third_kernel=4), "third_kernel: .*4"),
    ],
)
def test_wrong_networks(make, words):
    with pytest.raises(ValueError, match=words):
        make()
