"""Contrastive losses of CLIP, SigLIP, SimCLR, ALBEF, BLIP and BLIP-2, without an N x N matrix.

Each loss is a few lines over `statistics`, which is differentiable and never holds the logits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import checks
from vlmfast.checks import check_flag, check_floating_tensor, check_fraction, reject
from vlmfast.contrastive_statistics import (
    Statistics,
    block_statistics,
    choose_backend,
    merge,
    normalize,
    pair_loss,
)
from vlmfast.dispatch import no_autocast
from vlmfast.distributed.ranks import Ranks, Ring
from vlmfast.distributed.statistics import everyone, statistics
from vlmfast.functional.flash_attention import scaled_dot_product_attention
from vlmfast.reference.common import compute_dtype

_LIMITS = {
    2: checks.Limits(("rows", "features"), (1 << 29, 1 << 16)),
    3: checks.Limits(("rows", "queries", "features"), (1 << 29, 1 << 16, 1 << 16)),
}


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group: Any = None,
    local_loss: bool = True,
    gather_with_grad: bool = True,
    backend: str | None = None,
) -> Tensor:
    """CLIP's symmetric cross-entropy, as open_clip.ClipLoss computes it.

        logits = logit_scale * image_features @ text_features^T + logit_bias
        loss = (cross_entropy(logits, arange(N)) + cross_entropy(logits^T, arange(N))) / 2

    Memory beyond the features and their gradients is O(N * D).

    Args:
        image_features: (N, D), normalised; float32, bfloat16, float16 or float64; any strides.
        text_features: (N, D), of the same dtype.
        logit_scale: a number or a tensor of one element of any floating dtype, already
            exponentiated. It is used in float32 (float64 beside float64 features).
        logit_bias: likewise, or None. It changes neither the loss nor any gradient; its own is 0.
        group: process group whose ranks hold parts of the batch; None for this process alone.
        local_loss: with a group, each rank's loss is that of its own rows.
        gather_with_grad: with a group, gradients reach the features of all ranks.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        The loss: 0-d, float32 (float64 for float64 features).

    Raises:
        TypeError: an argument is of a wrong type; the features differ in dtype or are not floating.
        ValueError: shapes or devices do not fit, N or D is 0, or backend is unknown.
        NotImplementedError: the forced backend cannot run the call.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
    (2021); open_clip.
    """

    def check() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        check_flag("local_loss", local_loss)
        check_flag("gather_with_grad", gather_with_grad)
        return _cast_and_check_towers(image_features, text_features, logit_scale, logit_bias)

    facts = ("clip_loss", local_loss, gather_with_grad)
    (image, text, scale, bias), ranks = _join(group, check, backend, *facts)
    with no_autocast(image.device.type):
        if ranks is None:
            loss = _clip_loss(image, text, scale, backend, ranks)
        else:
            loss = _clip_loss_across(
                image, text, scale, backend, ranks, local_loss, gather_with_grad
            )
        return loss if bias is None else loss + 0.0 * bias


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    *,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss, as open_clip.SigLipLoss computes it.

        logits = logit_scale * image_features @ text_features^T + logit_bias
        loss = -sum over i, j of log(sigmoid(z[i, j] * logits[i, j])) / N

    with z = 1 on the diagonal and -1 elsewhere.

    Args:
        image_features: (N, D), normalised; float32, bfloat16, float16 or float64; any strides.
        text_features: (N, D), of the same dtype.
        logit_scale: a number or a tensor of one element of any floating dtype, already
            exponentiated. It is used in float32 (float64 beside float64 features).
        logit_bias: likewise, or None.
        group: process group whose ranks hold parts of the batch; None for this process alone.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        The loss: 0-d, float32 (float64 for float64 features).

    Raises:
        TypeError: an argument is of a wrong type; the features differ in dtype or are not floating.
        ValueError: shapes or devices do not fit, N or D is 0, or backend is unknown.
        NotImplementedError: the forced backend cannot run the call.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023); open_clip.
    """

    def check() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return _cast_and_check_towers(image_features, text_features, logit_scale, logit_bias)

    (image, text, scale, bias), ranks = _join(group, check, backend, "siglip_loss")
    with no_autocast(image.device.type):
        block = statistics(
            image,
            everyone(text, ranks),
            scale,
            bias,
            sigmoid=True,
            column_statistics=False,
            backend=backend,
            ranks=ranks,
        )
        losses = block.row_sum - F.logsigmoid(block.positive)
        return _weighted(losses.sum() / image.shape[0], ranks)


