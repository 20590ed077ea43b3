"""Compares every model of transformers that can be built small with itself, patched.

    PYTHONPATH=tests python -m tools.compatibility [deepseek_v32 ...]

A model is built from its own config, with every size cut down and every window shorter than the
inputs, and with random weights. Its outputs, patched, may err by what the budget of the project
allows; what is None stays None; a layer that is reported as replaced and is called must run ours;
and `output_attentions` gives the weights of the eager model. What cannot be built is named, with
the error.
"""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import vlmfast
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.integrations.rules import MARK, code_names
from vlmfast.verify.common import SEEDS, budget, relative_error

import_torchvision()
import transformers.models  # noqa: E402
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.utils import logging  # noqa: E402

from vlmfast.integrations.transformers import attention  # noqa: E402

BATCH, TOKENS, WIDTH, HEADS, WORDS = 2, 20, 64, 4, 128
MOST_PARAMETERS = 30_000_000
# How many comparisons a sweep over transformers 5.23 makes at least: fewer would go unnoticed.
LEAST_COMPARED = 1180

# What an integer field of a config becomes, by its name; the first pattern that matches holds.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size.*|.*_vocab_size|codebook_size|text_vocab_size", WORDS),
    (r".*sliding_window|.*attention_window|window_size|local_window.*|attention_chunk_size", 4),
    (r"index_topk|index_local_blocks|index_block_size|compress_.*", 4),
    (r"index_n_heads", HEADS),
    (r"patch_embed_hidden_size", 768),
    (r"latent_query_num|num_query_tokens|num_queries|num_latents|resampler_n_latents", 4),
    (r".*(num_key_value_heads|num_kv_heads|n_head_kv)", 2),
    (r".*(num_attention_heads|num_heads|attention_heads|n_heads?|num_attn_heads)", HEADS),
    (r".*experts_per_tok|moe_topk|moe_k", 2),
    (r".*n_group|topk_group", 1),
    (r".*(num|n)_.*experts", 4),
    (r".*(head_dim|d_kv|head_size|rotary_dim)", WIDTH // HEADS),
    (r".*lora_rank", 16),
    (r".*(layers|num_.*blocks|n_layers?|depth)", 2),
    (r".*max_position_embeddings|.*max_.*positions|n_positions|max_seq_len|context_length", 128),
    (r".*(hidden_size|d_model|embed_dim|n_embd|hidden_dim|embedding_size|emb_dim)", WIDTH),
    (r".*(projection_dim|proj_dim|intermediate_size|ffn_dim|d_ff|mlp_dim|feedforward.*)", WIDTH),
    (r"out_hidden_size|.*_hidden_size|encoder_ffn_dim|decoder_ffn_dim|n_inner|d_inner", WIDTH),
    (r"image_size", 64),
    (r"num_frames|frames_per_clip", 4),
)
_PATTERNS = tuple((re.compile(pattern), size) for pattern, size in _SIZES)


def small_config(cls: type[PreTrainedConfig], **forced: Any) -> PreTrainedConfig:
    """A config of that class with small sizes, but for those that are given."""
    return _shrink(cls(), **forced)


def _shrink(config: PreTrainedConfig, **forced: Any) -> PreTrainedConfig:
    cls = type(config)
    inner = {name: getattr(config, name, None) for name in cls.sub_configs}
    changed: dict[str, Any] = {
        name: _shrink(value) for name, value in inner.items() if isinstance(value, PreTrainedConfig)
    }
    for field in _fields(cls):
        if field.name in changed or not hasattr(config, field.name):
            continue
        default = field.default
        if isinstance(default, int) and not isinstance(default, bool):
            size = _small(field.name, default)
            if size != default:
                changed[field.name] = size
    heads = {"num_attention_heads", "num_key_value_heads"} & set(vars(cls))
    if len(heads) == 2 and cls.num_attention_heads == cls.num_key_value_heads:
        changed["num_key_value_heads"] = HEADS
    stages = getattr(config, "num_heads", None)
    if not isinstance(stages, (list, tuple)) or not isinstance(
        getattr(config, "embed_dim", None), int
    ):
        stages = None
    if stages:
        changed |= {"embed_dim": 32, "num_heads": [2 << stage for stage in range(len(stages))]}
        changed |= {"depths": [2] * len(stages), "window_size": 2}
    ids = [
        field.name
        for field in _fields(cls)
        if field.name.endswith(("token_id", "token_index"))
        and isinstance(field.default, int)
        and field.default >= WORDS
    ]
    changed |= {name: WORDS - 1 - index for index, name in enumerate(ids)}
    patch = getattr(config, "patch_size", None)
    if "window_size" in changed and isinstance(getattr(config, "spatial_merge_size", None), int):
        changed["window_size"] = 2 * config.spatial_merge_size * patch  # in pixels
    if isinstance(patch, int) and isinstance(getattr(config, "image_size", None), int):
        changed["image_size"] = (16 if stages else 4) * patch
    changed |= forced
    return cls(**changed)


