"""Losses as modules, against open_clip's and lightly's."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlmfast
import vlmfast.nn as vnn
from tools.models import assert_as_right_as
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
import open_clip.loss  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


class LightlyNTXentLoss(nn.Module):
    """What lightly.loss.NTXentLoss computes without a memory bank, on one process."""

    def __init__(self, temperature=0.5):
        super().__init__()
        self.temperature = temperature

    def forward(self, out0, out1):
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        n = out0.shape[0]
        others = ~torch.eye(n, dtype=torch.bool)
        within = ((z @ z.T)[others].view(n, -1) / self.temperature for z in (out0, out1))
        between = (out0 @ out1.T / self.temperature, out1 @ out0.T / self.temperature)
        pairs = zip(between, within, strict=True)
        logits = torch.cat([torch.cat(parts, dim=1) for parts in pairs])
        return F.cross_entropy(logits, torch.arange(n).repeat(2))


class Head(nn.Module):
    """A loss with what it learns; features are normalised here, as a model does."""

    def __init__(self, loss, bias=None, scale=2.0):
        super().__init__()
        self.loss = loss
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, image_features, text_features):
        features = (F.normalize(x, dim=-1) for x in (image_features, text_features))
        return self.loss(*features, self.logit_scale.exp(), self.logit_bias)


class Projected(nn.Module):
    """Two views through one projection."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(24, 16)
        self.loss = loss

    def forward(self, image_features, text_features):
        return self.loss(self.projection(image_features), self.projection(text_features))


def make_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(37, 24, generator=generator)
    text = image + 2 * torch.randn(37, 24, generator=generator)
    return {"image_features": image, "text_features": text}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, -3.0])
def test_clip_loss(dtype, bias):
    ours, theirs = (Head(loss, bias).to(dtype) for loss in (vnn.ClipLoss(), open_clip_loss("Clip")))
    assert_as_right_as(ours, theirs, make_inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, -3.0])
def test_siglip_loss(dtype, bias):
    losses = (vnn.SigLipLoss(), open_clip_loss("SigLip"))
    ours, theirs = (Head(loss, bias).to(dtype) for loss in losses)
    assert_as_right_as(ours, theirs, make_inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_ntxent_loss(dtype, temperature):
    losses = (vnn.NTXentLoss(temperature), LightlyNTXentLoss(temperature))
    ours, theirs = (Projected(loss).to(dtype) for loss in losses)
    assert_as_right_as(ours, theirs, make_inputs)


def open_clip_loss(name):
    return getattr(open_clip.loss, f"{name}Loss")()


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_calls_are_open_clips(name):
    ours, theirs = getattr(vnn, name), getattr(open_clip.loss, name)
    for method in ("__init__", "forward"):
        mine, original = (inspect.signature(getattr(cls, method)) for cls in (ours, theirs))
        assert list(mine.parameters)[: len(original.parameters)] == list(original.parameters)
        for parameter, like in zip(
            mine.parameters.values(), original.parameters.values(), strict=True
        ):
            # open_clip's SigLipLoss wants a bias, or None, said; here None is the default
            if parameter.name != "logit_bias":
                assert parameter.default == like.default, parameter


def test_call_is_lightlys():
    parameters = inspect.signature(vnn.NTXentLoss).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {"temperature": 0.5, "memory_bank_size": 0, "gather_distributed": False}
    assert list(inspect.signature(vnn.NTXentLoss.forward).parameters) == ["self", "out0", "out1"]


@pytest.mark.parametrize("cls", [vnn.ClipLoss, vnn.SigLipLoss])
def test_output_dict(cls):
    features, loss = tuple(make_inputs(0).values()), cls()
    result = loss(*features, torch.tensor(1.0), torch.tensor(-1.0), output_dict=True)
    assert list(result) == ["contrastive_loss"]
    assert torch.equal(
        result["contrastive_loss"], loss(*features, torch.tensor(1.0), torch.tensor(-1.0))
    )


@pytest.mark.parametrize(
    "loss",
    [
        vnn.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True),
        vnn.SigLipLoss(dist_impl="gather"),
        vnn.NTXentLoss(0.1, gather_distributed=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_copies(loss):
    """No state; alone, whatever they would do across ranks has no effect."""
    assert not loss.state_dict()
    image, text = make_inputs(0).values()
    arguments = () if isinstance(loss, vnn.NTXentLoss) else (torch.tensor(3.0), torch.tensor(-1.0))
    values = {
        copied(image, text, *arguments)
        for copied in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)))
    }
    assert len({value.item() for value in values}) == 1


def test_backend_is_obeyed():
    loss = vnn.ClipLoss()
    loss.backend = "cuda"
    with pytest.raises(NotImplementedError, match="cuda"):
        loss(*make_inputs(0).values(), 10.0)
    loss.backend = "reference"
    assert vlmfast.explain(loss, *make_inputs(0).values(), 10.0).backend == "reference"


@pytest.mark.parametrize("loss", [vnn.ClipLoss(), vnn.SigLipLoss(), vnn.NTXentLoss()])
def test_compiles_without_graph_break(loss):
    def step(image, text):
        extra = () if isinstance(loss, vnn.NTXentLoss) else (torch.tensor(5.0), torch.tensor(-1.0))
        return loss(image, text, *extra)

    features = tuple(make_inputs(0).values())
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*features), step(*features))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: vnn.ClipLoss(use_horovod=True), NotImplementedError, "use_horovod: expected Fa"),
        (lambda: vnn.ClipLoss(rank=1), ValueError, r"rank: expected 0 <= rank < world_size = 1"),
        (lambda: vnn.ClipLoss(world_size=0), ValueError, r"world_size: expected at least 1, got 0"),
        (
            lambda: vnn.SigLipLoss(world_size="2"),
            TypeError,
            r"world_size: expected an int",
        ),
        (lambda: vnn.SigLipLoss(dist_impl="ring"), ValueError, r"dist_impl: expected bidir, shift"),
        (lambda: vnn.NTXentLoss(0.0), ValueError, r"temperature: expected a positive number"),
        (lambda: vnn.NTXentLoss("0.5"), TypeError, r"temperature: expected a number"),
        (lambda: vnn.NTXentLoss(memory_bank_size={}), TypeError, "memory_bank_size: expected an"),
        (lambda: vnn.NTXentLoss()(None, None), TypeError, "^out0: expected a tensor"),
        (
            lambda: vnn.NTXentLoss()(torch.ones(2, 3), torch.ones(3, 3)),
            ValueError,
            "^out1: expected the shape of out0",
        ),
        (lambda: vnn.ClipLoss(local_loss=None), TypeError, "local_loss: expected True or False"),
        (lambda: vnn.NTXentLoss(memory_bank_size=8), NotImplementedError, "memory_bank_size: exp"),
        (lambda: vnn.NTXentLoss(memory_bank_size=(8, 4)), NotImplementedError, "memory_bank_size"),
    ],
)
def test_wrong_arguments(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_horovod_set_later():
    loss = vnn.ClipLoss()
    loss.use_horovod = True
    with pytest.raises(NotImplementedError, match="use_horovod"):
        loss(*make_inputs(0).values(), 10.0)
