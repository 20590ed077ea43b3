"""`python -m vlmfast demo`: real architectures on a real photograph, before and after `patch`.

Each row of the result is one model in one dtype. Original and patched model get the same weights
and the same input; both are compared, output by output, with a float64 run of the original, then
timed in turns (A B A B ...), and last run alone, each in a process of its own, for peak memory.
Nothing is downloaded, so the weights are random, from a fixed seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlmfast
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.tables import markdown_table
from vlmfast.verify.common import budget, relative_error

import_torchvision()
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import timm  # noqa: E402
from flamingo_pytorch import GatedCrossAttentionBlock, PerceiverResampler  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from PIL import Image  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models import SwinTransformer, swin_t  # noqa: E402
from transformers import CLIPConfig, CLIPModel  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["main"]

CAPTIONS = (
    "a portrait of Rear Admiral Grace Hopper in uniform",
    "an officer of the navy wearing a dark cap with a golden emblem",
    "a woman with glasses in front of the flag of the United States",
    "a computer scientist who wrote the first compiler",
    "rows of ribbons on a dark jacket",
    "a dog running along the beach",
    "a bowl of noodle soup with vegetables",
    "an aerial view of a harbour at night",
)
VIEWS = len(CAPTIONS)
IMAGES = 6  # of a document in which text and images alternate
CLASS = 652  # "military uniform" in ImageNet

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """One row: how to make the model and its input, and what one run of it gives, by name."""

    name: str
    dtype: torch.dtype
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool], Inputs]
    run: Callable[[Any, Inputs], dict[str, Tensor]]
    inference: bool = False  # patched as a model that is only read

    def model(self, patched: bool, quick: bool) -> nn.Module:
        torch.manual_seed(0)
        model = self.build(quick).to(self.dtype)
        if patched:
            self.patch(model)
        return model

    def patch(self, model: nn.Module) -> vlmfast.PatchReport:
        return vlmfast.patch(model, inference=self.inference)


@dataclass
class Outcome:
    """One row of the table. Times in ms, memory in MiB, errors as relative L2 norms."""

    model: str
    layers_replaced: int
    worst_output: str
    error_ours: float
    error_theirs: float
    error_limit: float
    time_before: float
    time_after: float
    rounds: int
    memory_before: float
    memory_after: float
    passed: bool


def photograph() -> Image.Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


def _image_views(size: int) -> Tensor:
    """Four corners and their mirror images, normalised as CLIP does: (8, 3, size, size)."""
    photo = photograph()
    side = 3 * min(photo.size) // 4
    right, bottom = photo.width - side, photo.height - side
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
    crops = [photo.crop((x, y, x + side, y + side)).resize((size, size)) for x, y in corners]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    mean = torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1)
    deviation = torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1)
    views = (pixels / 255 - mean) / deviation
    return torch.cat([views, views.flip(-1)])


def _clip(quick: bool) -> nn.Module:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = {**small, "intermediate_size": 128} if quick else {}
    return CLIPModel(CLIPConfig(text_config=tower, vision_config=tower)).eval()


def _clip_inputs(quick: bool) -> Inputs:
    tokens = SimpleTokenizer()(list(CAPTIONS))
    lengths = tokens.argmax(dim=1, keepdim=True) + 1  # the end token is the last of the vocabulary
    return {
        "pixel_values": _image_views(224),
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1]) < lengths).long(),
    }


def _run_clip(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.inference_mode():
        out = model(**inputs)
    return {
        "image embedding": out.image_embeds,
        "text embedding": out.text_embeds,
        "image tokens": out.vision_model_output.last_hidden_state,
        "text tokens": out.text_model_output.last_hidden_state,
    }


def _vit(quick: bool) -> nn.Module:
    if quick:
        return VisionTransformer(96, 16, embed_dim=64, depth=2, num_heads=4).eval()
    return timm.create_model("vit_base_patch16_224", pretrained=False).eval()


def _vit_inputs(quick: bool) -> Inputs:
    return {"x": _image_views(96 if quick else 224)}


def _run_vit(model: VisionTransformer | SwinTransformerV2, inputs: Inputs) -> dict[str, Tensor]:
    with torch.inference_mode():
        tokens = model.forward_features(inputs["x"])
        return {"tokens": tokens, "logits": model.forward_head(tokens)}


def _train_vit(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """One step without the optimiser: the logits, and the gradient of each part of the model."""
    model.zero_grad(set_to_none=True)
    logits = model(inputs["x"])
    labels = torch.full((len(logits),), CLASS)
    nn.functional.cross_entropy(logits, labels).backward()
    gradients: dict[str, list[Tensor]] = {}
    for path, parameter in model.named_parameters():
        part = ".".join(path.split(".")[:2]) if path.startswith("blocks") else path.split(".")[0]
        if parameter.grad is not None:
            gradients.setdefault(f"gradient of {part}", []).append(parameter.grad.flatten())
    return {"logits": logits.detach()} | {name: torch.cat(g) for name, g in gradients.items()}


def _swin(quick: bool) -> nn.Module:
    if quick:
        sizes: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        return SwinTransformer([4, 4], window_size=[7, 7], **sizes).eval()
    return swin_t(weights=None).eval()


def _swin_inputs(quick: bool) -> Inputs:
    return {"x": _image_views(56 if quick else 224)}


def _run_swin(model: SwinTransformer, inputs: Inputs) -> dict[str, Tensor]:
    with torch.inference_mode():
        tokens = model.norm(model.features(inputs["x"]))
        return {"tokens": tokens, "logits": model.head(tokens.mean((1, 2)))}


def _swin_v2(quick: bool) -> nn.Module:
    if quick:
        sizes: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
        return SwinTransformerV2(64, window_size=8, **sizes).eval()
    return timm.create_model("swinv2_tiny_window8_256", pretrained=False).eval()


def _swin_v2_inputs(quick: bool) -> Inputs:
    return {"x": _image_views(64 if quick else 256)}


class Flamingo(nn.Module):
    """What Flamingo adds to a language model: the resampler and the gated blocks."""

    def __init__(self, dim: int, heads: int, latents: int, depth: int):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.words = nn.Embedding(49408, dim)
        self.resampler = PerceiverResampler(
            dim=dim, depth=2, heads=heads, num_latents=latents, num_media_embeds=IMAGES
        )
        self.blocks = nn.ModuleList(
            GatedCrossAttentionBlock(dim=dim, heads=heads) for _ in range(depth)
        )
        for block in self.blocks:  # made with gates that let nothing through
            nn.init.constant_(block.get_parameter("attn_gate"), 0.5)
            nn.init.constant_(block.get_parameter("ff_gate"), 0.5)

    def forward(self, images: Tensor, text: Tensor, media_locations: Tensor) -> dict[str, Tensor]:
        features = self.patches(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        media = self.resampler(features.unflatten(0, images.shape[:2]))
        x = self.words(text)
        for block in self.blocks:
            x = block(x, media, media_locations=media_locations)
        return {"latents": media, "text": x}


def _flamingo(quick: bool) -> nn.Module:
    model = Flamingo(64, 1, 8, 2) if quick else Flamingo(1024, 8, 64, 6)
    return model.eval()


def _flamingo_inputs(quick: bool) -> Inputs:
    """Two documents of six views, each followed by captions: (2, 6, 3, size, size), (2, T)."""
    views = _image_views(32 if quick else 224)
    images = torch.stack([views[:IMAGES], views[-IMAGES:]])
    captions = [tokens[tokens != 0] for tokens in SimpleTokenizer()(list(CAPTIONS))]
    documents = [
        torch.cat([torch.cat([torch.zeros(1, dtype=torch.long), *captions[i:]]) for i in order])
        for order in (range(IMAGES), reversed(range(IMAGES)))
    ]
    text = torch.stack(documents)
    return {"images": images, "text": text, "media_locations": text == 0}


def _run_flamingo(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.inference_mode():
        return model(**inputs)


SUBJECTS = (
    Subject("CLIP ViT-B/32 (transformers), fp32", torch.float32, _clip, _clip_inputs, _run_clip),
    Subject("CLIP ViT-B/32 (transformers), bf16", torch.bfloat16, _clip, _clip_inputs, _run_clip),
    Subject("ViT-B/16 (timm), fp32", torch.float32, _vit, _vit_inputs, _run_vit),
    Subject(
        "ViT-B/16 (timm), fp32, inference=True",
        torch.float32,
        _vit,
        _vit_inputs,
        _run_vit,
        inference=True,
    ),
    Subject("ViT-B/16 (timm), bf16", torch.bfloat16, _vit, _vit_inputs, _run_vit),
    Subject("ViT-B/16 (timm), bf16, training", torch.bfloat16, _vit, _vit_inputs, _train_vit),
    Subject("Swin-T (torchvision), fp32", torch.float32, _swin, _swin_inputs, _run_swin),
    Subject("Swin-T (torchvision), bf16", torch.bfloat16, _swin, _swin_inputs, _run_swin),
    Subject("Swin V2-T (timm), fp32", torch.float32, _swin_v2, _swin_v2_inputs, _run_vit),
    Subject("Swin V2-T (timm), bf16", torch.bfloat16, _swin_v2, _swin_v2_inputs, _run_vit),
    Subject(
        "Flamingo (flamingo-pytorch), fp32",
        torch.float32,
        _flamingo,
        _flamingo_inputs,
        _run_flamingo,
    ),
    Subject(
        "Flamingo (flamingo-pytorch), bf16",
        torch.bfloat16,
        _flamingo,
        _flamingo_inputs,
        _run_flamingo,
    ),
)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _check(
    subject: Subject, original: nn.Module, patched: nn.Module, inputs: Inputs
) -> tuple[str, float, float, float]:
    """The output that comes closest to its error budget: name, our error, theirs, budget."""
    exact = copy.deepcopy(original).double()
    truth = subject.run(exact, _cast(inputs, torch.float64))
    theirs, ours = subject.run(original, inputs), subject.run(patched, inputs)
    checked = []
    for name, expected in truth.items():
        error, their_error = (relative_error(out[name], expected) for out in (ours, theirs))
        checked.append((name, error, their_error, budget([their_error], subject.dtype)))
    return max(checked, key=lambda entry: entry[1] / entry[3])


def _time_in_turns(
    subject: Subject, models: tuple[nn.Module, nn.Module], inputs: Inputs, seconds: float
) -> tuple[float, float, int]:
    """Median milliseconds of each model, measured A B A B ... for about `seconds`."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for model, measured in zip(models, times, strict=True):
            begin = time.perf_counter()
            subject.run(model, inputs)
            measured.append(1e3 * (time.perf_counter() - begin))
        if seconds == 0:
            break
    return statistics.median(times[0]), statistics.median(times[1]), len(times[0])