def ntxent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor | float = 0.5,
    *,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """SimCLR's normalised temperature-scaled cross-entropy.

        z = normalize(concat(z1, z2))
        logits = z @ z^T / temperature, without its diagonal
        loss = cross_entropy(logits, pairs)

    where each row's class is the other view of the same sample; the mean is over 2 * N rows.

    Args:
        z1: (N, D), one view; normalised here, by max(norm, 1e-12). float32, bfloat16, float16 or
            float64; any strides.
        z2: (N, D), the other view, of the same dtype.
        temperature: a positive number or a tensor of one element, which gets its gradient.
        group: process group whose ranks hold parts of the batch; None for this process alone.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        The loss: 0-d, float32 (float64 for float64 features).

    Raises:
        TypeError: an argument is of a wrong type; z1 and z2 differ in dtype or are not floating.
        ValueError: shapes or devices do not fit, N or D is 0, temperature is not positive (a
            tensor's value is checked on the CPU, elsewhere with VLMFAST_CHECKS=1), or backend is
            unknown.
        NotImplementedError: the forced backend cannot run the call.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations"
    (2020).
    """

    return named_ntxent_loss(("z1", z1), ("z2", z2), temperature, group, backend)


def named_ntxent_loss(
    one: tuple[str, Tensor],
    other: tuple[str, Tensor],
    temperature: Tensor | float,
    group: Any,
    backend: str | None,
) -> Tensor:
    """`ntxent_loss` of two views with the names that errors call them by."""

    def check() -> tuple[Tensor, Tensor, Tensor]:
        views = _cast_and_check_pair(one, other)
        return *views, _check_temperature(temperature, views[0])

    (first, second, scale), ranks = _join(group, check, backend, "ntxent_loss")
    with no_autocast(first.device.type):
        first, second = normalize(first), normalize(second)
        all_first, all_second = everyone(first, ranks), everyone(second, ranks)
        between = statistics(first, all_second, scale, backend=backend, ranks=ranks)
        losses = []
        for z, columns, most, total in (
            (first, all_first, between.row_max, between.row_sum),
            (second, all_second, between.column_max, between.column_sum),
        ):
            # The pair of row i is i itself here, which is no negative.
            within = statistics(
                z, columns, scale, column_statistics=False, backend=backend, ranks=ranks
            )
            merged = merge(
                torch.stack((most, within.row_max)), torch.stack((total, within.row_sum))
            )
            losses.append(pair_loss(*merged, between.positive))
        return _weighted(torch.cat(losses).mean(), ranks)


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_momentum: Tensor | None = None,
    text_momentum: Tensor | None = None,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Image-text contrastive loss of ALBEF and BLIP, with soft targets, and of BLIP-2.

        text_keys = concat(text_momentum, text_queue)
        logits = logit_scale * image_features @ text_keys^T
        soft = softmax(logit_scale * image_momentum @ text_keys^T)
        targets = alpha * soft + (1 - alpha) * identity
        image_to_text = cross_entropy(logits, targets, label_smoothing=label_smoothing)
        loss = (image_to_text + text_to_image) / 2

    where text_to_image exchanges the roles of image and text. No gradient flows into targets,
    momentum features and queues.

    Memory beyond the features and their gradients is O((N + Q) * D). With alpha > 0, what the
    targets expect is attention over all keys, whose GPU kernels take D up to 256: beyond, these
    logits are held, O(N * (N + Q)).

    Args:
        image_features: (N, D), normalised; or (N, queries, D), of whose similarities with a text
            the largest counts, as in BLIP-2. float32, bfloat16, float16 or float64; any strides.
        text_features: (N, D), of the same dtype.
        logit_scale: a number or a tensor of one element of any floating dtype. It is used in
            float32 (float64 beside float64 features).
        image_momentum: shaped as image_features; None: the image features themselves are keys,
            with gradient.
        text_momentum: (N, D), likewise.
        image_queue: (Q, D), or (Q, queries, D): further keys; None for none.
        text_queue: (Q, D).
        alpha: weight of the soft targets, in [0, 1]; only for image features (N, D).
        label_smoothing: in [0, 1], over all keys.
        group: process group whose ranks hold parts of the batch; None for this process alone.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        The loss: 0-d, float32 (float64 for float64 features).

    Raises:
        TypeError: an argument is of a wrong type; features differ in dtype or are not floating.
        ValueError: shapes or devices do not fit, N or D is 0, alpha or label_smoothing is outside
            [0, 1], alpha is not 0 with several queries, or backend is unknown.
        NotImplementedError: the forced backend cannot run the call.

    Source: Li et al., "Align before Fuse" (2021); Li et al., "BLIP-2" (2023).
    """
    optional = (image_momentum, text_momentum, image_queue, text_queue)
    features_are_keys = all(tensor is None for tensor in optional)

    def check() -> tuple[Any, ...]:
        features = _cast_and_check_itc(image_features, text_features, *optional)
        scale = scalar("logit_scale", logit_scale, features[0])
        soft = check_fraction("alpha", alpha)
        smoothing = check_fraction("label_smoothing", label_smoothing)
        if soft > 0.0 and features[0].dim() == 3:
            reject("alpha", "0 with image_features of several queries", soft)
        _refuse_ring(group, soft > 0.0 or not features_are_keys)
        lengths = [None if tensor is None else tensor.shape[0] for tensor in optional]
        return *features, scale, soft, smoothing, [x is None for x in lengths[:2]], lengths[2:]

    inputs, ranks = _join(group, check, backend, "itc_loss")
    image, text, image_target, text_target, image_key, text_key = inputs[:6]
    image_queue, text_queue, scale, alpha, label_smoothing = inputs[6:11]
    n, first = text.shape[0], 0 if ranks is None else ranks.offset
    with no_autocast(image.device.type):
        text_keys = _keys(text_key, text_queue, ranks)
        if not features_are_keys or alpha > 0.0:
            image_keys = _keys(image_key, image_queue, ranks)
        if features_are_keys:
            to_text = to_image = statistics(image, text_keys, scale, backend=backend, ranks=ranks)
        else:
            # All keys are here, so this rank needs nobody's help.
            to_text = block_statistics(
                image, text_keys, scale, None, first, column_statistics=False, backend=backend
            )
            to_image = block_statistics(image_keys, text, scale, None, -first, backend=backend)
            to_image = to_image._replace(positive=to_image.positive[first : first + n])
        # -log(p) of the pair, and what the other targets add to it.
        losses = torch.stack(
            (
                pair_loss(to_text.row_max, to_text.row_sum, to_text.positive),
                pair_loss(to_image.column_max, to_image.column_sum, to_image.positive),
            )
        )
        loss = losses.mean()
        if label_smoothing > 0.0:
            n_keys = n if ranks is None else ranks.total
            gaps = [
                _mean_gap(block, n_keys + (0 if queue is None else queue.shape[0]))
                for block, queue in ((to_text, text_queue), (to_image, image_queue))
            ]
            loss = loss + label_smoothing * (gaps[0] + gaps[1]) / 2
        if alpha > 0.0:
            gaps = [
                _soft_gap(image, image_target, text_keys, first, scale, backend),
                _soft_gap(text, text_target, image_keys, first, scale, backend),
            ]
            loss = loss + (1.0 - label_smoothing) * alpha * (gaps[0] + gaps[1]) / 2
        return _weighted(loss, ranks)


def _join(
    group: Any, check: Callable[[], tuple[Any, ...]], backend: str | None, *facts: Any
) -> tuple[tuple[Any, ...], Ranks | None]:
    """The checked arguments of a loss, and the ranks that compute it together (None: no group)."""
    if group is None:
        return check(), None
    from vlmfast.distributed.join import join

    def check_all() -> tuple[Any, ...]:
        inputs = check()
        return *inputs, f"backend={choose_backend(inputs[0], inputs[1], backend)}"

    inputs, ranks = join(group, check_all, *facts)
    return inputs[:-1], ranks


def _weighted(loss: Tensor, ranks: Ranks | None) -> Tensor:
    """A local mean so weighted that the mean over ranks is that of the whole batch."""
    return loss if ranks is None or ranks.weight == 1.0 else loss * ranks.weight


def _clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, backend: str | None, ranks: Ranks | None = None
) -> Tensor:
    block = statistics(image, everyone(text, ranks), scale, backend=backend, ranks=ranks)
    rows = pair_loss(block.row_max, block.row_sum, block.positive)
    columns = pair_loss(block.column_max, block.column_sum, block.positive)
    return _weighted((rows.mean() + columns.mean()) / 2, ranks)


def _clip_loss_across(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    backend: str | None,
    ranks: Ranks,
    local_loss: bool,
    gather_with_grad: bool,
) -> Tensor:
    """`_clip_loss` as open_clip's two switches have it."""
    from vlmfast.distributed.gather import mean_gradient, mean_over_ranks, scale_gradient

    if local_loss and not gather_with_grad:
        losses = []
        for rows, columns in ((image, text), (text, image)):
            others = everyone(columns.detach(), ranks)
            block = statistics(
                rows, others, scale, column_statistics=False, backend=backend, ranks=ranks
            )
            losses.append(pair_loss(block.row_max, block.row_sum, block.positive).mean())
        return _weighted((losses[0] + losses[1]) / 2, ranks)

    if not gather_with_grad:
        image, text = (scale_gradient(x, 1.0 / ranks.size) for x in (image, text))
    if torch.is_grad_enabled() and text.requires_grad and not image.requires_grad:
        # Rows get their gradient here, columns by a reduce-scatter: a frozen tower needs neither.
        image, text = text, image
    if local_loss:
        return _clip_loss(image, text, scale, backend, ranks)
    scale = mean_gradient(scale, ranks)
    return mean_over_ranks(_clip_loss(image, text, scale, backend, ranks), ranks)


