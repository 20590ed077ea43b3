"""patch on torch.nn's own layers: MultiheadAttention inside the Transformer modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
import vlmfast.nn as vnn
from tools.models import (
    CHANGES,
    assert_as_right_as,
    assert_patched_model_right,
    assert_same_where_submodules_change,
    spy_on_attention,
)
from vlmfast.integrations.torch import Linear
from vlmfast.verify.common import SEEDS, budget, relative_error

WIDTH, HEADS, BATCH, TOKENS = 32, 4, 3, 7
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
PADDING = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
PADDING[1, 5:] = PADDING[2, 3:] = True


def make_layer(**arguments):
    torch.manual_seed(0)
    arguments = {"dropout": 0.0, "batch_first": True, **arguments}
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **arguments)


def make_encoder(**arguments):
    return nn.TransformerEncoder(make_layer(**arguments), 2, enable_nested_tensor=True)


def tokens(seed, batch_first=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, TOKENS, WIDTH) if batch_first else (TOKENS, BATCH, WIDTH)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm_first": True},
        {"batch_first": False},
        {"bias": False},
        {"activation": "gelu"},
        {"activation": nn.SiLU()},
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", ["none", "causal", "padding"])
def test_encoder_layer(arguments, masks):
    layer = make_layer(**arguments)
    extra = {
        "none": {},
        "causal": {"src_mask": CAUSAL, "is_causal": True},
        "padding": {"src_key_padding_mask": PADDING},
    }[masks]

    def run(module, inputs):
        return module(inputs["src"], **extra)

    batch_first = arguments.get("batch_first", True)
    assert_patched_model_right(layer, lambda seed: {"src": tokens(seed, batch_first)}, run)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "causal", "padding"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inference_runs_our_kernels_and_gives_the_same(monkeypatch, norm_first, masks):
    encoder = make_encoder(norm_first=norm_first, activation="gelu").eval()
    patched = copy.deepcopy(encoder)
    vlmfast.patch(patched)
    extra = {
        "none": {},
        "causal": {"mask": CAUSAL},
        "padding": {"src_key_padding_mask": PADDING},
    }[masks]
    calls = spy_on_attention(monkeypatch)
    with torch.inference_mode():
        expected = encoder(tokens(0), **extra)
        out = patched(tokens(0), **extra)
    torch.testing.assert_close(out, expected)
    # Padded batches reach the layers as nested tensors, which torch only makes for norm-last.
    packed = masks == "padding" and not norm_first
    function = "varlen_attention" if packed else "scaled_dot_product_attention"
    assert [c.function for c in calls] == [function] * 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_jagged_sequences(norm_first):
    layer = make_layer(norm_first=norm_first).eval()
    sequences = [tokens(0)[0, :length] for length in (3, 7)]
    with torch.inference_mode():
        expected = [layer(sequence) for sequence in sequences]
        assert len(vlmfast.patch(layer).replaced) == 2
        out = layer(torch.nested.as_nested_tensor(sequences, layout=torch.jagged))
    assert out.layout == torch.jagged
    for mine, original in zip(out.unbind(), expected, strict=True):
        torch.testing.assert_close(mine, original)


def test_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    def run(module, inputs):
        return module(
            inputs["src"],
            inputs["tgt"],
            src_key_padding_mask=PADDING,
            tgt_mask=CAUSAL,
            tgt_is_causal=True,
            memory_key_padding_mask=PADDING,
        )

    assert_patched_model_right(
        model, lambda seed: {"src": tokens(seed), "tgt": tokens(seed + 100)}, run
    )
    report = vlmfast.patch(model)
    paths = [entry.path for entry in report.replaced]
    assert paths == [
        "encoder.layers.0",
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]


def test_the_model_itself_may_be_the_layer():
    layer = nn.MultiheadAttention(WIDTH, HEADS)
    report = vlmfast.patch(layer)
    assert type(layer) is vnn.MultiheadAttention
    assert [entry.path for entry in report.replaced] == [""]
    assert "(the model)" in str(report)
    vlmfast.unpatch(layer)
    assert type(layer) is nn.MultiheadAttention


def test_subclasses_are_left_and_reported():
    class Loud(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return tuple(2 * x for x in super().forward(*args, **kwargs) if x is not None)

    model = nn.ModuleDict(
        {"loud": Loud(WIDTH, HEADS), "ours": vnn.MultiheadAttention(WIDTH, HEADS)}
    )
    report = vlmfast.patch(model)
    assert not report.replaced
    assert [(entry.path, entry.why) for entry in report.skipped] == [
        ("loud", "a subclass may compute something else")
    ]
    assert type(model["loud"]) is Loud
    vlmfast.unpatch(model)
    assert type(model["ours"]) is vnn.MultiheadAttention


class Inherits(nn.TransformerEncoderLayer):
    pass


class AsksSuper(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(src, *args, **kwargs)


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return src + self._sa_block(src, None, None)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cls", [Inherits, AsksSuper, OwnForward, nn.TransformerEncoderLayer])
def test_attention_is_replaced_only_where_inference_runs_it(monkeypatch, cls, batch_first):
    model = nn.Sequential(cls(WIDTH, HEADS, 2 * WIDTH, batch_first=batch_first)).eval()

    def only_attention(path, module):
        return isinstance(module, nn.MultiheadAttention)

    report = vlmfast.patch(model, filter=only_attention)
    calls = spy_on_attention(monkeypatch)
    with torch.inference_mode():
        model(tokens(0, batch_first))
    assert len(report.replaced) == len(calls) == (cls is OwnForward or not batch_first)
    if not calls:
        path, _, why = report.skipped[1]
        assert path == "0.self_attn" and why.endswith("stays, and goes past it in inference")
        with pytest.raises(RuntimeError, match=r"0\.self_attn: .*goes past it"):
            vlmfast.patch(model, strict=True, filter=only_attention)


def test_attention_with_weights_stays_torch(monkeypatch):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    patched = copy.deepcopy(attention)
    vlmfast.patch(patched)
    calls = spy_on_attention(monkeypatch)
    x = tokens(0)
    for mine, original in zip(patched(x, x, x), attention(x, x, x), strict=True):
        assert torch.equal(mine, original)
    assert not calls


def test_training_with_dropout_runs():
    encoder = make_encoder(dropout=0.2).train()
    vlmfast.patch(encoder)
    torch.manual_seed(3)
    first = encoder(tokens(0))
    torch.manual_seed(3)
    assert torch.equal(first, encoder(tokens(0)))
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    encoder = make_encoder().to(dtype)
    patched = copy.deepcopy(encoder)
    vlmfast.patch(patched)
    assert_as_right_as(patched, encoder, lambda seed: {"src": tokens(seed)})


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40, bias=False)).eval()


def spy_on_packing(monkeypatch):
    """The weights that get packed from now on."""
    packed = []
    pack = torch.ops.mkldnn._reorder_linear_weight

    def spy(weight, *rest):
        packed.append(weight)
        return pack(weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", spy)
    return packed


@torch.no_grad()
def assert_linear_right(mlp, original, shape=(5, 48)):
    """The error of `mlp` against float64 keeps the budget that the original's errors set."""
    exact = copy.deepcopy(original).double()
    errors = []
    for seed in SEEDS:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        x = x.to(original[0].weight.dtype)
        with torch.autocast("cpu", enabled=False):
            truth = exact(x.double())
        errors.append(relative_error(original(x), truth))
        if seed == 0:
            ours = mlp(x)
            error = relative_error(ours, truth)
    assert error <= budget(errors, ours.dtype)