def _peak_memory(name: str, patched: bool, quick: bool) -> float:
    """MiB of resident memory at the peak of one run, in this process, which does nothing else."""
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    subject.run(subject.model(patched, quick), _cast(subject.inputs(quick), subject.dtype))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(subject: Subject, quick: bool, seconds: float, say: Callable[[str], None]) -> Outcome:
    say(f"{subject.name}: building it twice")
    original = subject.model(patched=False, quick=quick)
    patched = copy.deepcopy(original)
    report = subject.patch(patched)
    print(report, flush=True)
    inputs = _cast(subject.inputs(quick), subject.dtype)

    say(f"{subject.name}: comparing every output with a float64 run")
    output, ours, theirs, limit = _check(subject, original, patched, inputs)
    passed = ours <= limit and bool(report.replaced)
    verdict = "right" if passed else "WRONG"
    say(f"{subject.name}: {verdict} ({output}: {ours:.1e}, limit {limit:.1e})")

    say(f"{subject.name}: timing, original and patched in turns")
    before, after, rounds = _time_in_turns(subject, (original, patched), inputs, seconds)

    say(f"{subject.name}: {before:.0f} -> {after:.0f} ms; peak memory, each alone")
    # A server that has imported everything and computed nothing forks one process per contestant.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with server.Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(_peak_memory, (subject.name, which, quick)) for which in (False, True)]
    return Outcome(
        model=subject.name,
        layers_replaced=len(report.replaced),
        worst_output=output,
        error_ours=ours,
        error_theirs=theirs,
        error_limit=limit,
        time_before=before,
        time_after=after,
        rounds=rounds,
        memory_before=memory[0],
        memory_after=memory[1],
        passed=passed,
    )


