"""How the public functions call operators: past the dispatcher where nobody watches, and once."""

import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import vlmfast
import vlmfast.functional as VF
from vlmfast.ops import common as ops


def flash(x, **options):
    return VF.scaled_dot_product_attention(x, x, x, **options)


def window(x, **options):
    return VF.shifted_window_attention(x, 1, (2, 2), (1, 0), **options)


PLAN = VF.cross_attention_plan(torch.tensor([[0, 1, 1, 2, 2]]), 2)


def cross(x, **options):
    images = x[:, :, :4].unflatten(2, (2, 2))
    return VF.image_cross_attention(x, images, images, PLAN, **options)


def loss(x, **options):
    return VF.clip_loss(x[0, 0], x[0, 1], 10.0, **options)


ATTENTION = [flash, window, cross]


def sample(dtype=torch.float32, requires_grad=False):
    return torch.randn(1, 2, 5, 24).to(dtype).requires_grad_(requires_grad)


@pytest.mark.parametrize("call", [*ATTENTION, loss])
@pytest.mark.parametrize("options", [{}, {"backend": "cpu"}])
def test_past_the_dispatcher_and_through_it(call, options, monkeypatch):
    x = sample(requires_grad=True)
    results = []
    for eager in (True, False):
        monkeypatch.setattr(ops, "is_eager", lambda eager=eager: eager)
        out = call(x, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.parametrize("call", [*ATTENTION, loss])
def test_an_operator_that_fails_is_called_once(call, monkeypatch):
    calls = []

    def fail(operator, *args):
        calls.append(operator)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops, "below_autograd", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        call(sample())
    assert len(calls) == 1


@pytest.mark.parametrize("call", ATTENTION)
def test_other_dtypes_and_backends(call):
    x = sample(torch.float64)
    assert_close(call(x), call(x, backend="reference"), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(sample()).dtype == torch.bfloat16
    with vlmfast.use_backend("reference"):
        assert "reference" in str(vlmfast.explain(call, sample()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", [*ATTENTION, loss])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:To copy construct")
def test_traced_models_can_be_saved(call, dtype):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(24, 24, dtype=dtype)

        def forward(self, x):
            return call(self.linear(x))

    model, x = Model(), sample(dtype)
    traced = torch.jit.trace(model, (x,))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_close(torch.jit.load(buffer)(x), model(x))


@pytest.mark.parametrize("call", ATTENTION)
def test_modes_see_the_call_as_it_is(call):
    x = sample(torch.float64)
    assert_close(make_fx(call)(x)(x), call(x))
    narrow = torch.zeros(1, 2, 5, 7)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError):
        VF.scaled_dot_product_attention(sample(), narrow, narrow)


@pytest.mark.parametrize("call", ATTENTION)
def test_a_mode_may_replace_the_operator(call):
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if isinstance(function, torch._ops.OpOverload):
                return 2.0 * args[0], args[0].sum()
            return function(*args, **(kwargs or {}))

    x = sample(requires_grad=True)
    with Doubled():
        out = call(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert_close(gradient, torch.full_like(x, 2.0))


@pytest.mark.parametrize("call", [*ATTENTION, loss])
def test_gradients_that_inference_mode_forbids(call):
    x = sample(requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        out = call(x)
    assert out.is_inference() and not out.requires_grad


@pytest.mark.parametrize("call", [*ATTENTION, loss])
def test_a_second_derivative_is_refused_however_it_is_taken(call):
    x = sample()
    first = torch.func.grad(lambda y: call(y).square().sum())
    assert first(x).abs().sum() > 0
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        torch.func.grad(lambda y: first(y).sum())(x)
    outer = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        torch.autograd.grad(first(outer).sum(), outer)


def test_errors_of_others_are_not_taken_for_refusals():
    def fails(tensor):
        raise RuntimeError("no room to save this")

    x = sample(requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(fails, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="no room"),
    ):
        flash(x)


def test_a_window_is_no_truncated_number():
    x = sample()
    for odd in (torch.tensor(2.7), torch.tensor([2.0]), 2.0):
        with pytest.raises(TypeError, match="window_size: expected an int"):
            VF.shifted_window_attention(x, 1, (odd, 2))
        with pytest.raises(TypeError, match="shift_size: expected an int"):
            VF.shifted_window_attention(x, 1, (4, 4), (odd, 2))


def test_a_plan_lies_where_the_query_does():
    x = sample()
    images = x[:, :, :4].unflatten(2, (2, 2))
    elsewhere = PLAN._replace(order=PLAN.order.to("meta"))
    with pytest.raises(ValueError, match=r"image_index\.order: expected the device of query"):
        VF.image_cross_attention(x, images, images, elsewhere)
    with pytest.raises(ValueError, match="expected a plan for 3 images, as key has, got 2"):
        VF.image_cross_attention(x, *[x[:, :, :3].unflatten(2, (3, 1))] * 2, PLAN)
    for wrong, message in (
        ((x, images, images[..., :0]), "value: expected a head dim of at least 1"),
        ((x, images, torch.tensor(1.0)), r"value: expected shape \(B, Hkv, I, L, D\)"),
        ((x, images[..., :4], images), "key: expected the head dim of query, 24"),
    ):
        with pytest.raises(ValueError, match=message):
            VF.image_cross_attention(*wrong, PLAN)
