"""Small models and inputs for them, for the tests of several files.

A library is imported by the functions that make a model of it.
"""

import torch
from torch import nn

import vlmfast.nn as vnn
from vlmfast._torchvision_ops import import_torchvision

# transformers imports it.
import_torchvision()

# --- transformers ---

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = {"image_size": 32, "patch_size": 8}
WORDS = {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 0,
}
BATCH, TOKENS = 2, 10


# transformers' eager attention takes its softmax in float32 whatever the model's dtype, so the
# truth is always sdpa's.
def make(cls, config):
    torch.manual_seed(0)
    model = cls(config).requires_grad_()  # IDEFICS freezes its text layers
    for parameter in model.parameters():
        # The initial values are so small that attention is nearly uniform.
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_clip(implementation="sdpa", **arguments):
    from transformers import CLIPConfig, CLIPModel

    text, vision = {**SIZES, **WORDS, **arguments}, {**SIZES, **IMAGE, **arguments}
    return make(
        CLIPModel,
        CLIPConfig(text_config=text, vision_config=vision, attn_implementation=implementation),
    )


def make_siglip(implementation="sdpa"):
    from transformers import SiglipConfig, SiglipModel

    text, vision = {**SIZES, **WORDS}, {**SIZES, **IMAGE}
    config = SiglipConfig(
        text_config=text, vision_config=vision, attn_implementation=implementation
    )
    return make(SiglipModel, config)


def make_vit(implementation="sdpa", **arguments):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SIZES, **IMAGE, attn_implementation=implementation, **arguments)
    return make(ViTModel, config)


MODELS = {"clip": make_clip, "siglip": make_siglip, "vit": make_vit}


def padding(side):
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if side == "right":
        mask[1, 6:] = 0
    elif side == "left":
        mask[1, :4] = 0
    return mask


def inputs_of(name, side=None):
    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        made = {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator)}
        if name != "vit":
            words = torch.randint(1, 48, (BATCH, TOKENS), generator=generator)
            words[:, -1] = WORDS["eos_token_id"]
            made["input_ids"] = words
        if side is not None:
            made["attention_mask"] = padding(side)
        return made

    return inputs


def last_hidden_state(model, inputs):
    return model(**inputs).last_hidden_state


def features(model, inputs):
    """Hidden states rather than logits, where errors would cancel."""
    outputs = model(**inputs)
    if "text_embeds" not in outputs:
        return outputs.last_hidden_state, outputs.pooler_output
    return (
        outputs.text_embeds,
        outputs.image_embeds,
        outputs.text_model_output.last_hidden_state,
        outputs.vision_model_output.last_hidden_state,
    )


# --- Flamingo ---

IMAGES, LATENTS, WIDTH = 2, 5, 32
FLAMINGO_SIZES = {"dim": WIDTH, "dim_head": 8, "heads": 4}

# Three texts of eleven tokens. The last has an image more than there are media: what comes after it
# overflows.
LOCATIONS = torch.zeros(3, 11, dtype=torch.bool)
LOCATIONS[0, [4, 8]] = True
LOCATIONS[1, [0, 1]] = True
LOCATIONS[2, [2, 3, 7]] = True


def make_pair(name, library=None, **arguments):
    """A layer of flamingo-pytorch, or of `library`, and ours: (ours, theirs), of equal weights.

    Norms are not 1, gates are open.
    """
    if library is None:
        import flamingo_pytorch.flamingo_pytorch as library
    torch.manual_seed(0)
    theirs = getattr(library, name)(**arguments)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.7, std=0.2)
    ours = getattr(vnn, name)(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def text_and_media(seed, images=IMAGES, width=WIDTH, tokens=LOCATIONS.shape[1], **others):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(len(LOCATIONS), tokens, WIDTH, generator=generator),
        "media": torch.randn(len(LOCATIONS), images, LATENTS, width, generator=generator),
        **others,
    }
