"""How a model is compared with its plain PyTorch twin: one state_dict, equal outputs and gradients."""

import torch

import bigmodel_kernels as bmk

RTOL, ATOL = 1e-9, 1e-11  # of float64


def in_double(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def check_twins(ours, twin, inputs, *, training, backend):
    """Both in float64 with our weights: results and the gradient of every parameter agree."""
    ours, twin = ours.double(), twin.double()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    twin.load_state_dict(ours.state_dict())
    inputs = in_double(inputs)
    ours.train(training), twin.train(training)
    with bmk.use_backend(backend):
        out = first_tensor(ours(*inputs))
        expected = first_tensor(twin(*inputs))
        direction = torch.randn_like(expected)
        (out * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(out, expected, rtol=RTOL, atol=ATOL)
    twin_gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, twin_gradients[name], rtol=RTOL, atol=ATOL, msg=name)


def check_weights_move_back(ours, twin, inputs):
    ours, twin = ours.double().eval(), twin.double().eval()
    inputs = in_double(inputs)
    assert ours.load_state_dict(twin.state_dict()) == ours.load_state_dict(ours.state_dict())
    torch.testing.assert_close(first_tensor(ours(*inputs)), first_tensor(twin(*inputs)), rtol=RTOL, atol=ATOL)