def test_linear_is_replaced_for_inference_alone():
    mlp = make_mlp()
    report = vlmfast.patch(mlp)
    assert not report.replaced and not report.skipped
    report = vlmfast.patch(mlp, inference=True)
    assert [entry.path for entry in report.replaced] == ["0", "2"]
    vlmfast.unpatch(mlp)
    assert type(mlp[0]) is nn.Linear
    assert not vlmfast.patch(mlp, families=["flash_attention"], inference=True).replaced
    assert len(vlmfast.patch(mlp, families=["linear"], inference=True).replaced) == 2
    with pytest.raises(ValueError, match=r"families: expected .* got 'linear'"):
        vlmfast.patch(mlp, families=["linear"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 7, 48), (0, 48)], ids=str)
def test_linear_in_inference(dtype, shape):
    original = make_mlp().to(dtype)
    mlp = copy.deepcopy(original)
    vlmfast.patch(mlp, inference=True)
    assert_linear_right(mlp, original, shape)
    with torch.inference_mode():
        assert mlp(torch.randn(2, 3, 48).to(dtype).transpose(0, 1)).shape == (3, 2, 40)


def test_linear_packs_its_weight_once(monkeypatch):
    mlp = make_mlp()
    vlmfast.patch(mlp, inference=True)
    packed = spy_on_packing(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            mlp(torch.randn(4, 48))
    assert len(packed) == 2


def test_linear_notices_new_weights():
    original = make_mlp()
    mlp = copy.deepcopy(original)
    vlmfast.patch(mlp, inference=True)
    for change in (
        lambda model: model[0].weight.mul_(2.0),
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(96, 48))),
        lambda model: setattr(model[2].weight, "data", torch.full((40, 96), 0.5)),
    ):
        assert_linear_right(mlp, original)
        with torch.no_grad():
            change(mlp), change(original)
    assert_linear_right(mlp, original)