def _table(rows: list[Outcome]) -> str:
    header = ["model", "layers replaced", "error ours / theirs", "time before / after", "speed-up"]
    body = [
        [
            row.model,
            str(row.layers_replaced),
            f"{row.error_ours:.1e} / {row.error_theirs:.1e}{'' if row.passed else ' WRONG'}",
            f"{row.time_before:.0f} / {row.time_after:.0f} ms",
            f"{row.time_before / row.time_after:.2f} x",
            f"{row.memory_before:.0f} / {row.memory_after:.0f} MiB",
        ]
        for row in rows
    ]
    return markdown_table([*header, "peak memory before / after"], body, is_padded=True)


def _plot(rows: list[Outcome], path: Path) -> None:
    """Time and memory as shares of the original's, from zero; errors on a logarithmic axis."""
    grey, blue, red = "#b4b8bf", "#1f6feb", "#c62828"
    places = np.arange(len(rows))[::-1].astype(float)
    figure, (time_axis, memory_axis, error_axis) = plt.subplots(
        1, 3, figsize=(15, 1.6 + 0.85 * len(rows)), sharey=True, layout="constrained"
    )
    for axis, title, before, after, unit in (
        (time_axis, "time", "time_before", "time_after", "ms"),
        (memory_axis, "peak memory of the process", "memory_before", "memory_after", "MiB"),
    ):
        for row, place in zip(rows, places, strict=True):
            old, new = getattr(row, before), getattr(row, after)
            share = 100 * new / old
            axis.barh(place + 0.19, 100, 0.36, color=grey)
            axis.barh(place - 0.19, share, 0.36, color=blue)
            axis.text(2, place + 0.19, f"{old:,.0f} {unit}", va="center", fontsize=9)
            label = f"{new:,.0f} {unit}  ({old / new:.2f} x)"
            axis.text(2, place - 0.19, label, va="center", fontsize=9, color="white")
        axis.set_title(f"{title}, % of the original's")
        axis.set_xlim(left=0)
    for row, place in zip(rows, places, strict=True):
        error_axis.plot([row.error_theirs], [place + 0.12], "o", color=grey, markersize=9)
        color = blue if row.passed else red
        error_axis.plot([row.error_ours], [place - 0.12], "o", color=color, markersize=9)
        limit = row.error_limit
        error_axis.plot([limit, limit], [place - 0.3, place + 0.3], color=red, linewidth=1.5)
    error_axis.set_xscale("log")
    error_axis.set_title("relative error against float64")
    time_axis.set_yticks(places, [row.model for row in rows])
    for axis in (time_axis, memory_axis, error_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=grey),
        plt.Rectangle((0, 0), 1, 1, color=blue),
        plt.Line2D([], [], color=red),
    ]
    names = ["original", "after vlmfast.patch", "largest error allowed"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    threads = torch.get_num_threads()
    figure.suptitle(
        f"Eight views of one photograph, {threads} CPU thread{'s' * (threads > 1)}, "
        f"torch {torch.__version__}"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns 0 if every number was right, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vlmfast demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small models, one round: a test")
    options = parser.parse_args(arguments)
    subjects = [subject for subject in SUBJECTS if options.only in subject.name]
    if not subjects:
        parser.error(f"--only: no row contains {options.only!r}")

    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {what}", flush=True)

    print(f"{VIEWS} views of a photograph, {len(CAPTIONS)} captions, random weights")
    seconds = 0.0 if options.quick else 5.0
    rows = []
    for number, subject in enumerate(subjects, 1):
        say(f"row {number} of {len(subjects)}")
        rows.append(_measure(subject, options.quick, seconds, say))

    options.out.mkdir(parents=True, exist_ok=True)
    table = _table(rows)
    (options.out / "demo.md").write_text(table + "\n")
    results = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }
    (options.out / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    _plot(rows, options.out / "demo.png")
    print(f"\n{table}\n")
    say(f"wrote {', '.join(str(options.out / f'demo.{end}') for end in ('md', 'json', 'png'))}")

    wrong = [row.model for row in rows if not row.passed]
    for name in wrong:
        print(f"WRONG: {name}: the patched model's error is beyond its limit", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
