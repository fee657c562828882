"""Each model against its plain PyTorch twin: the same state_dict, outputs and gradients."""

import pytest
import torch

import bigmodel_models as models
from tests.models import architecture_twins, textbook_twins
from tests.models.textbook_twins import image
from tests.models.twins import check_twins, check_weights_move_back

CASES = textbook_twins.CASES | architecture_twins.CASES


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


@pytest.mark.parametrize("build", [models.Autoencoder, models.Generator, models.Discriminator])
def test_dense_models_give_the_documented_shapes(build):
    model = build()
    if build is models.Generator:
        out = model(torch.randn(5, 64))
    else:
        out = model(image(5))
    assert out.shape == ((5,) if build is models.Discriminator else (5, 1, 28, 28))
    if build is models.Autoencoder:
        assert bool((out > 0).all() and (out < 1).all())
        assert model.encode(image(5)).shape == (5, 32)


def test_dtype_of_the_input_is_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert models.CNN().to(dtype)(image().to(dtype)).dtype == dtype
        assert models.RNN(4, 8, 1, 3).to(dtype)(torch.randn(2, 5, 4, dtype=dtype)).dtype == dtype