def test_linear_notices_weights_that_come_back_to_their_old_address():
    original = make_mlp()
    mlp = copy.deepcopy(original)
    vlmfast.patch(mlp, inference=True)
    for _ in range(20):  # the allocator may give the same memory again, or not
        assert_linear_right(mlp, original)
        mlp.bfloat16()
        mlp.float()
        original.load_state_dict(mlp.state_dict())
        assert_linear_right(mlp, original)
        with torch.no_grad():
            mlp[0].weight.add_(0.01)  # whose digits the next round drops
        original.load_state_dict(mlp.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_linear_notices_a_step_of_an_optimizer(fused):
    """torch's fused optimizers change weights without counting up their versions."""
    original = make_mlp()
    mlp = copy.deepcopy(original)
    vlmfast.patch(mlp, inference=True)
    assert_linear_right(mlp, original)
    for model in (mlp, original):
        model(torch.ones(2, 48)).sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused).step()
    assert_linear_right(mlp, original)


def test_linear_whose_weights_torch_does_not_watch():
    with torch.inference_mode():
        original = make_mlp()
        mlp = copy.deepcopy(original)
        vlmfast.patch(mlp, inference=True)
        assert_linear_right(mlp, original)
        for model in (mlp, original):
            model[0].weight.mul_(2.0)
    with torch.inference_mode():
        x = torch.randn(5, 48)
        assert torch.equal(mlp(x), original(x))


