"""Trains a small CLIP on pairs of images and captions that it draws itself.

    python examples/train_clip.py                                      # one process
    torchrun --nproc-per-node 2 examples/train_clip.py                 # two, on CPUs or GPUs
    torchrun --nproc-per-node 2 examples/train_clip.py --loss eager    # the same in plain PyTorch

vlmfast must be installed; in a checkout, `make example` sees to everything.

An image shows one shape; its caption says which, how large, of what colour and where: "a small red
circle at the top left". Nothing is downloaded. Towers learn by CLIP's loss over the batch of all
processes. Zero-shot accuracy is how often the right one of all 720 captions is nearest to an image
that was not trained on; by chance it would be 0.1 %.
"""

import argparse
import itertools
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import vlmfast.functional as VF

SIZES = {"small": 0.18, "large": 0.3}
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.1),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.9, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.7),
    "cyan": (0.1, 0.8, 0.9),
    "orange": (1.0, 0.5, 0.0),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
ROWS = {"top": -0.5, "middle": 0.0, "bottom": 0.5}
COLUMNS = {"left": -0.5, "centre": 0.0, "right": 0.5}

# Every scene, as indices into the five above.
SCENES = torch.tensor(
    list(itertools.product(*(range(len(x)) for x in (SIZES, COLOURS, SHAPES, ROWS, COLUMNS))))
)
IMAGE_SIZE = 32


def caption(scene: list[int]) -> str:
    size, colour, shape, row, column = (
        list(words)[index]
        for words, index in zip((SIZES, COLOURS, SHAPES, ROWS, COLUMNS), scene, strict=True)
    )
    return f"a {size} {colour} {shape} at the {row} {column}"


CAPTIONS = [caption(scene) for scene in SCENES.tolist()]
VOCABULARY = sorted({word for text in CAPTIONS for word in text.split()})
# (scenes, words)
TOKENS = torch.tensor([[VOCABULARY.index(word) for word in text.split()] for text in CAPTIONS])


def draw(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, 32, 32) of scenes (N, 5), a little out of place, on noise."""
    n = scenes.shape[0]
    size, colour, shape, row, column = scenes.unbind(1)

    def jitter(amount: float) -> Tensor:
        return amount * (2 * torch.rand(n, generator=generator) - 1)

    axis = torch.linspace(-1, 1, IMAGE_SIZE)
    centre_y = torch.tensor(list(ROWS.values()))[row] + jitter(0.1)
    centre_x = torch.tensor(list(COLUMNS.values()))[column] + jitter(0.1)
    radius = torch.tensor(list(SIZES.values()))[size] + jitter(0.02)
    # Coordinates of each pixel, with the shape at 0 and of size 1: (N, 32, 1) and (N, 1, 32).
    y = ((axis - centre_y[:, None]) / radius[:, None])[:, :, None]
    x = ((axis - centre_x[:, None]) / radius[:, None])[:, None, :]
    distance = (x**2 + y**2).sqrt()
    inside_square = (x.abs() < 0.9) & (y.abs() < 0.9)
    drawings = torch.stack(
        (
            distance < 1,
            inside_square,
            (y < 0.9) & (y > 2 * x.abs() - 0.9),
            inside_square & ((x.abs() < 0.3) | (y.abs() < 0.3)),
            (distance < 1) & (distance > 0.55),
        ),
        dim=1,
    )
    mask = drawings[torch.arange(n), shape][:, None]
    paint = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]
    noise = 0.3 + 0.1 * torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return torch.where(mask, paint, noise) + 0.05 * torch.randn(noise.shape, generator=generator)


class ClipModel(nn.Module):
    """A convolutional image tower and a text tower of one Transformer layer."""

    def __init__(self, dim: int, width: int = 16):
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1)
            blocks += [convolution, nn.GroupNorm(4, after), nn.GELU()]
        positions = (IMAGE_SIZE // 8) ** 2
        self.image_tower = nn.Sequential(
            *blocks, nn.Flatten(), nn.Linear(4 * width * positions, dim)
        )
        self.words = nn.Embedding(len(VOCABULARY), 64)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS.shape[1], 64))
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.text_projection = nn.Linear(64, dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), as CLIP begins

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(images), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.words(tokens) + self.positions)
        return F.normalize(self.text_projection(hidden.mean(1)), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp()


def eager_loss(image: Tensor, text: Tensor, scale: Tensor, across: bool) -> Tensor:
    """CLIP's loss in plain PyTorch: this process's rows of both matrices of logits."""
    all_images, all_texts, first = image, text, 0
    if across:
        from torch.distributed.nn.functional import all_gather

        all_images, all_texts = torch.cat(all_gather(image)), torch.cat(all_gather(text))
        first = dist.get_rank() * image.shape[0]
    labels = first + torch.arange(image.shape[0], device=image.device)
    per_image = F.cross_entropy(scale * image @ all_texts.T, labels)
    return (per_image + F.cross_entropy(scale * text @ all_images.T, labels)) / 2


def fused_loss(image: Tensor, text: Tensor, scale: Tensor, across: bool) -> Tensor:
    """The same by vlmfast: neither matrix is held, and the second one not even computed."""
    return VF.clip_loss(image, text, scale, group=dist.group.WORLD if across else None)


LOSSES = {"eager": eager_loss, "vlmfast": fused_loss}


@torch.no_grad()
def zero_shot_accuracy(model: ClipModel, count: int, device: torch.device) -> float:
    """How often the nearest of all captions is the right one, over `count` new images."""
    generator = torch.Generator().manual_seed(2**31)
    scenes = torch.randint(len(SCENES), (count,), generator=generator)
    images = draw(SCENES[scenes], generator).to(device)
    similarity = model.encode_image(images) @ model.encode_text(TOKENS.to(device)).T
    return (similarity.argmax(1).cpu() == scenes).float().mean().item()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loss", choices=LOSSES, default="vlmfast")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=256, help="pairs of all processes")
    parser.add_argument("--dim", type=int, default=64, help="of the features")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.batch_size = min(options.steps, 12), min(options.batch_size, 64)
    return options


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, prints a summary, and returns it."""
    options = parse_arguments(arguments)
    across, on_gpu = "RANK" in os.environ, torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if across:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        return train(options, device, across)
    finally:
        if across:
            dist.destroy_process_group()


