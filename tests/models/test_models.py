"""What the models do by themselves: masks, lengths, decoding, losses, wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
import bigmodel_models as models


def small_transformer(kind="tokens", **options):
    size = 11 if kind == "tokens" else 12
    return models.Transformer(size, 16, 32, 2, 4, 5, input_kind=kind, **{"dropout": 0.0, **options})


def small_seq2seq(**options):
    return models.Seq2SeqTransformer(11, 13, 16, 32, 2, 4, **{"dropout": 0.0, **options})


def padding(*lengths, total):
    return torch.arange(total) >= torch.tensor(lengths)[:, None]


class TestRNN:
    def test_lengths_give_what_each_sequence_gives_alone(self):
        model = models.RNN(4, 8, 2, 3).double()
        x = torch.randn(3, 7, 4, dtype=torch.float64)
        lengths = torch.tensor([3, 7, 1])
        out = model(x, lengths)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(out[row : row + 1], model(x[row : row + 1, :length]))


class TestTransformer:
    @pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
    @pytest.mark.parametrize("training", [True, False])
    def test_padding_changes_nothing(self, positions, training):
        model = small_transformer(positions=positions).double().train(training)
        x = torch.randint(11, (2, 9))
        mask = padding(5, 9, total=9)
        out = model(x, mask)
        torch.testing.assert_close(out[:1], model(x[:1, :5]))
        torch.testing.assert_close(out[1:], model(x[1:]))

    @pytest.mark.parametrize("training", [True, False])
    def test_nan_in_padding_does_not_leak(self, training):
        model = small_transformer("vectors").train(training)
        x = torch.randn(2, 6, 12)
        mask = padding(4, 6, total=6)
        clean = model(x, mask)
        x[mask] = float("nan")
        out = model(x, mask)
        torch.testing.assert_close(out, clean)
        out.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())

    def test_a_sequence_of_padding_alone_is_finite(self):
        model = small_transformer()
        out = model(torch.randint(11, (2, 6)), padding(0, 6, total=6))
        torch.testing.assert_close(out[0], model.fc.bias)
        out.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())

    def test_order_matters(self):
        model = small_transformer()
        x = torch.randint(11, (1, 8))
        x[0, 0], x[0, 7] = 1, 2
        assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-4)

    def test_sinusoidal_table(self):
        table = models.SinusoidalPositions(7, 5)(torch.zeros(1, 5, 7))[0]
        assert table[3, 0] == pytest.approx(math.sin(3), abs=1e-6)
        assert table[3, 1] == pytest.approx(math.cos(3), abs=1e-6)
        assert table[4, 6] == pytest.approx(math.sin(4 / 10000 ** (6 / 7)), abs=1e-6)
        assert not models.SinusoidalPositions(8, 5).state_dict()

    def test_heads_and_layers_are_what_their_names_say(self):
        model = models.Transformer(11, 12, 32, 5, 3, 2)
        assert len(model.encoder.layers) == 5
        assert model.encoder.layers[0].self_attn.num_heads == 3

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: models.Transformer(11, 10, 32, 2, 4, 5), ValueError, "embedding_dim: .*num_heads=4, got 10"),
            (lambda: small_transformer("word"), ValueError, "input_kind: .*'word'"),
            (lambda: small_transformer(positions="rotary"), ValueError, "positions: .*'rotary'"),
            (lambda: small_transformer()(torch.randn(2, 6)), TypeError, "x: .*torch.float32.*vectors"),
            (lambda: small_transformer("vectors")(torch.ones(2, 6, 12).long()), TypeError, "x: .*torch.int64"),
            (lambda: small_transformer("vectors")(torch.ones(2, 6, 11)), ValueError, r"x: .*\[2, 6, 11\]"),
            (lambda: small_transformer()(torch.ones(6).long()), ValueError, r"x: .*\[6\]"),
            (lambda: small_transformer(max_length=5)(torch.ones(1, 6).long()), ValueError, "length 6 .*max_length=5"),
            (
                lambda: small_transformer()(torch.ones(2, 6).long(), torch.zeros(2, 6)),
                TypeError,
                "padding_mask: .*torch.bool",
            ),
            (
                lambda: small_transformer()(torch.ones(2, 6).long(), torch.zeros(2, 5).bool()),
                ValueError,
                r"padding_mask: .*\[2, 6\], got \[2, 5\]",
            ),
        ],
    )
    def test_wrong_input(self, make, error, words):
        with pytest.raises(error, match=words):
            make()


class TestSeq2Seq:
    def test_no_position_sees_a_later_one(self):
        model = small_seq2seq().eval()
        source, target = torch.randint(11, (2, 6)), torch.randint(13, (2, 7))
        out = model(source, target)
        changed = target.clone()
        changed[:, 4:] = (changed[:, 4:] + 1) % 13
        again = model(source, changed)
        torch.testing.assert_close(again[:, :4], out[:, :4])
        assert not torch.allclose(again[:, 4:], out[:, 4:], atol=1e-4)

    def test_the_decoder_reads_the_source(self):
        model = small_seq2seq().eval()
        source, target = torch.randint(11, (2, 6)), torch.randint(13, (2, 7))
        assert not torch.allclose(model(source, target), model((source + 1) % 11, target), atol=1e-4)

    def test_source_and_target_padding_change_nothing(self):
        model = small_seq2seq().double()
        source, target = torch.randint(11, (2, 8)), torch.randint(13, (2, 7))
        out = model(source, target, padding(5, 8, total=8), padding(4, 7, total=7))
        torch.testing.assert_close(out[:1, :4], model(source[:1, :5], target[:1, :4]))
        torch.testing.assert_close(out[1:], model(source[1:], target[1:]))

    def test_learns_to_reverse(self):
        model = small_seq2seq(norm_first=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        start, losses = 12, []
        for _ in range(150):
            source = torch.randint(11, (32, 4))
            target = source.flip(1)
            shifted = torch.cat([torch.full((32, 1), start), target[:, :-1]], dim=1)
            loss = F.cross_entropy(model(source, shifted).flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
        model.eval()
        source = torch.randint(11, (32, 4))
        generated = model.generate(source, start, 4)
        assert generated.shape == (32, 5)
        assert (generated[:, 1:] == source.flip(1)).double().mean() > 0.9

    def test_generation_ends(self):
        model = small_seq2seq().eval()
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.zero_()
            model.fc.bias[7] = 1.0
        assert model.generate(torch.randint(11, (2, 6)), 12, 9, end_token=7).tolist() == [[12, 7], [12, 7]]
        assert model.generate(torch.randint(11, (2, 6)), 12, 3).shape == (2, 4)


class TestAdditiveAttention:
    def build(self):
        return models.AdditiveAttention(5, 6, 8).double()

    def inputs(self):
        return (torch.randn(2, size, width, dtype=torch.float64) for size, width in ((3, 5), (4, 6), (4, 7)))

    def test_is_the_formula(self):
        attention = self.build()
        query, key, value = self.inputs()
        out, weights = attention(query, key, value)
        w_q, w_k, v = attention.W_q.weight, attention.W_k.weight, attention.v.weight[0]
        for b in range(2):
            for i in range(3):
                scores = torch.stack([v @ torch.tanh(w_q @ query[b, i] + w_k @ key[b, j]) for j in range(4)])
                expected = torch.softmax(scores, dim=0)
                torch.testing.assert_close(weights[b, i], expected)
                torch.testing.assert_close(out[b, i], expected @ value[b])

    @pytest.mark.parametrize("per_query", [False, True])
    def test_masked_keys_take_no_part(self, per_query):
        attention = self.build()
        query, key, value = self.inputs()
        mask = padding(2, 4, total=4)
        out, weights = attention(query, key, value, mask[:, None].expand(2, 3, 4) if per_query else mask)
        alone, _ = attention(query[:1], key[:1, :2], value[:1, :2])
        torch.testing.assert_close(out[:1], alone)
        assert bool((weights[0, :, 2:] == 0).all())

    def test_a_fully_masked_row_is_zero_and_passes_no_gradient(self):
        attention = self.build()
        query, key, value = (x.requires_grad_() for x in self.inputs())
        mask = torch.zeros(2, 3, 4, dtype=torch.bool)
        mask[0, 1] = True
        out, weights = attention(query, key, value, mask)
        assert bool((out[0, 1] == 0).all() and (weights[0, 1] == 0).all())
        out[0, 1].sum().backward()
        assert bool((query.grad == 0).all() and (key.grad == 0).all() and (value.grad == 0).all())

    def test_nan_in_padding_does_not_leak(self):
        attention = self.build()
        query, key, value = self.inputs()
        mask = padding(0, 2, total=4)
        clean, _ = attention(query, key, value, mask)
        key[mask], value[mask] = float("nan"), float("inf")
        query.requires_grad_()
        out, _ = attention(query, key, value, mask)
        torch.testing.assert_close(out, clean)
        assert bool((out[0] == 0).all())
        out.sum().backward()
        assert bool(query.grad.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in attention.parameters())

    def test_gradients(self):
        attention = self.build()
        query, key, value = (x.requires_grad_() for x in self.inputs())
        mask = padding(0, 3, total=4)
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, mask)[0], (query, key, value))

    @pytest.mark.parametrize(
        ("mask", "error", "words"),
        [
            (torch.zeros(2, 4), TypeError, "padding_mask: .*bool"),
            (torch.zeros(2, 3).bool(), ValueError, r"padding_mask: .*\[2, 4\] or \[2, 3, 4\]"),
        ],
    )
    def test_wrong_mask(self, mask, error, words):
        with pytest.raises(error, match=words):
            self.build()(*self.inputs(), mask)

    def test_wrong_shapes(self):
        query, key, value = self.inputs()
        with pytest.raises(ValueError, match="value: expected 4 positions"):
            self.build()(query, key, value[:, :3])
        with pytest.raises(ValueError, match=r"key: .*batch"):
            self.build()(query, key[:1], value)


@pytest.mark.parametrize("kind", ["dense", "conv"])
class TestGAN:
    def test_each_loss_reaches_its_own_network(self, kind):
        gan = models.GAN(kind)
        gan.discriminator_loss(torch.rand(8, 1, 28, 28) * 2 - 1, gan.sample_noise(8)).backward()
        assert all(p.grad is None for p in gan.generator.parameters())
        assert all(bool((p.grad != 0).any()) for p in gan.discriminator.parameters())
        gan.generator_loss(gan.sample_noise(8)).backward()
        assert all(bool(p.grad.isfinite().all()) for p in gan.generator.parameters())
        # the bias before a batch norm apart, every parameter of the generator moves
        assert all(bool((p.grad != 0).any()) for p in gan.generator.parameters())

    def test_losses_are_those_of_the_logits(self, kind):
        gan = models.GAN(kind).eval()
        real, z = torch.rand(8, 1, 28, 28), gan.sample_noise(8)
        real_logit, fake_logit = gan.discriminator(real), gan.discriminator(gan(z))
        expected = F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
        torch.testing.assert_close(gan.discriminator_loss(real, z), expected)
        torch.testing.assert_close(gan.generator_loss(z), F.softplus(-fake_logit).mean())

    def test_the_discriminator_learns(self, kind):
        gan = models.GAN(kind)
        optimizer = torch.optim.Adam(gan.discriminator.parameters(), lr=1e-3)
        real, losses = (torch.rand(16, 1, 28, 28) > 0.5).float() * 2 - 1, []
        for _ in range(15):
            loss = gan.discriminator_loss(real, gan.sample_noise(16))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]


def test_wrong_models():
    with pytest.raises(ValueError, match=r"kind: .*'deep'"):
        models.GAN("deep")
    with pytest.raises(ValueError, match="layer_sizes"):
        models.BigModel([5])
    with pytest.raises(ValueError, match=r"x: .*\[2, 1, 27, 28\]"):
        models.CNN()(torch.rand(2, 1, 27, 28))


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (models.CNN, torch.rand(2, 1, 28, 28)),
        (lambda: models.RNN(4, 8, 2, 3), torch.rand(2, 5, 4)),
        (lambda: small_transformer("vectors"), torch.rand(2, 5, 12)),
    ],
    ids=["cnn", "rnn", "transformer"],
)
def test_every_model_runs_its_op(build, x):
    """The models are built of this library's ops: on the default backend and on PyTorch's own they agree."""
    model = build()
    calls = bmk.explain(model, x).calls
    assert calls, "no op of bigmodel_kernels was called"
    with bmk.use_backend("torch"):
        expected = model(x)
        assert {call.backend for call in bmk.explain(model, x).calls} == {"torch"}
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