def _mean_gap(block: Statistics, n_keys: int) -> Tensor:
    """The mean logit of the pairs less that of all logits."""
    n, pairs = block.positive.shape[0], block.positive.sum()
    return pairs / n - (block.row_total.sum() + pairs) / (n * n_keys)


def _soft_gap(
    features: Tensor,
    target: Tensor,
    keys: Tensor,
    first_key: int,
    scale: Tensor,
    backend: str | None,
) -> Tensor:
    """The mean logit of the pairs less that which the soft targets expect.

    Logits are linear in the keys, so what a target expects is the logit of the key that it
    expects, and that is attention with the target as query.
    """
    dtype = compute_dtype(features.dtype)
    features, target, keys = features.to(dtype), target.to(dtype), keys.to(dtype)
    query = scale.detach().to(dtype) * target
    expected = scaled_dot_product_attention(
        query[None, None], keys.detach()[None, None], keys[None, None], scale=1.0, backend=backend
    )[0, 0]
    n = features.shape[0]
    pairs = keys[first_key : first_key + n]
    return scale * (features * (pairs - expected)).sum(-1).mean()


def scalar(argument: str, value: Any, like: Tensor) -> Tensor:
    """A number or tensor of one element as a 0-d tensor, in the dtype in which `like` is computed.

    Raises TypeError or ValueError if it is neither.
    """
    dtype = compute_dtype(like.dtype)
    if isinstance(value, Tensor):
        check_floating_tensor(argument, value)
        if value.numel() != 1:
            reject(argument, "a number or a tensor of one element", tuple(value.shape))
        if value.device.type != "cpu":  # a number on the CPU goes with any device, as in torch
            checks.check_device(argument, value, "the features", like)
        cast = value.reshape(()).to(device=like.device, dtype=dtype)
        if value.dtype == torch.float64 and dtype != torch.float64:
            _check_range(argument, value, cast)
        return cast
    value = checks.check_number(argument, value, dtype, "a number or a tensor of one element")
    return torch.full((), value, dtype=dtype, device=like.device)


