"""vlmfast.nn.ShiftedWindowAttention and V2 against torchvision's."""

import copy
import gc
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import vlmfast
import vlmfast.nn as vnn
from tools.models import assert_as_right_as, assert_same_in_float64, spy_on_windows, stir
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.parts import common, window_attention

import_torchvision()
from torchvision.models import swin_transformer as torchvision_swin  # noqa: E402

DIM, HEADS, BATCH = 32, 4, 2
OURS = {"v1": vnn.ShiftedWindowAttention, "v2": vnn.ShiftedWindowAttentionV2}
THEIRS = {
    "v1": torchvision_swin.ShiftedWindowAttention,
    "v2": torchvision_swin.ShiftedWindowAttentionV2,
}


@pytest.fixture(params=OURS)
def version(request):
    return request.param


def make_pair(version, window=(4, 4), shift=(2, 2), **arguments):
    """Ours and the original, with the same weights, none of them zero."""
    theirs = stir(THEIRS[version](DIM, list(window), list(shift), HEADS, **arguments))
    ours = OURS[version](DIM, window, shift, HEADS, **arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def maps(height, width, dim=DIM, batch=BATCH):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(batch, height, width, dim, generator=generator)}

    return make


# window, shift, map
SHAPES = {
    "whole windows": ((4, 4), (2, 2), (8, 12)),
    "no shift": ((4, 4), (0, 0), (8, 12)),
    "padded": ((4, 4), (2, 2), (9, 7)),
    "padded, no shift": ((7, 7), (0, 0), (10, 8)),
    "shift of one axis": ((4, 4), (0, 3), (8, 10)),
    "rectangular": ((3, 5), (1, 2), (7, 11)),
    "one window": ((7, 7), (3, 3), (7, 7)),
    "one window in height": ((4, 4), (2, 2), (4, 9)),
    "window beyond the map": ((7, 7), (3, 3), (5, 3)),
    "window beyond the width": ((4, 4), (2, 2), (9, 3)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_outputs_and_gradients(version, shape):
    window, shift, size = SHAPES[shape]
    ours, theirs = make_pair(version, window, shift)
    assert_same_in_float64(ours, theirs, maps(*size)(0))


@pytest.mark.parametrize("biases", [{"qkv_bias": False}, {"proj_bias": False}], ids=str)
def test_without_biases(version, biases):
    ours, theirs = make_pair(version, **biases)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_in_float64(ours, theirs, maps(9, 7)(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["whole windows", "rectangular"])
def test_budget(version, shape, dtype):
    window, shift, size = SHAPES[shape]
    ours, theirs = (layer.to(dtype) for layer in make_pair(version, window, shift))
    assert_as_right_as(ours, theirs, maps(*size))


def test_autocast(version):
    def call(layer, inputs):
        if inputs["x"].dtype == torch.float64:
            return layer(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(**inputs).float()

    ours, theirs = make_pair(version)
    inputs = maps(9, 7)(0)
    assert ours(**inputs).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(**inputs).dtype == theirs(**inputs).dtype == torch.bfloat16
    assert_as_right_as(ours, theirs, maps(9, 7), call)


@pytest.mark.parametrize("arguments", [{}, {"qkv_bias": False, "proj_bias": False}], ids=str)
def test_same_layer_from_the_same_seed(version, arguments):
    states = []
    for cls in (OURS[version], THEIRS[version]):
        torch.manual_seed(3)
        states.append(cls(DIM, [4, 5], [2, 1], HEADS, **arguments).state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def test_checkpoints_load_in_both_directions(version):
    ours, theirs = make_pair(version)
    back = THEIRS[version](DIM, [4, 4], [2, 2], HEADS)
    back.load_state_dict(ours.state_dict(), strict=True)
    x = maps(8, 8)(0)["x"]
    assert torch.equal(back(x), theirs(x))


def test_position_bias_as_torchvision_gives_it(version):
    ours, theirs = make_pair(version, (3, 4), (1, 2))
    expected = theirs.get_relative_position_bias()
    torch.testing.assert_close(ours.get_relative_position_bias(), expected)


def test_table_and_its_gradient():
    index = window_attention.relative_position_index((3, 4))
    table = torch.randn(5 * 7, HEADS, dtype=torch.float64, requires_grad=True)
    expected = table[index].view(12, 12, HEADS).permute(2, 0, 1)
    weights = torch.randn_like(expected)
    (by_indexing,) = torch.autograd.grad((expected * weights).sum(), table)
    result = window_attention.bias_from_table(table, index)
    (gradient,) = torch.autograd.grad((result * weights).sum(), table)
    assert torch.equal(result, expected)
    torch.testing.assert_close(gradient, by_indexing)


def test_gradients_repeat_bitwise(version):
    ours, _ = make_pair(version, (7, 7), (3, 3))
    x = maps(21, 16)(0)["x"]

    def gradients():
        ours.zero_grad()
        ours(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters()}

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.set_num_threads(threads)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_window_one_token_wide_is_no_nan():
    layer = vnn.ShiftedWindowAttentionV2(DIM, [1, 4], [0, 2], HEADS)
    assert layer(torch.randn(1, 3, 8, DIM)).isfinite().all()


def test_key_bias_of_v2_is_zero():
    ours, theirs = make_pair("v2")
    x = maps(8, 8)(0)["x"]
    for layer in (ours, theirs):
        layer(x).sum().backward()
    assert not ours.qkv.bias.grad[DIM : 2 * DIM].any()
    before = ours(x)
    with torch.no_grad():
        ours.qkv.bias[DIM : 2 * DIM] += 5
    assert torch.equal(ours(x), before)


def test_dropout_applies_in_training_only(version, monkeypatch):
    calls = spy_on_windows(monkeypatch)
    layer, theirs = make_pair(version, attention_dropout=0.25, dropout=0.5)
    x = maps(8, 8)(0)["x"]
    dropped = layer(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    layer.eval()
    theirs.eval()
    torch.testing.assert_close(layer(x), theirs(x))
    assert [call.arguments["dropout_p"] for call in calls] == [0.25, 0.0]


def test_attention_dropout_keeps_the_mean(version):
    layer, _ = make_pair(version, attention_dropout=0.3)
    x = maps(4, 4, batch=1)(0)["x"]
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(400)])
        deviation = draws.std(0) / len(draws) ** 0.5
        expected = layer.eval()(x)
    score = (draws.mean(0) - expected) / deviation
    assert score.abs().max() < 5 and 0.8 < score.std() < 1.2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(version, dynamic):
    torch._dynamo.reset()
    layer, _ = make_pair(version)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in ((8, 8), (9, 7)):
        x = maps(*size)(0)["x"]
        torch.testing.assert_close(compiled(x), layer(x))
        layer.zero_grad()
        compiled(x).square().sum().backward()
        result = {name: p.grad for name, p in layer.named_parameters()}
        layer.zero_grad()
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(result[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_forced_backend(version, monkeypatch):
    calls = spy_on_windows(monkeypatch)
    layer, _ = make_pair(version)
    layer.backend = "reference"
    layer(maps(8, 8)(0)["x"])
    assert [call.backend for call in calls] == ["reference"]
    layer.backend = "abacus"
    with pytest.raises(ValueError, match="abacus"):
        layer(maps(8, 8)(0)["x"])


def test_empty_batch(version):
    layer, _ = make_pair(version)
    x = torch.zeros(0, 8, 8, DIM, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert not layer.proj.weight.grad.any()


def test_needs_no_torchvision():
    program = (
        "import sys\n"
        "sys.modules['torchvision'] = None\n"
        "import torch, vlmfast.nn as vnn\n"
        "for cls in (vnn.ShiftedWindowAttention, vnn.ShiftedWindowAttentionV2):\n"
        "    assert cls(16, [4, 4], [2, 2], 2)(torch.randn(1, 6, 5, 16)).shape == (1, 6, 5, 16)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class NetworkRuns:
    """Counts how often the bias network of a layer runs, and on how many rows."""

    def __init__(self, monkeypatch):
        self.rows: list[int] = []
        original = nn.ReLU.forward

        def counted(relu, x):
            self.rows.append(x.shape[:-1].numel())
            return original(relu, x)

        monkeypatch.setattr(nn.ReLU, "forward", counted)

    def __len__(self):
        return len(self.rows)


@pytest.fixture
def runs(monkeypatch):
    return NetworkRuns(monkeypatch)


@pytest.fixture
def layer():
    return make_pair("v2", (3, 4), (1, 2))[0].eval()


@pytest.fixture
def x():
    return maps(6, 8)(0)["x"]


def test_network_runs_once_for_each_offset(runs, layer, x):
    layer(x)
    assert runs.rows == [5 * 7]


def test_network_runs_each_time_where_gradients_are_needed(runs, layer, x):
    for _ in range(2):
        layer(x).sum().backward()
    assert len(runs) == 2
    assert layer.cpb_mlp[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_network_runs_once_without_gradients(runs, layer, x, context, training):
    layer.train(training)
    with context():
        first = layer(x)
        for _ in range(3):
            assert torch.equal(layer(x), first)
    assert len(runs) == 1


@torch.no_grad()
def test_network_with_dropout_runs_each_time_in_training(runs, layer, x):
    layer.cpb_mlp.insert(2, nn.Dropout(0.5))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    assert len(runs) == 2
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert len(runs) == 3


def test_network_runs_once_where_it_is_frozen(runs, layer, x):
    for parameter in layer.cpb_mlp.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    for _ in range(2):
        layer(x).sum().backward()
    assert len(runs) == 1
    assert layer.qkv.weight.grad.abs().sum() > 0


def test_weights_made_in_inference_mode(runs, x):
    with torch.inference_mode():
        layer = make_pair("v2", (3, 4), (1, 2))[0].eval()
        expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert len(runs) == 1


def in_place(layer):
    with torch.no_grad():
        layer.cpb_mlp[0].weight.mul_(1.5)


def through_data(layer):
    layer.cpb_mlp[2].weight.data.mul_(1.5)


def through_numpy(layer):
    layer.cpb_mlp[0].bias.detach().numpy()[:] += 0.5


def by_new_data(layer):
    layer.cpb_mlp[2].weight.data = layer.cpb_mlp[2].weight.data * 2


def by_new_parameter(layer):
    layer.cpb_mlp[2].weight = nn.Parameter(2 * layer.cpb_mlp[2].weight.detach())


def by_state_dict(layer):
    layer.load_state_dict(make_pair("v2", (3, 4), (1, 2))[0].state_dict())
    layer.load_state_dict({k: v * 2 if "cpb" in k else v for k, v in layer.state_dict().items()})


def by_optimiser(layer):
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(maps(6, 8)(0)["x"]).square().sum().backward()
    optimiser.step()


def by_coordinates(layer):
    layer.relative_coords_table.mul_(0.5)


def by_another_network(layer):
    layer.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, HEADS, bias=False))


def by_another_activation(layer):
    layer.cpb_mlp[1] = nn.Identity()


def by_an_activation_in_two_places(layer):
    layer.cpb_mlp.append(layer.cpb_mlp[1])


def by_dtype(layer):
    layer.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        through_data,
        through_numpy,
        by_new_data,
        by_new_parameter,
        by_state_dict,
        by_optimiser,
        by_coordinates,
        by_another_network,
        by_another_activation,
        by_an_activation_in_two_places,
        by_dtype,
    ],
)
def test_a_change_of_the_network_is_seen(layer, x, change):
    with torch.no_grad():
        before = layer.get_relative_position_bias()
    change(layer)
    with torch.no_grad():
        after = layer.get_relative_position_bias()
    # With gradients, nothing is kept.
    assert torch.equal(after, layer.get_relative_position_bias().detach())
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_kept_bias_is_not_that_of_another_autocast(layer):
    with torch.no_grad():
        plain = layer.get_relative_position_bias()
        with torch.autocast("cpu", torch.bfloat16):
            half = layer.get_relative_position_bias()
        with torch.autocast("cpu", torch.float16):
            other = layer.get_relative_position_bias()
        assert torch.equal(layer.get_relative_position_bias(), plain)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert (plain.dtype, half.dtype, other.dtype) == dtypes


def test_another_weight_by_functional_call(layer, x):
    twice = {name: 2 * p.detach() for name, p in layer.named_parameters() if "cpb" in name}
    with torch.no_grad():
        before = layer(x)
        other = torch.func.functional_call(layer, twice, (x,))
        again = layer(x)
    layer.load_state_dict({**layer.state_dict(), **twice})
    assert torch.equal(before, again) and not torch.equal(before, other)
    assert torch.equal(other, layer(x).detach())


@torch.no_grad()
def test_vmap_over_networks(layer):
    stacked = {
        f"cpb_mlp.{name}": torch.stack([p, 2 * p]) for name, p in layer.cpb_mlp.named_parameters()
    }
    layer.get_relative_position_bias()

    def bias(weights):
        class Bias(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self):
                return self.layer.get_relative_position_bias()

        named = {f"layer.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(Bias(), named, ())

    both = torch.func.vmap(bias)(stacked)
    assert torch.equal(both[0], layer.get_relative_position_bias())
    assert not torch.equal(both[0], both[1])


def test_hooks_on_the_network_are_called_each_time(layer, x):
    seen = []
    with torch.no_grad():
        layer(x)
        layer.cpb_mlp[0].register_forward_hook(lambda *_: seen.append(0))
        for _ in range(2):
            layer(x)
    assert len(seen) == 2


@torch.no_grad()
def test_a_network_of_another_class_runs_each_time(layer):
    """It may be a function of more than its weights."""

    class Scaled(nn.Sequential):
        factor = 1.0

        def forward(self, x):
            return self.factor * super().forward(x)

    layer.cpb_mlp.__class__ = Scaled
    before = layer.get_relative_position_bias()
    layer.cpb_mlp.factor = 2.0
    assert not torch.equal(layer.get_relative_position_bias(), before)


def test_copies_do_not_carry_what_is_kept(runs, layer, x):
    with torch.no_grad():
        expected = layer(x)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again):
            assert torch.equal(other(x), expected)
            through_data(other)
            assert not torch.equal(other(x), expected)
            assert torch.equal(layer(x), expected)
    fresh = io.BytesIO()
    torch.save(make_pair("v2", (3, 4), (1, 2))[0], fresh)
    assert abs(len(fresh.getvalue()) - len(buffer.getvalue())) < 512


def test_what_is_kept_goes_with_its_layer(x):
    layer, _ = make_pair("v2", (3, 4), (1, 2))
    gc.collect()
    count = len(common._kept)
    with torch.no_grad():
        layer(x)
    assert len(common._kept) == count + 1
    del layer
    gc.collect()
    assert len(common._kept) == count


def test_compiled_layer_sees_new_weights(layer, x):
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for change in (lambda layer: None, in_place, through_data):
            change(layer)
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_layer_sees_new_weights(layer, x):
    with torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        before = traced(x)
        in_place(layer)  # they share their parameters
        torch.testing.assert_close(traced(x), layer(x))
        assert not torch.allclose(traced(x), before)


def test_nan_in_the_network_shows(layer, x):
    with torch.no_grad():
        layer(x)
        layer.cpb_mlp[0].bias.fill_(float("nan"))
        assert layer(x).isnan().all() and layer(x).isnan().all()
        layer.cpb_mlp[0].bias.zero_()
        assert layer(x).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 30}, ValueError, "num_heads: expected a number that divides dim, 30, got 4"),
        ({"dim": 0}, ValueError, "dim: expected at least 1, got 0"),
        ({"dim": 32.0}, TypeError, "dim: expected an int, got float"),
        ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
        ({"window_size": 7}, TypeError, "window_size: expected a list of two ints, got int"),
        ({"window_size": [7]}, ValueError, r"window_size: expected two ints, got \[7\]"),
        ({"window_size": [7, 3.5]}, TypeError, "window_size: expected an int, got float"),
        ({"window_size": [0, 4]}, ValueError, "window_size: expected at least 1 token"),
        ({"window_size": [-4, 4]}, ValueError, "window_size: expected at least 1 token"),
        ({"shift_size": [4, 0]}, ValueError, "shift_size: expected at least 0 and below window"),
        ({"shift_size": [0, -1]}, ValueError, "shift_size: expected at least 0 and below window"),
        ({"shift_size": [1, 1, 1]}, ValueError, "shift_size: expected two ints"),
        ({"attention_dropout": 1.5}, ValueError, "attention_dropout: expected a probability"),
        ({"dropout": "much"}, TypeError, "dropout: expected a number"),
    ],
)
def test_bad_constructor_arguments(version, arguments, error, message):
    good = {"dim": DIM, "window_size": [4, 4], "shift_size": [2, 2], "num_heads": HEADS}
    with pytest.raises(error, match=message):
        OURS[version](**{**good, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (3, TypeError, "x: expected a tensor, got int"),
        (torch.zeros(1, 8, 8, DIM, dtype=torch.long), TypeError, "x: expected a floating dtype"),
        (torch.zeros(8, 8, DIM), ValueError, r"x: expected shape \(batch, height, width, 32\)"),
        (torch.zeros(1, 8, 8, 16), ValueError, r"x: expected shape .* got \(1, 8, 8, 16\)"),
        (torch.zeros(1, 8, 8, DIM).half(), TypeError, "x: expected the dtype of the weights"),
        (torch.zeros(1, 8, 8, DIM, device="meta"), ValueError, "x: expected the device"),
    ],
)
def test_bad_input(version, x, error, message):
    with pytest.raises(error, match=message):
        make_pair(version)[0](x)


def test_patch_leaves_our_own_layers_alone(version):
    model = nn.Sequential(make_pair(version)[0])
    assert not vlmfast.patch(model, strict=True).replaced
