"""Contrastive losses as ranks compute them, and densely in plain PyTorch."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import vlmfast.functional as VF
from vlmfast.distributed import Ring
from vlmfast.verify.common import SEEDS, budget, relative_error

MOST = 4  # ranks


def cross_entropy(logits, targets=None, **options):
    targets = torch.arange(logits.shape[0]) if targets is None else targets
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, **options)


def dense_clip(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def dense_siglip(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(image.shape[0], dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / image.shape[0]


def dense_ntxent(image, text, scale, bias):
    z = F.normalize(torch.cat((image, text)), dim=-1)
    n = image.shape[0]
    logits = (scale / 10 * z @ z.T).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, torch.arange(2 * n).roll(n))


def queue(like, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(6, like.shape[1], generator=generator, dtype=torch.float64)
    return F.normalize(entries, dim=-1).to(like.dtype)


def momentum(features):
    return F.normalize(features.detach().double().roll(1, -1) + features.detach(), dim=-1).to(
        features.dtype
    )


def dense_itc(image, text, scale, bias):
    image_keys = torch.cat((momentum(image), queue(image, 1)))
    text_keys = torch.cat((momentum(text), queue(text, 2)))
    loss = 0.0
    for features, target, keys in (
        (image, momentum(image), text_keys),
        (text, momentum(text), image_keys),
    ):
        with torch.no_grad():
            soft = (scale * target @ keys.T).softmax(-1)
            targets = 0.4 * soft + 0.6 * torch.eye(*soft.shape, dtype=soft.dtype)
        targets = targets.to(scale.dtype)
        loss = loss + cross_entropy(scale * features @ keys.T, targets, label_smoothing=0.1) / 2
    return loss


def dense_smoothed(image, text, scale, bias):
    logits = scale * image @ text.T
    return sum(cross_entropy(x, label_smoothing=0.1) for x in (logits, logits.T)) / 2


def ours_itc(image, text, scale, bias, **options):
    return VF.itc_loss(
        image,
        text,
        scale,
        image_momentum=momentum(image),
        text_momentum=momentum(text),
        image_queue=queue(image, 1),
        text_queue=queue(text, 2),
        alpha=0.4,
        label_smoothing=0.1,
        **options,
    )


LOSSES = {
    "clip": (VF.clip_loss, dense_clip),
    "siglip": (VF.siglip_loss, dense_siglip),
    "ntxent": (
        lambda image, text, scale, bias, **options: VF.ntxent_loss(
            image, text, 10 / scale, **options
        ),
        dense_ntxent,
    ),
    "itc": (ours_itc, dense_itc),
    "itc of features": (
        lambda image, text, scale, bias, **options: VF.itc_loss(
            image, text, scale, label_smoothing=0.1, **options
        ),
        dense_smoothed,
    ),
}
TENSORS = ("loss", "image", "text", "scale", "bias")


def make_inputs(seed, n, dtype, dim=24):
    """Pairs that resemble each other, as in training."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    text = image + 2 * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    features = (F.normalize(x, dim=-1).to(dtype) for x in (image, text))
    wide = dtype if dtype == torch.float64 else torch.float32
    return (*features, torch.tensor(20.0, dtype=wide), torch.tensor(-10.0, dtype=wide))


def measure(loss, inputs, **options):
    """The loss and its gradients, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    value.backward()
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return dict(zip(TENSORS, (value.detach(), *gradients), strict=True))


def own_rows(group, sizes):
    rank = dist.get_rank(group)
    first = sum(sizes[:rank])
    return slice(first, first + sizes[rank])


def by_exchange(group, exchange):
    return Ring(group) if exchange == "ring" else group


def run_one_rank(group, name, exchange, sizes, dtype, backend, options):
    rows = own_rows(group, sizes)
    image, text, scale, bias = make_inputs(0, sum(sizes), dtype)
    return measure(
        LOSSES[name][0],
        (image[rows], text[rows], scale, bias),
        group=by_exchange(group, exchange),
        backend=backend,
        **options,
    )


def after_averaging(results):
    """What DistributedDataParallel makes of the ranks' gradients, for the whole batch."""
    joined = {
        name: torch.cat([result[name].double() for result in results]) / len(results)
        for name in ("image", "text")
    }
    means = {
        name: torch.stack([result[name].double() for result in results]).mean(0)
        for name in ("loss", "scale", "bias")
    }
    return joined | means


def assert_within_budget(ours, dense, n, dtype):
    """Every tensor errs at most as its budget allows; `dense` gives truth and torch's errors."""
    errors = {name: [] for name in ours}
    for seed in SEEDS:
        inputs = make_inputs(seed, n, dtype)
        exact = measure(dense, [x.double() for x in inputs])
        theirs = measure(dense, inputs)
        for name in ours:
            errors[name].append(
                relative_error(theirs[name], exact[name], terms(name, exact, inputs))
            )
        if seed == 0:
            truth = {name: (exact[name], terms(name, exact, inputs)) for name in ours}
    for name, tensor in ours.items():
        error = relative_error(tensor, *truth[name])
        allowed = budget(errors[name], dtype if name in ("image", "text") else torch.float32)
        assert error <= allowed, f"{name}: error {error:.3e}, budget {allowed:.3e}"


def terms(name, exact, inputs):
    """The norm of what the gradients to scale and bias sum, a term for each row."""
    if name == "scale":
        return ((inputs[0].double() * exact["image"]).sum(-1) / inputs[2].double()).norm().item()
    return 0.0
