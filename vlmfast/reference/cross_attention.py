"""Masked per-image cross-attention in plain PyTorch: what every kernel of it must compute."""

import torch
from torch import Tensor

from vlmfast.reference.common import compute_dtype

# Rows of `image_index` that are no image.
ZERO, UNIFORM, DENSE = 0, -1, -2


def _sees(image_index: Tensor, visible: Tensor | None, images: int) -> Tensor:
    """(B, T, I) bool: the images that a token attends to."""
    if visible is not None:
        return visible
    numbers = torch.arange(1, images + 1, device=image_index.device)
    return image_index[..., None] == numbers


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor, valid: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each token to the valid latents of the images that it sees.

    Whatever a token does not attend to is replaced by 0 before it is multiplied, and by the same
    token the gradient stays apart: 0 times NaN would be NaN.
    """
    key = key.masked_fill(~valid[:, None, ..., None], 0.0)
    value = value.masked_fill(~valid[:, None, ..., None], 0.0)
    seen = sees.transpose(1, 2)[:, None, :, :, None]  # (B, 1, I, T, 1)
    attended = seen & valid[:, None, :, None, :]  # (B, 1, I, T, L)

    logits = scale * (query.unsqueeze(2).where(seen, 0.0) @ key.transpose(-2, -1))
    logits = logits.masked_fill(~attended, -torch.inf)
    # The maximum only shifts exponents, so it carries no gradient; a row of -inf is shifted by 0.
    batch, heads, images, tokens, latents = logits.shape
    if images * latents:
        row_max = logits.detach().amax((2, 4), keepdim=True)
        row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    else:
        row_max = logits.new_zeros(batch, heads, 1, tokens, 1)
    weights = torch.exp(logits - row_max)
    total = weights.sum((2, 4), keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    logsumexp = (total.log() + row_max).masked_fill(empty, -torch.inf)
    weights = (weights / total).where(attended, 0.0)
    out = (weights @ value).where(seen, 0.0).sum(2)
    return out, logsumexp[:, :, 0, :, 0]


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_index: Tensor,
    visible: Tensor | None,
    order: Tensor,
    segments: Tensor,
    image_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each text token to the latents of its image, or of its images.

        logits_ij = scale * query_i . key_j         for latents j of the images that token i sees
        logsumexp = log(sum_j exp(logits_j))
        out       = sum_j exp(logits_j - logsumexp) value_j

    A token that sees no latent has out 0, logsumexp -inf and gradients 0. What a token does not
    see, NaN included, reaches neither its output nor its gradient.

    Args:
        query: (B, Hq, T, D), any floating dtype.
        key: (B, Hkv, I, L, D), L latents of each of I images; query head h reads head
            h // (Hq // Hkv).
        value: (B, Hkv, I, L, Dv).
        image_index: (B, T) int32. 1 to I: the token's image. 0: it sees none. -1: its output is the
            mean of all values (and its logsumexp log(I * L), of logits that are all 0). -2: it
            attends to every latent of every image. -1 and -2 ignore image_lengths.
        visible: None, or (B, T, I) bool: the images that a token sees, where they may be several;
            all of them where image_index is -2. A positive image_index then only says that this
            decides.
        order: unused here; kernels find an image's tokens by it. (B, N) int32: in
            order[b, segments[b, j, 0]:segments[b, j, 2]] stand the tokens that see image j, each
            once, increasing up to segments[b, j, 1] and again from there: first those that
            image_lengths binds, then those that it does not.
        segments: unused here. (B, I, 3) int32.
        image_lengths: None, or (B, I) int32: how many latents of each image exist.
        scale: factor of the logits.

    Returns:
        out (B, Hq, T, Dv) in query's dtype; logsumexp (B, Hq, T), float32 or query's if wider.

    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022),
    section 2.1.3 and appendix A.1.3.
    """
    dtype = compute_dtype(query.dtype)
    group = query.shape[1] // max(key.shape[1], 1)
    images, latents = key.shape[2:4]
    key = key.to(dtype).repeat_interleave(group, dim=1)
    value = value.to(dtype).repeat_interleave(group, dim=1)
    numbers = torch.arange(latents, device=query.device)
    everything = torch.ones(key.shape[0], images, latents, dtype=torch.bool, device=query.device)
    valid = everything if image_lengths is None else numbers < image_lengths[..., None]
    sees = _sees(image_index, visible, images)

    dense = (image_index == DENSE)[:, None, :]
    uniform = (image_index == UNIFORM)[:, None, :]
    bound = sees & ~dense.squeeze(1)[..., None] if image_lengths is not None else sees
    out, logsumexp = _attend(query.to(dtype), key, value, bound, valid, scale)
    if image_lengths is not None and visible is not None:
        free = sees & dense.squeeze(1)[..., None]
        free_out, free_logsumexp = _attend(query.to(dtype), key, value, free, everything, scale)
        out = torch.where(dense[..., None], free_out, out)
        logsumexp = torch.where(dense, free_logsumexp, logsumexp)
    if images * latents:
        mean = value.mean((2, 3))[:, :, None]
        out = torch.where(uniform[..., None], mean, out)
        logsumexp = torch.where(uniform, mean.new_tensor(images * latents).log(), logsumexp)
    return out.to(query.dtype), logsumexp
