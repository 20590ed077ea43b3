"""patch on open_clip's towers and losses."""

import pytest
import torch

import vlmfast
from tools.models import (
    CHANGES,
    assert_patched_model_right,
    assert_same_where_submodules_change,
    assert_subclass_is_left,
    spy_on_attention,
)
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402
from open_clip.transformer import Attention, AttentionalPooler, TextTransformer  # noqa: E402

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
TEXT = {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


def make_clip(cls=CLIP, vision=(), text=()):
    torch.manual_seed(0)
    return cls(16, {**VISION, **dict(vision)}, {**TEXT, **dict(text)})


def pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 49, (2, 10), generator=generator)
    text[:, 7], text[:, 8:] = 49, 0
    return {"image": torch.randn(2, 3, 32, 32, generator=generator), "text": text}


@pytest.mark.parametrize(
    ("cls", "vision", "text"),
    [
        (CLIP, {}, {}),
        (CustomTextCLIP, {}, {}),
        (CustomTextCLIP, {}, {"no_causal_mask": True}),
        (CustomTextCLIP, {}, {"embed_cls": True, "pad_id": 0}),
        (CLIP, {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}, {}),
        (CustomTextCLIP, {"qk_norm": True}, {"qk_norm": True, "scale_heads": True}),
    ],
    ids=str,
)
def test_clip(cls, vision, text):
    assert_patched_model_right(make_clip(cls, vision, text), pairs)


def test_padding_mask_without_causal():
    torch.manual_seed(0)
    tower = TextTransformer(**TEXT, output_dim=16, no_causal_mask=True, use_pad_mask=True)
    assert_patched_model_right(tower, lambda seed: {"text": pairs(seed)["text"]})


def test_narrow_dtype():
    assert_patched_model_right(make_clip().bfloat16(), pairs)


@pytest.mark.parametrize("text", [{}, {"qk_norm": True}], ids=["torch attention", "own attention"])
def test_causal_text_reaches_the_kernels_as_a_flag(monkeypatch, text):
    model = make_clip(CustomTextCLIP, text=text).eval()
    report = vlmfast.patch(model)
    assert len(report.replaced) == 4
    calls = spy_on_attention(monkeypatch)
    with torch.inference_mode():
        model.encode_image(pairs(0)["image"])
        assert [(c.is_causal, c.attn_mask) for c in calls] == [(False, None)] * 2
        calls.clear()
        model.encode_text(pairs(0)["text"])
        assert [(c.is_causal, c.attn_mask) for c in calls] == [(True, None)] * 2
        calls.clear()
        model.text.attn_mask[3, 2] = -1.0
        model.encode_text(pairs(0)["text"])
        assert [c.is_causal for c in calls] == [False] * 2


@pytest.mark.parametrize("masks", ["bool", "float", "bool 3-D"])
def test_own_attention_masks(masks):
    torch.manual_seed(0)
    attention = Attention(32, 4, inner_norm=True, norm_layer=torch.nn.LayerNorm)

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand((8, 9, 9) if "3-D" in masks else (9, 9), generator=generator) < 0.4
        hidden[..., 0] = False
        return {
            "x": torch.randn(2, 9, 32, generator=generator),
            "attn_mask": torch.randn(9, 9, generator=generator) if masks == "float" else hidden,
        }

    assert_patched_model_right(attention, inputs)


def test_pooler():
    torch.manual_seed(0)
    pooler = AttentionalPooler(32, 24, n_head=4, n_queries=3)

    def inputs(seed):
        return {"x": torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(seed))}

    assert_patched_model_right(pooler, inputs)


def test_coca():
    torch.manual_seed(0)
    vision = {**VISION, "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
    vision["output_tokens"] = True
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = CoCa(32, multimodal_cfg=TEXT, text_cfg=text, vision_cfg=vision)
    # The original leaves it uninitialised.
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    assert_patched_model_right(model, pairs)


def test_scaled_cosine_is_left():
    attention = Attention(32, 4, scaled_cosine=True)
    report = vlmfast.patch(attention)
    assert not report.replaced and "scaled_cosine" in report.skipped[0].why


def test_subclasses_are_left_and_reported():
    class Own(Attention):
        pass

    assert_subclass_is_left(Own(32, 4))


def test_gradient_checkpointing():
    def call(model, inputs):
        model.set_grad_checkpointing()
        return model(**inputs)

    assert_patched_model_right(make_clip(), pairs, call)


def loss_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(21, 16, generator=generator)
    text = image + 2 * torch.randn(21, 16, generator=generator)
    return {"image_features": image, "text_features": text}


class Head(torch.nn.Module):
    """A loss of open_clip with what it learns beside the towers."""

    def __init__(self, loss, *bias):
        super().__init__()
        self.loss = loss
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.bias = torch.nn.ParameterList(torch.nn.Parameter(torch.tensor(b)) for b in bias)

    def forward(self, image_features, text_features):
        features = (
            torch.nn.functional.normalize(x, dim=-1) for x in (image_features, text_features)
        )
        return self.loss(*features, self.logit_scale.exp(), *self.bias, output_dict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cls", "bias"), [(ClipLoss, ()), (ClipLoss, (1.0,)), (SigLipLoss, (-2.0,))]
)
def test_losses(cls, bias, dtype):
    assert_patched_model_right(Head(cls(), *bias).to(dtype), loss_inputs)


def test_coca_loss():
    """Its caption loss stays; its contrastive one is fused."""
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5)

    class CoCaHead(Head):
        def forward(self, image_features, text_features):
            words = torch.arange(8).view(2, 4)
            logits = image_features[:2, None, :] * text_features[:4]  # (2, 4, 16): batch, words
            features = (
                torch.nn.functional.normalize(x, dim=-1) for x in (image_features, text_features)
            )
            return self.loss(*features, logits, words, self.logit_scale.exp())

    head = CoCaHead(loss)
    assert_patched_model_right(head, loss_inputs)
    report = vlmfast.patch(head, families=["contrastive_loss"])
    assert [entry.what for entry in report.replaced] == ["vlmfast.integrations.open_clip.CoCaLoss"]
    vlmfast.unpatch(head)
    assert type(loss) is CoCaLoss


def test_losses_that_stay():
    report = vlmfast.patch(torch.nn.ModuleList([DistillClipLoss(), ClipLoss(use_horovod=True)]))
    assert not report.replaced
    subclass, horovod = (entry.why for entry in report.skipped)
    assert "subclass" in subclass and "horovod" in horovod


def test_a_loss_obeys_its_backend():
    loss = ClipLoss()
    vlmfast.patch(loss, backend="reference")
    features = loss_inputs(0).values()
    assert vlmfast.explain(loss, *features, torch.tensor(10.0)).backend == "reference"
    loss.world_size = 2
    with pytest.raises(ValueError, match="init_process_group"):
        loss(*features, torch.tensor(10.0))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules(change):
    torch.manual_seed(0)
    norms = {"qk_norm": True, "inner_norm": True, "norm_layer": torch.nn.LayerNorm}
    layer = Attention(32, 4, scale_heads=True, **norms)
    assert_same_where_submodules_change(layer, change, {"x": torch.randn(2, 7, 32)})
