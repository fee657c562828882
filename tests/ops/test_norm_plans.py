"""A normalisation of sizes seen before gives what PyTorch's does, whatever has changed since the first call."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.norm.op import PLANS

KINDS = ["layer_norm", "rms_norm"]
ROWS = {"small": (6, 40), "three": (2, 3, 40), "one": (40,), "large": (512, 512)}


def stock(kind, x, weight=None, bias=None, residual=None, eps=1e-5):
    h = x if residual is None else x + residual
    columns = x.shape[-1:]
    y = F.layer_norm(h, columns, weight, bias, eps) if kind == "layer_norm" else F.rms_norm(h, columns, weight, eps)
    return y if residual is None else (y, h)


def ours(kind, x, weight=None, bias=None, residual=None, eps=1e-5, **options):
    if kind == "rms_norm":
        return bmk.rms_norm(x, weight, residual=residual, eps=eps, **options)
    return bmk.layer_norm(x, weight, bias, residual=residual, eps=eps, **options)


def tensors(kind, shape, dtype=torch.float32, residual=False, learns=False):
    torch.manual_seed(0)
    made = [torch.randn(shape), torch.randn(shape[-1]) + 1]
    made.append(torch.randn(shape[-1]) if kind == "layer_norm" else None)
    made.append(torch.randn(shape) if residual else None)
    return [None if t is None else t.to(dtype).requires_grad_(learns) for t in made]


def same(a, b, **options):
    for one, other in zip(*(t if isinstance(t, tuple) else (t,) for t in (a, b)), strict=True):
        bound = 3e-2 if one.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, **options)


def known(kind, *args, **options):
    """The call is made twice, so that it has a plan from then on."""
    PLANS._plans.clear()
    for _ in range(2):
        ours(kind, *args, **options)
    assert len(PLANS._plans) == 1


def check_gradients(kind, leaves):
    """Of every result that has one, with respect to every leaf that has one."""
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    with_residual = leaves[3] is not None and (leaves[0].requires_grad or leaves[3].requires_grad)
    found = []
    for function in (ours, stock):
        results = function(kind, *leaves)
        results = results[: 1 + with_residual] if isinstance(results, tuple) else (results,)
        upstream = [torch.full_like(r, 0.5).cumsum(-1).cos() for r in results]
        found.append((*results, *torch.autograd.grad(results, wanted, upstream)))
    same(found[0], found[1])


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_call_gives_what_the_first_gave(kind, rows, dtype, learns, residual):
    args = tensors(kind, ROWS[rows], dtype, residual, learns)
    PLANS._plans.clear()
    first = ours(kind, *args)
    (plan,) = PLANS._plans.values()
    again = ours(kind, *args)
    assert list(PLANS._plans.values()) == [plan]
    for a, b in zip(*(t if residual else (t,) for t in (first, again)), strict=True):
        assert torch.equal(a, b)
        assert (a.stride(), a.dtype, a.requires_grad) == (b.stride(), b.dtype, learns)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_come_and_go(kind, rows, residual):
    """Grad mode and requires_grad change between calls of the same sizes, in every order."""
    plain, learning = (tensors(kind, ROWS[rows], residual=residual, learns=learns) for learns in (False, True))
    only_weight, only_x = ([*plain], [*plain])
    only_weight[1], only_x[0] = learning[1], learning[0]
    for first in (plain, learning, only_weight, only_x):
        PLANS._plans.clear()
        for _ in range(2):
            ours(kind, *first)
        with torch.no_grad():
            same(ours(kind, *learning), stock(kind, *learning))
        same(ours(kind, *plain), stock(kind, *plain))
        for leaves in (learning, only_weight, only_x):
            check_gradients(kind, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_may_change(kind):
    for shape in ((6, 40), (2, 3, 40)):
        x, weight, bias, residual = tensors(kind, shape, residual=True)
        known(kind, x, weight, bias)
        apart = torch.empty(*shape[:-1], 80)[..., ::2].copy_(x)
        across = x.mT.contiguous().mT
        wide = torch.empty(*shape[:-1], 50)[..., :40].copy_(x)
        strided = torch.empty(80)[::2].copy_(weight)
        for again in (apart, across, wide, x[:1].expand_as(x)):
            same(ours(kind, again, strided, bias), stock(kind, again, weight, bias))
            same(ours(kind, again, weight, bias, residual), stock(kind, again, weight, bias, residual))
            same(ours(kind, x, weight, bias, again), stock(kind, x, weight, bias, again))


@pytest.mark.parametrize("kind", KINDS)
def test_other_tensors_are_checked_again(kind):
    x, weight, bias, residual = tensors(kind, (6, 40), residual=True)
    known(kind, x, weight, bias, residual)
    known(kind, x, weight, bias)
    for wrong, message in (
        ((x, weight[:39]), r"weight must have shape \[40\], got \[39\]"),
        ((x, weight.expand(1, 40)), r"weight must have shape \[40\], got \[1, 40\]"),
        ((x, weight.double()), "weight must be torch.float32"),
        ((x, weight.to("meta")), "on cpu as x is, got torch.float32 on meta"),
        ((x.double(), weight), "weight must be torch.float64"),
        ((x, weight, bias, residual[0]), "residual must have shape"),
        ((x, weight, bias, residual.bfloat16()), "residual must be torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ours(kind, *wrong)
    for eps, error in ((True, TypeError), ("1", TypeError), (-1.0, ValueError), ([1], TypeError)):
        with pytest.raises(error, match="eps"):
            ours(kind, x, weight, bias, eps=eps)
    same(ours(kind, x, weight, bias, eps=1), stock(kind, x, weight, bias, eps=1.0))
    for again in (torch.cat((x, x)), x[:, :30], x.view(2, 3, 40)):
        columns = again.shape[-1]
        bias_of = None if bias is None else bias[:columns]
        same(ours(kind, again, weight[:columns], bias_of), stock(kind, again, weight[:columns], bias_of))


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_backend_is_heard(kind):
    x, weight, bias, _ = tensors(kind, (6, 40))
    known(kind, x, weight, bias)
    function = getattr(bmk, kind)
    for name in ("torch", "cpu"):
        with bmk.use_backend(name):
            assert bmk.explain(function, x, weight).backend == name
            same(ours(kind, x, weight, bias), stock(kind, x, weight, bias))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"), bmk.use_backend("cuda"):
        ours(kind, x, weight, bias)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
        ours(kind, x, weight, bias, backend="cuda")
    assert [call.op for call in bmk.explain(lambda: ours(kind, x, weight, bias)).calls] == ["norm"]


@pytest.mark.parametrize("rows", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind, rows):
    for dtype in (torch.float32, torch.bfloat16):
        args = tensors(kind, ROWS[rows], dtype)
        known(kind, *args)
        with torch.autocast("cpu", torch.bfloat16):
            same(ours(kind, *args), stock(kind, *args))
            PLANS._plans.clear()
            ours(kind, *args)
        same(ours(kind, *args), stock(kind, *args))


@pytest.mark.parametrize("rows", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind, rows):
    """vmap, grad, jvp and forward mode, where the call was known before and where it is known from within."""
    x, weight, bias, _ = tensors(kind, ROWS[rows])

    def transformed(function):
        def of_rows(x):
            return function(kind, x, weight, bias)

        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(of_rows(forward_ad.make_dual(x, x.cos())))
            forward = dual.primal.clone(), dual.tangent.clone()
        vmapped = torch.func.vmap(of_rows)(torch.stack((x, 2 * x)))
        gradient = torch.func.grad(lambda x: of_rows(x).cos().sum())(x)
        return vmapped, gradient, *torch.func.jvp(of_rows, (x,), (x.cos(),)), *forward, of_rows(x)

    for before in (True, False):
        PLANS._plans.clear()
        if before:
            known(kind, x, weight, bias)
        same(transformed(ours), transformed(stock))


class Marked(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_classes(kind):
    x, weight, bias, _ = tensors(kind, (6, 40))
    known(kind, x, weight, bias)
    for args in ((x.as_subclass(Marked), weight, bias), (x, weight.as_subclass(Marked), bias)):
        y = ours(kind, *args)
        assert type(y) is Marked
        same(y.as_subclass(torch.Tensor), stock(kind, x, weight, bias))
    parameter = torch.nn.Parameter(weight)
    same(ours(kind, x, parameter, bias), stock(kind, x, parameter, bias))
    nested = torch.nested.nested_tensor([x, x[:2]])
    with pytest.raises(RuntimeError):
        ours(kind, nested)


@pytest.mark.parametrize("rows", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_made_in_inference_mode(kind, rows):
    args = tensors(kind, ROWS[rows], learns=True)
    known(kind, *args)
    with torch.inference_mode():
        x = torch.randn(ROWS[rows])
        y = ours(kind, x, *args[1:])
        assert y.is_inference()
        same(y, stock(kind, x, *args[1:]))
    outcomes = []
    for function in (ours, stock):  # autograd saves no such tensor
        try:
            outcomes.append(function(kind, x, *args[1:]).sum().backward())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("rows", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_nans_stay_in_their_rows(kind, rows):
    x, weight, bias, _ = tensors(kind, ROWS[rows])
    known(kind, x, weight, bias)
    x[3, 5], x[1, 0] = float("nan"), float("inf")
    y = ours(kind, x, weight, bias)
    same(y, stock(kind, x, weight, bias), equal_nan=True)
    assert y[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_results_may_be_written_into(kind):
    """They are no views, and a backward that does not read them does not mind."""
    for shape in ((6, 40), (2, 3, 40)):
        x, weight, bias, _ = tensors(kind, shape, learns=True)
        found = []
        for function in (ours, ours, stock):
            y = function(kind, x, weight, bias)
            y.mul_(2)
            found.append(torch.autograd.grad(y.cos().sum(), x))
        same(found[1], found[2])


def test_a_layer_keeps_to_its_shape():
    """A layer without weights whose rows are of another shape than those of a known call."""
    x = torch.randn(2, 3, 40)
    rows, planes = bmk.nn.RMSNorm(40, elementwise_affine=False), bmk.nn.RMSNorm((3, 40), elementwise_affine=False)
    for layer, shape in ((rows, (40,)), (planes, (3, 40)), (rows, (40,)), (planes, (3, 40))):
        torch.testing.assert_close(layer(x), F.rms_norm(x, shape))
    layer = bmk.nn.RMSNorm(40)
    for _ in range(2):
        layer(x)
    layer.weight = torch.nn.Parameter(torch.randn(40).bfloat16())
    torch.testing.assert_close(layer(x), F.rms_norm(x, (40,), layer.weight))
    layer.weight = torch.nn.Parameter(torch.randn(39))
    with pytest.raises(RuntimeError, match="weight"):
        layer(x)
    layer.normalized_shape = [39]
    with pytest.raises(RuntimeError, match="39"):
        layer(x)
