"""What several families share: calls, truths, and how far torch itself is off."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure import Call, Truth, Work
from vlmfast.verify.common import relative_error

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key, value


def normal_numbers(seed: int, device: str) -> Callable[..., Tensor]:
    """Draws float32 tensors of a shape, on the device: a large batch takes a CPU its time."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def make_call(
    forward: Callable[[], Tensor],
    sources: Sequence[Tensor],
    grad_out: Tensor | None,
    mode: str,
) -> Call:
    """The call to be timed, without arguments.

    It returns (out,) for "fwd", the gradients of `sources` for "bwd" (of a forward pass done here,
    once), and (out, gradients) for "fwd+bwd".
    """

    def both() -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, sources, grad_out))

    if mode == "fwd":
        return lambda: (forward(),)
    if mode == "fwd+bwd":
        return both
    out = forward()
    return lambda: torch.autograd.grad(out, sources, grad_out, retain_graph=True)


def worst_errors(runs: Iterable[tuple[Sequence[Tensor], Sequence[Truth]]]) -> list[float]:
    """The largest error of each result over runs of (results, truths): a yardstick each."""
    errors = [
        [relative_error(result, *truth) for result, truth in zip(*run, strict=True)] for run in runs
    ]
    return [max(column) for column in zip(*errors, strict=True)]


@dataclass(frozen=True)
class AttentionInputs:
    """query (B, H, L, D), key and value (B, H, ..., D), and the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value)

    def map(self, function: Callable[[Tensor], Tensor]) -> "AttentionInputs":
        """Applies `function` to every tensor; those that require a gradient still do."""
        tensors = (*self.sources, self.grad_out)
        return AttentionInputs(*(function(x).requires_grad_(x.requires_grad) for x in tensors))

    def head(self, batch: int, head: int) -> "AttentionInputs":
        """One head of one batch element as leaves of their own."""
        return self.map(lambda x: x.detach()[batch : batch + 1, head : head + 1])

    def element(self, batch: int) -> "AttentionInputs":
        """One batch element as leaves of their own."""
        return self.map(lambda x: x.detach()[batch : batch + 1])

    def double(self) -> "AttentionInputs":
        return self.map(lambda x: x.detach().double())


def attention_call(attention: Attention, inputs: AttentionInputs, mode: str) -> Call:
    """`make_call` of an attention: its gradients are those of query, key and value."""
    return make_call(lambda: attention(*inputs.sources), inputs.sources, inputs.grad_out, mode)


def by_heads(
    inputs: AttentionInputs, truth: Callable[[AttentionInputs], tuple[Tensor, ...]]
) -> tuple[Truth, ...]:
    """The truths of a whole call, computed head after head: they hold their scores in memory.

    On a GPU, where launching takes longer, all heads of a batch element at once.
    """
    if inputs.query.is_cuda:
        return by_elements(inputs, truth)
    grid = inputs.query.shape[:2]
    heads = [truth(inputs.head(b, h)) for b in range(grid[0]) for h in range(grid[1])]
    return tuple(
        Truth(torch.cat(results).unflatten(0, grid).squeeze(2))
        for results in zip(*heads, strict=True)
    )


def by_elements(
    inputs: AttentionInputs, truth: Callable[[AttentionInputs], tuple[Tensor, ...]]
) -> tuple[Truth, ...]:
    """The truths of a whole call, computed batch element after batch element."""
    elements = [truth(inputs.element(batch)) for batch in range(inputs.query.shape[0])]
    return tuple(Truth(torch.cat(results)) for results in zip(*elements, strict=True))


def head_errors(
    heads: Iterable[AttentionInputs],
    attention: Attention,
    truth: Callable[[AttentionInputs], tuple[Tensor, ...]],
    mode: str,
) -> list[float]:
    """The worst errors of an attention over heads, one for each result of a call."""
    return worst_errors(
        (attention_call(attention, head, mode)(), [Truth(x) for x in truth(head)]) for head in heads
    )


def attention_work(
    pairs: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, mode: str
) -> Work:
    """What softmax attention cannot do without.

    With P pairs of a query and a key that it sees, forward is two products, 4 P D; backward is five
    (the scores again, dP, dV, dQ, dK), 10 P D; each takes P exponentials. Forward reads query, key
    and value and writes the output, and the float32 logsumexp if there is a backward to come;
    backward reads all these and the output's gradient, and writes three gradients.

    Args:
        pairs: of all batch elements and heads together, as `queries` and `keys`.
        queries: rows of query and output.
        keys: rows of key and of value.
        head_dim: elements of a row.
        dtype: of all of them.
        mode: fwd, bwd or fwd+bwd.
    """
    row = head_dim * dtype.itemsize
    inputs, out = (queries + 2 * keys) * row, queries * row
    logsumexp = queries * torch.float32.itemsize
    forward, backward = inputs + out, inputs + 2 * out + logsumexp + inputs
    products, passes, least_bytes = {
        "fwd": (2, 1, forward),
        "bwd": (5, 1, backward),
        "fwd+bwd": (7, 2, forward + logsumexp + backward),
    }[mode]
    return Work(products * 2 * pairs * head_dim, least_bytes, passes * pairs)
