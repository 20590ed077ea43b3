"""patch on CLIPModel and SiglipModel: return_loss=True without the matrix of logits."""

import collections
import copy
import dataclasses
import pickle

import pytest
import torch

import vlmfast
from tools.models import assert_as_right_as
from tools.samples import TOKENS, make_clip, make_siglip
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from transformers import CLIPModel  # noqa: E402


def image_text_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 48, (5, TOKENS), generator=generator)
    words[:, -1] = 49
    return {"input_ids": words, "pixel_values": torch.randn(5, 3, 32, 32, generator=generator)}


def with_loss(model, inputs):
    return model(**inputs, return_loss=True)


def loss_alone(model, inputs):
    return with_loss(model, inputs).loss


def patched_for_loss(model):
    patched = copy.deepcopy(model)
    report = vlmfast.patch(patched, families=["contrastive_loss"])
    assert [entry.path for entry in report.replaced] == [""]
    return patched


TWO_TOWERS = pytest.mark.parametrize("make_model", [make_clip, make_siglip])


@TWO_TOWERS
@pytest.mark.parametrize("call", [with_loss, loss_alone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contrastive_loss(make_model, call, dtype):
    model = make_model().to(dtype)
    assert_as_right_as(patched_for_loss(model), model, image_text_pairs, call)


READERS = {
    "attribute": lambda out: out.logits_per_text,
    "getattr": lambda out: getattr(out, "logits_per_text"),  # noqa: B009
    "key": lambda out: out["logits_per_text"],
    "index": lambda out: out[2],
    "negative index": lambda out: out[-5],
    "slice": lambda out: out[1:3][1],
    "to_tuple": lambda out: out.to_tuple()[2],
    "items": lambda out: dict(out.items())["logits_per_text"],
    "values": lambda out: list(out.values())[2],
    "iteration": lambda out: [out[key] for key in out][2],
    "get": lambda out: out.get("logits_per_text"),
    "dict": lambda out: dict(out)["logits_per_text"],
    "OrderedDict": lambda out: collections.OrderedDict(out)["logits_per_text"],
    "double star": lambda out: dict(**out)["logits_per_text"],
    "update": lambda out: {"a": 1, **out}["logits_per_text"],
    "or": lambda out: (out | {})["logits_per_text"],
    "reflected or": lambda out: ({} | out)["logits_per_text"],
    "vars": lambda out: vars(out)["logits_per_text"],
    "copy": lambda out: copy.copy(out).logits_per_text,
    "pickle": lambda out: pickle.loads(pickle.dumps(out)).logits_per_text,
    "replace": lambda out: dataclasses.replace(out, loss=None).logits_per_text,
    "pytree": lambda out: torch.utils._pytree.tree_leaves(out)[2],
    "tree_map": lambda out: torch.utils._pytree.tree_map(torch.clone, out).logits_per_text,
    "rebuilt": lambda out: type(out)(out.items()).logits_per_text,
    "transposed": lambda out: out.logits_per_image.t(),
}


@TWO_TOWERS
def test_logits_are_computed_when_read_by_whatever_path(make_model, monkeypatch):
    model = make_model().eval()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    with torch.no_grad():
        expected = with_loss(model, inputs)
        for path, read in READERS.items():
            products = count_products(monkeypatch)
            out = with_loss(patched, inputs)
            before = len(products)
            # Nothing of this reads logits.
            assert isinstance(out, type(expected)) and out.__class__ is type(expected)
            assert torch.equal(out.loss, out["loss"]) and torch.equal(out[0], out.get("loss"))
            assert list(out) == list(expected) == list(out.keys()) and len(out) == 7
            assert "loss" in out and out.image_embeds is out["image_embeds"]
            assert out.text_model_output.pooler_output is not None
            assert len(products) == before, path
            logits = read(out)
            assert len(products) == before + 1, path
            torch.testing.assert_close(logits, expected.logits_per_text, msg=path)
            # From now on it is the library's own, and computes nothing again.
            assert type(out) is type(expected) and out.logits_per_text is out[2]
            assert list(out) == list(expected) and repr(out).startswith(type(expected).__name__)
            assert len(products) == before + 1, path
            monkeypatch.undo()


def count_products(monkeypatch):
    """The list to which every matrix of logits is added from now on."""
    products, original = [], torch.matmul

    def matmul(a, b):
        products.append(original(a, b))
        return products[-1]

    monkeypatch.setattr(torch, "matmul", matmul)
    return products


@TWO_TOWERS
def test_without_loss_the_library_computes(make_model):
    model = make_model().eval()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    with torch.no_grad():
        out, expected = patched(**inputs), model(**inputs)
        assert out.loss is None and type(out) is type(expected)
        assert torch.equal(out.logits_per_image, expected.logits_per_image)
        values = with_loss(patched, {**inputs, "return_dict": False})
        like = with_loss(model, {**inputs, "return_dict": False})
        assert type(values) is tuple and len(values) == len(like)
        torch.testing.assert_close(values[:5], like[:5])


@TWO_TOWERS
def test_logits_read_later_are_those_of_then(make_model):
    """Grad mode, autocast and parameters may have changed since."""
    model = make_model()
    if hasattr(model, "logit_bias"):
        torch.nn.init.constant_(model.logit_bias, -0.3)
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = with_loss(patched, inputs), with_loss(model, inputs)
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.zero_()
        logits = out.logits_per_text
    assert logits.requires_grad and logits.dtype == expected.logits_per_text.dtype
    assert torch.equal(logits, expected.logits_per_text)
    with torch.inference_mode():
        out = with_loss(patched, inputs)
    assert out.logits_per_text.is_inference()


def test_compiled_loss_computes_logits_as_before():
    model = make_clip().eval()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    compiled = torch.compile(patched, backend="eager", fullgraph=True)
    with torch.no_grad():
        out, expected = with_loss(compiled, inputs), with_loss(model, inputs)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.logits_per_text, expected.logits_per_text)
    torch.testing.assert_close(out.loss, expected.loss)


def test_saved_config_names_the_librarys_class(tmp_path):
    model = patched_for_loss(make_clip())
    model.save_pretrained(tmp_path)
    assert type(CLIPModel.from_pretrained(tmp_path)) is CLIPModel
    assert model.config.architectures == ["CLIPModel"]
    vlmfast.unpatch(model)
    assert type(model) is CLIPModel


def test_losses_of_unequal_numbers():
    inputs = image_text_pairs(0)
    inputs["input_ids"] = inputs["input_ids"][:3]
    with pytest.raises(ValueError, match="text_features: expected the shape"):
        with_loss(patched_for_loss(make_clip()), inputs)
