"""What the references share: the dtype they compute in and the random numbers of dropout."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes: float32 for half precision, otherwise its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _multiply_32(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * multiplier; split in halves so that no int64 overflows."""
    low = (x & 0xFFFF) * multiplier
    high = (x >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors that broadcast, each holding a 32-bit word.
        seed: int64 tensor of one element; its low and high 32 bits are the two words of the key.

    Returns:
        Four int64 tensors of the broadcast shape, each element uniform in [0, 2**32).
    """
    seed = seed.reshape(())
    key_0, key_1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    word_0, word_1, word_2, word_3 = counter
    for _ in range(10):
        high_0, low_0 = _multiply_32(word_0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply_32(word_2, _MULTIPLIERS[1])
        word_0, word_1 = high_1 ^ word_1 ^ key_0, low_1
        word_2, word_3 = high_0 ^ word_3 ^ key_1, low_0
        key_0 = (key_0 + _KEY_INCREMENTS[0]) & _LOW_32
        key_1 = (key_1 + _KEY_INCREMENTS[1]) & _LOW_32
    return word_0, word_1, word_2, word_3


def dropout_keep_mask(
    batch: int, heads: int, rows: int, columns: int, dropout_p: float, seed: Tensor
) -> Tensor:
    """Which attention weights dropout keeps, as every kernel of the package decides it.

    Element (b, h, i, j) is kept iff word j % 4 of
    philox(counter=(j // 4, i, b * heads + h, 0), key=seed) is at least
    min(floor(dropout_p * 2**32), 2**32 - 1); with dropout_p == 1 nothing is kept.

    Returns:
        bool tensor (batch, heads, rows, columns), True = keep, on the seed's device.
    """
    device = seed.device
    if dropout_p >= 1.0:
        return torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=device)
    column_group = torch.arange((columns + 3) // 4, device=device)
    row = torch.arange(rows, device=device)[:, None]
    head = torch.arange(batch * heads, device=device)[:, None, None]
    words = philox((column_group, row, head, torch.zeros_like(column_group)), seed)
    threshold = min(int(dropout_p * 2**32), _LOW_32)
    keep = torch.stack(words, dim=-1).flatten(-2)[..., :columns] >= threshold
    return keep.unflatten(0, (batch, heads))