def train(options: argparse.Namespace, device: torch.device, across: bool) -> dict[str, float]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if across else (0, 1)
    if options.batch_size % world:
        raise SystemExit(f"--batch-size: expected a multiple of {world}, got {options.batch_size}")
    torch.manual_seed(options.seed)
    model = ClipModel(options.dim).to(device)
    trained: nn.Module = DistributedDataParallel(model) if across else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.learning_rate, total_steps=options.steps
    )
    compute_loss = LOSSES[options.loss]
    generator = torch.Generator().manual_seed(options.seed + 1000 * (rank + 1))

    losses: list[float] = []
    seconds = 0.0
    bar = tqdm(range(options.steps), disable=rank != 0, unit="step", desc=options.loss)
    for step in bar:
        scenes = torch.randint(len(SCENES), (options.batch_size // world,), generator=generator)
        images = draw(SCENES[scenes], generator).to(device)
        tokens = TOKENS[scenes].to(device)
        start = time.perf_counter()
        loss = compute_loss(*trained(images, tokens), across)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # a scale of 100, as CLIP has it
        mean = loss.detach()
        if across:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)  # waits for the GPU
        # The first steps set things up.
        seconds += time.perf_counter() - start if step >= 2 else 0.0
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    summary = {
        "first loss": losses[0],
        "last loss": sum(losses[-10:]) / len(losses[-10:]),
        "zero-shot accuracy": zero_shot_accuracy(model, 2048, device),
        "pairs/s": options.batch_size * max(options.steps - 2, 0) / max(seconds, 1e-9),
    }
    if rank == 0:
        where = f"{world} process{'es' if world > 1 else ''} on {device.type}"
        print(f"{options.loss} loss, {options.steps} steps of {options.batch_size} pairs, {where}")
        for name, value in summary.items():
            shown = f"{value:.1%}" if "accuracy" in name else f"{value:,.3f}"
            print(f"  {name:20} {shown}")
    return summary


if __name__ == "__main__":
    main()