def test_linear_whose_weights_other_processes_may_write_to(monkeypatch):
    original = make_mlp()
    mlp = copy.deepcopy(original)
    vlmfast.patch(mlp, inference=True)
    packed = spy_on_packing(monkeypatch)
    with torch.no_grad():
        mlp(torch.randn(5, 48))
        assert len(packed) == 2
        mlp.share_memory()
        mlp(torch.randn(5, 48))
        weight = mlp[0].weight.detach()
        process = torch.multiprocessing.get_context("fork").Process(
            target=torch.Tensor.zero_, args=(weight,)
        )
        process.start()
        process.join()
        assert not weight.any()
        original[0].weight.zero_()
    assert_linear_right(mlp, original)
    assert len(packed) == 2


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_linear_with_a_weight_that_is_computed(name):
    """Once for each call: by pruning, as an attribute; by a parametrisation, as a property."""
    original = make_mlp()
    pruned = copy.deepcopy(original)
    vlmfast.patch(pruned, inference=True)
    for model in (pruned, original):
        prune.l1_unstructured(model[0], name, 0.5)
    x, computed = torch.randn(5, 48), []
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), original(x))

    class Counts(nn.Module):
        def forward(self, x):
            computed.append(name)
            return x

    parametrized = make_mlp()
    vlmfast.patch(parametrized, inference=True)
    parametrize.register_parametrization(parametrized[0], name, Counts())
    computed.clear()
    with torch.no_grad():
        parametrized(x)
    assert len(computed) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_linear_on_padded_batches():
    """torch.nn.TransformerEncoder hands its layers nested tensors."""
    encoder = make_encoder().eval()
    patched = copy.deepcopy(encoder)
    vlmfast.patch(patched, inference=True)
    with torch.inference_mode():
        out, expected = (m(tokens(0), src_key_padding_mask=PADDING) for m in (patched, encoder))
    torch.testing.assert_close(out, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_packed_linear_is_quantised_as_the_original_is():
    original = make_mlp()
    patched = copy.deepcopy(original)
    vlmfast.patch(patched, inference=True)
    x = torch.randn(5, 48)
    quantised = [
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        for model in (patched, original)
    ]
    assert type(quantised[0][0]) is type(quantised[1][0]) is not nn.Linear
    assert torch.equal(quantised[0](x), quantised[1](x))
    assert type(patched[0]) is Linear
    vlmfast.unpatch(patched)
    assert type(patched[0]) is nn.Linear and type(make_mlp()[0]) is nn.Linear


def test_packed_linear_equals_only_the_class_that_it_stands_for():
    class Other(Linear):
        pass

    assert Linear == nn.Linear and nn.Linear == Linear and Linear in {nn.Linear}
    assert Linear != nn.Module and Other != nn.Linear and Other not in {nn.Linear, Linear}


def test_operations_of_linear_are_counted():
    mlp = make_mlp()
    vlmfast.patch(mlp, inference=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mlp(torch.randn(5, 48))
    assert counter.get_total_flops() == 2 * 5 * (48 * 96 + 96 * 40)


def test_linear_under_autocast_and_with_gradients(monkeypatch):
    original = make_mlp()
    mlp = copy.deepcopy(original)
    vlmfast.patch(mlp, inference=True)
    packed = spy_on_packing(monkeypatch)
    x = torch.randn(5, 48)
    mlp(x).sum().backward()
    original(x).sum().backward()
    for ours, theirs in zip(mlp.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert not packed
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert mlp(x).dtype == torch.bfloat16
        assert_linear_right(mlp, original)
    # Where oneDNN has no bfloat16, nothing is packed.
    dtypes = [torch.bfloat16] * 2 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    assert [weight.dtype for weight in packed] == dtypes


def test_packed_linear_can_be_copied_and_saved(tmp_path):
    mlp = make_mlp()
    vlmfast.patch(mlp, inference=True)
    x = torch.randn(5, 48)
    with torch.no_grad():
        out = mlp(x)
        assert torch.equal(copy.deepcopy(mlp)(x), out)
        torch.save(mlp, tmp_path / "mlp.pt")
        assert torch.equal(torch.load(tmp_path / "mlp.pt", weights_only=False)(x), out)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            mlp(torch.randn(5, 47))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_changed_submodules(norm_first, change):
    """In inference the original reads all weights, in training it calls all modules."""
    layer = make_layer(norm_first=norm_first)
    assert_same_where_submodules_change(layer, change, {"src": tokens(0)})


def test_adapters_that_come_after_the_patch():
    theirs = make_layer().eval()
    ours = copy.deepcopy(theirs)
    vlmfast.patch(ours)
    for layer in (ours, theirs):
        CHANGES["subclass"](layer.linear1)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(0)), theirs(tokens(0)))
    torch.testing.assert_close(ours(tokens(0)), theirs(tokens(0)))


def test_dropout_that_the_fused_path_leaves_out():
    theirs = make_layer(dropout=0.5).eval()
    ours = copy.deepcopy(theirs)
    vlmfast.patch(ours)
    for layer in (ours, theirs):
        layer.dropout.train()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(0)), theirs(tokens(0)))


def test_layers_that_read_what_would_compute_something_else_are_left():
    layer = make_layer()
    CHANGES["subclass"](layer.linear2)
    assert [entry.why for entry in vlmfast.patch(layer).skipped] == [
        "in inference it reads the weights of its linear2, and does not call that "
        "tools.models.AdaptedLinear",
        "torch.nn.TransformerEncoderLayer around it stays, and goes past it in inference",
    ]