def _fields(cls: type[PreTrainedConfig]) -> list[dataclasses.Field]:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [field for field in dataclasses.fields(cls) if field.name not in common]


def _small(name: str, value: int) -> int:
    for pattern, size in _PATTERNS:
        if pattern.fullmatch(name):
            return min(value, size)
    return value


def modeling_files() -> list[str]:
    root = transformers.models
    return [
        f"{package.name}.{module.name}"
        for package in pkgutil.iter_modules(root.__path__, f"{root.__name__}.")
        for module in pkgutil.iter_modules(
            [f"{root.__path__[0]}/{package.name.rpartition('.')[2]}"]
        )
        if module.name.startswith("modeling_")
    ]


def models_of(file: str) -> list[type[PreTrainedModel]]:
    """The models that stand in a file, those without a head first."""
    module = importlib.import_module(file)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == file
        and not value.__name__.endswith(("PreTrainedModel", "PretrainedModel"))
        and value.forward is not PreTrainedModel.forward
        and getattr(value, "config_class", None) is not None
    ]
    return sorted(classes, key=lambda cls: ("For" in cls.__name__, cls.__name__))


def build(cls: type[PreTrainedModel], implementation: str, seed: int = 0) -> PreTrainedModel:
    config = small_config(cls.config_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters even when small")
    torch.manual_seed(seed)
    config._experts_implementation = "eager"  # the others know no float64
    model = cls._from_config(config, attn_implementation=implementation).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs_for(model: PreTrainedModel, seed: int) -> Iterator[dict[str, Any]]:
    """Inputs of every form that a model like it might take, the likeliest first."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    parameters = inspect.signature(model.forward).parameters
    config = model.config
    words = torch.randint(3, 90, (BATCH, TOKENS), generator=generator)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, 13:] = 0
    places = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    places[:, 1 : 1 + _number(config, "latent_query_num", default=4)] = True

    def known(**given: Any) -> dict[str, Any]:
        return {name: value for name, value in given.items() if name in parameters}

    decoder = known(decoder_input_ids=words.flip(0)[:, :11])
    text = known(input_ids=words)
    if text:
        text |= known(attention_mask=mask, image_embeds_position_mask=places)
        yield {**text, **decoder}

    if getattr(config, "vision_config", None) is not None:
        config = config.vision_config
    channels = _number(config, "num_channels", "in_channels", "in_chans", default=3)
    side = _number(config, "image_size", "img_size", default=64)
    frames = _number(config, "num_frames", "frames_per_clip", default=8)
    width = _number(config, "hidden_size", "d_model", default=WIDTH)
    patch = _number(config, "patch_size", "spatial_patch_size", default=16)
    depth = _number(config, "temporal_patch_size", default=1)
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim")
    mels = _number(config, *names, default=80)

    if "pixel_values" in parameters:
        pixels = {"pixel_values": normal(BATCH, channels, side, side)}
        yield {**text, **pixels, **decoder}
        yield pixels
        yield {"pixel_values": normal(BATCH, frames, channels, side, side)}
    if "pixel_values_videos" in parameters:
        yield {"pixel_values_videos": normal(BATCH, frames, channels, side, side)}
    if "grid_thw" in parameters:
        grid = torch.tensor([[1, 4, 6], [1, 8, 4]])
        patches, first = int(grid.prod(-1).sum()), next(iter(parameters))
        for size in (channels * depth * patch * patch, width):
            yield {first: normal(patches, size), "grid_thw": grid}
        yield {first: normal(patches, channels, patch, patch), "grid_thw": grid}
    for name in {"input_features", "input_values"} & set(parameters):
        for shape in ((mels, 128), (64, mels), (4000,), (1, 4000), (mels, 3000), (1, 64, mels)):
            yield {name: normal(BATCH, *shape), **decoder}
    if "flattened_patches" in parameters:
        size = _number(config, "patch_embed_hidden_size", default=channels * patch * patch)
        flattened = normal(BATCH, 12, 2 + size)
        flattened[..., :2] = torch.arange(24).view(1, 12, 2) % 8
        yield {"flattened_patches": flattened, "attention_mask": mask[:, 4:16], **decoder}
    if "past_values" in parameters:
        length = _number(config, "context_length", "prediction_length", default=32)
        yield {
            "past_values": normal(BATCH, length, _number(config, "num_input_channels", default=1))
        }
        yield {"past_values": normal(BATCH, 128)}
    for name in ("inputs_embeds", "hidden_states"):
        if name in parameters:
            yield {name: normal(BATCH, TOKENS, width), **known(attention_mask=mask)}
    if "query_embeds" in parameters:
        media = normal(BATCH, 7, _number(config, "encoder_hidden_size", default=WIDTH))
        yield {"query_embeds": normal(BATCH, 5, width), "encoder_hidden_states": media}


def _number(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
            return value[0]
        if isinstance(value, int):
            return value
    return default


@dataclasses.dataclass
class Comparison:
    """What became of one model: `faults` is empty if it computes what it did."""

    replaced: int
    ran: set[str]
    faults: list[str]


class NotComparedError(Exception):
    """A model cannot be built small, or not be run with any of the inputs."""


def compare(cls: type[PreTrainedModel], implementation: str) -> Comparison:
    """A model against itself, patched, on that implementation."""
    model, form = _runnable(cls, implementation)
    patched = copy.deepcopy(model)
    report = vlmfast.patch(patched)
    exact = copy.deepcopy(model).double()

    def inputs(seed: int) -> dict[str, Any]:
        return next(itertools.islice(inputs_for(model, seed), form, None))

    peers = [_run(model, inputs(seed)) for seed in SEEDS]
    try:
        truths = [_run(exact, inputs(seed)) for seed in SEEDS]
    except (RuntimeError, TypeError, ValueError):
        truths = []  # it has a part that knows no float64
    faults = []
    with _seen_by_attention() as ran, _called(patched) as called:
        mine = _run(patched, inputs(SEEDS[0]))
    for name in sorted({*mine, *peers[0]}):
        theirs, ours = peers[0].get(name), mine.get(name)
        if theirs is None or ours is None:
            if theirs is not ours:
                faults.append(f"{name}: {_kind(ours)}, was {_kind(theirs)}")
        elif ours.shape != theirs.shape:
            faults.append(f"{name}: {tuple(ours.shape)}, was {tuple(theirs.shape)}")
        elif theirs.is_floating_point() and truths:
            errors = [relative_error(p[name], t[name]) for p, t in zip(peers, truths, strict=True)]
            error, allowed = relative_error(ours, truths[0][name]), budget(errors, theirs.dtype)
            if not error <= allowed:
                faults.append(f"{name}: error {error:.1e}, budget {allowed:.1e}")
        elif theirs.is_floating_point() and not _is_close(ours, theirs):
            faults.append(f"{name}: error {relative_error(ours, theirs):.1e} against its original")
    idle = {type(module).__name__ for module in called - ran}
    faults += [f"{name} is reported as replaced, and does not run" for name in sorted(idle)]
    if report.replaced and not report.skipped:
        faults += _faults_of_weights(cls, patched, inputs(SEEDS[0]), peers[0])
    return Comparison(len(report.replaced), {type(m).__name__ for m in ran}, faults)


def _runnable(cls: type[PreTrainedModel], implementation: str) -> tuple[PreTrainedModel, int]:
    """A small model, and which of the forms of inputs it takes."""
    try:
        model = build(cls, implementation)
    except Exception as error:
        raise NotComparedError(_line(error)) from error
    reasons: list[str] = []
    for form, inputs in enumerate(inputs_for(model, SEEDS[0])):
        try:
            _run(model, inputs)
            return model, form
        except Exception as error:
            reasons.append(_line(error))
    raise NotComparedError("; ".join(dict.fromkeys(reasons)) or "no form of inputs for it")


# What Kosmos-2 and Kosmos-2.5 return on eager and not on sdpa, whatever they are asked for.
_UNTOLD = "projection_attentions"


def _faults_of_weights(
    cls: type[PreTrainedModel],
    patched: PreTrainedModel,
    inputs: dict[str, Any],
    original: dict[str, Tensor | None],
) -> list[str]:
    """Where `output_attentions` gives something else than the eager model.

    Some models compute something else on eager than on sdpa: one that sees all tokens there and
    only those before it here, because its layer says is_causal. Of these only shapes are compared.
    """
    try:
        expected = _run(build(cls, "eager"), inputs, output_attentions=True)
    except Exception:
        return []  # it gives none
    weights = {
        name: value
        for name, value in expected.items()
        if "attentions" in name and value is not None and not name.endswith(_UNTOLD)
    }
    mine = _run(patched, inputs, output_attentions=True)
    alike = all(
        _is_close(value, expected[name])
        for name, value in original.items()
        if value is not None and expected.get(name) is not None and name not in weights
    )
    faults = []
    for name, theirs in weights.items():
        ours = mine.get(name)
        if ours is None or ours.shape != theirs.shape or (alike and not _is_close(ours, theirs)):
            faults.append(f"{name} with output_attentions: {_kind(ours)} that is not the eager one")
    return faults


def _run(model: nn.Module, inputs: dict[str, Any], **arguments: Any) -> dict[str, Tensor | None]:
    dtype = next(model.parameters()).dtype
    cast = {
        name: value.to(dtype) if value.is_floating_point() else value.clone()
        for name, value in inputs.items()
    }
    torch.manual_seed(7)
    with torch.no_grad():
        return dict(_flat(model(**cast, **arguments)))


def _flat(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of an output, and what is None in it, by name. Caches are left out."""
    if value is None or isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, tuple, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _flat(inner, f"{path}.{key}")


@contextlib.contextmanager
def _seen_by_attention() -> Iterator[set[nn.Module]]:
    """The layers whose attention function ours is, when they run."""
    seen: set[nn.Module] = set()

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.add(module)
        return attention.attention_forward(module, *args, **kwargs)

    AttentionInterface.register(attention.NAME, spy)
    try:
        yield seen
    finally:
        AttentionInterface.register(attention.NAME, attention.attention_forward)


@contextlib.contextmanager
def _called(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The layers with our attention function that are called."""
    called: set[nn.Module] = set()
    what = f"attention function {attention.NAME!r}"
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(module))
        for module in model.modules()
        if MARK in vars(module) and vars(module)[MARK].what == what
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    try:
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    except AssertionError:
        return False
    return True


def _kind(value: Tensor | None) -> str:
    return "None" if value is None else "a tensor"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:120]


def attention_classes(file: str) -> set[str]:
    """The layers of a file that go through AttentionInterface."""
    return {
        name
        for name, value in vars(importlib.import_module(file)).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == file
        and "ALL_ATTENTION_FUNCTIONS" in code_names(value.forward)
    }


def main(wanted: list[str]) -> int:
    torch.set_num_threads(1)  # the models are too small for more
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    compared, faulty, ran, known = 0, 0, set[str](), set[str]()
    for file in modeling_files():
        name = file.rpartition(".modeling_")[2]
        if wanted and name not in wanted:
            continue
        try:
            layers, classes = attention_classes(file), models_of(file)
        except ImportError as error:
            print(f"{name}: not compared: {_line(error)}", flush=True)
            continue
        known |= {f"{name}.{layer}" for layer in layers}
        for cls in classes:
            # A head adds nothing where all layers of the file have run.
            if "For" in cls.__name__ and all(f"{name}.{layer}" in ran for layer in layers):
                continue
            for implementation in ("sdpa", "eager"):
                title = f"{cls.__name__} on {implementation}"
                try:
                    result = compare(cls, implementation)
                except NotComparedError as error:
                    print(f"{title}: not compared: {error}", flush=True)
                    continue
                compared += 1
                faulty += bool(result.faults)
                ran |= {f"{name}.{layer}" for layer in result.ran}
                says = "; ".join(result.faults) or "equal"
                print(f"{title}: {result.replaced} replaced, {says}", flush=True)
    print("layers that never ran:", ", ".join(sorted(known - ran)))
    print(f"{compared} compared, {faulty} different, {len(known & ran)} of {len(known)} layers ran")
    return 1 if faulty or (not wanted and compared < LEAST_COMPARED) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