def _check_range(argument: str, value: Tensor, cast: Tensor) -> None:
    """Raises ValueError where a finite number is infinite as it is used."""
    if checks.may_read_values(value) and bool(value.isfinite()) and not bool(cast.isfinite()):
        most = torch.finfo(cast.dtype).max
        reject(argument, f"a number of at most {most:.4g}", value.item())


def _check_temperature(temperature: Any, like: Tensor) -> Tensor:
    """1 / temperature, the factor of the logits."""
    result = scalar("temperature", temperature, like)
    if not isinstance(temperature, Tensor):
        got = temperature
    elif checks.may_read_values(temperature):
        got = temperature.item()
    else:
        return 1.0 / result
    dtype = compute_dtype(like.dtype)
    if not got > 0 or not 1.0 / got <= torch.finfo(dtype).max:
        reject("temperature", f"a positive number that has a reciprocal in {dtype}", got)
    return 1.0 / result


def _cast_and_check_pair(
    first: tuple[str, Tensor], second: tuple[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Two (N, D) tensors of one shape, dtype and device, cast for autocast."""
    (name, x), (other_name, y) = first, second
    x, y = checks.cast_alike((name, other_name), (x, y))
    for argument, tensor in ((name, x), (other_name, y)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            reject(argument, "shape (N, D) of at least 1 each", tuple(tensor.shape))
        checks.check_sizes(argument, tensor, _LIMITS[2])
    if x.shape != y.shape:
        reject(other_name, f"the shape of {name}, {tuple(x.shape)}", tuple(y.shape))
    return x, y


def _cast_and_check_towers(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What clip_loss and siglip_loss are called with."""
    image, text = _cast_and_check_pair(
        ("image_features", image_features), ("text_features", text_features)
    )
    scale = scalar("logit_scale", logit_scale, image)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, image)
    return image, text, scale, bias


def _cast_and_check_itc(
    image: Tensor,
    text: Tensor,
    image_momentum: Tensor | None,
    text_momentum: Tensor | None,
    image_queue: Tensor | None,
    text_queue: Tensor | None,
) -> tuple[Any, ...]:
    """Features, momentum features, keys and queues (or None) of image and text."""
    optional = {
        "image_momentum": image_momentum,
        "text_momentum": text_momentum,
        "image_queue": image_queue,
        "text_queue": text_queue,
    }
    given = {"image_features": image, "text_features": text}
    given.update({name: tensor for name, tensor in optional.items() if tensor is not None})
    names = list(given)
    cast = dict(zip(names, checks.cast_alike(names, list(given.values())), strict=True))
    image, text = cast["image_features"], cast["text_features"]
    if image.dim() not in (2, 3) or 0 in image.shape:
        expected = "shape (N, D) or (N, queries, D) of at least 1 each"
        reject("image_features", expected, tuple(image.shape))
    checks.check_sizes("image_features", image, _LIMITS[image.dim()])
    n, dim = image.shape[0], image.shape[-1]
    for name in names[1:]:
        tensor = cast[name]
        item = tuple(image.shape[1:]) if name.startswith("image") else (dim,)
        size = "Q" if name.endswith("queue") else n
        if tuple(tensor.shape[1:]) != item or (size != "Q" and tensor.shape[0] != n):
            reject(name, f"shape {(size, *item)}", tuple(tensor.shape))
        checks.check_sizes(name, tensor, _LIMITS[tensor.dim()])

    def key(features: Tensor, modality: str) -> tuple[Tensor, Tensor, Tensor | None]:
        momentum, queue = cast.get(f"{modality}_momentum"), cast.get(f"{modality}_queue")
        target = features.detach() if momentum is None else momentum.detach()
        own_key = features if momentum is None else target
        return target, own_key, None if queue is None else queue.detach()

    image_target, image_key, more_images = key(image, "image")
    text_target, text_key, more_texts = key(text, "text")
    return image, text, image_target, text_target, image_key, text_key, more_images, more_texts


def _keys(own: Tensor, queue: Tensor | None, ranks: Ranks | None) -> Tensor:
    """The keys of all ranks, and the queue's, which all ranks hold alike."""
    keys = everyone(own, ranks)
    return keys if queue is None else torch.cat((keys, queue))


def _refuse_ring(group: Any, keys_needed: bool) -> None:
    if group is None or not keys_needed:
        return
    if isinstance(group, Ring):
        raise NotImplementedError(
            "group: momentum features, queues and alpha need the keys of all ranks at once; "
            "expected a process group, got a Ring"
        )
