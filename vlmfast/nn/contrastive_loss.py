"""Contrastive losses as modules: those of open_clip and lightly on vlmfast's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.checks import (
    check_flag,
    check_integer,
    check_number,
    reject,
    reject_type,
)
from vlmfast.functional.contrastive_loss import named_ntxent_loss

__all__ = ["ClipLoss", "NTXentLoss", "SigLipLoss"]


class ClipLoss(nn.Module):
    r"""`open_clip.ClipLoss` on vlmfast's kernels: no N x N matrix is ever held.

    .. math::
        L = \frac{1}{2N} \sum_i \left[ -\log \frac{e^{S_{ii}}}{\sum_j e^{S_{ij}}}
            - \log \frac{e^{S_{ii}}}{\sum_j e^{S_{ji}}} \right],
        \quad S_{ij} = \text{scale} \cdot \langle I_i, T_j \rangle + \text{bias}

    Constructor and call are open_clip's, defaults included (Radford et al., "Learning Transferable
    Visual Models From Natural Language Supervision", 2021). With `world_size` > 1 all ranks of the
    default process group, or of `group`, must call it together. Which gradients the four
    combinations of `local_loss` and `gather_with_grad` give is told in
    `vlmfast.functional.clip_loss`; after DistributedDataParallel's averaging those of the whole
    batch, but for `gather_with_grad=False`.

    Args:
        local_loss: each rank returns the loss of its own pairs, instead of the whole batch's.
        gather_with_grad: this rank's loss gives a gradient to the features of other ranks as well.
        cache_labels: without effect, as there are no labels to cache.
        rank, world_size: of this process, as torch.distributed has them.
        use_horovod: must be False.

    Attributes:
        backend: the backend of the kernels (see `vlmfast.use_backend`); None, the default, chooses
            by the inputs.
        group: the process group, if not the default one, or a `vlmfast.distributed.Ring`.

    Shapes:
        image_features, text_features (N, D), normalised, of one dtype; logit_scale (exponentiated)
        and logit_bias: tensors of one element or numbers. The loss is a scalar, in float32 for
        half-precision features.

    Raises:
        TypeError, ValueError: as `vlmfast.functional.clip_loss`; also, if `rank` and `world_size`
            are not those of the process group.
        NotImplementedError: `use_horovod`.
    """

    backend: str | None = None
    group: Any = None

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        _check_ranks(rank, world_size)
        self.local_loss = check_flag("local_loss", local_loss)
        self.gather_with_grad = check_flag("gather_with_grad", gather_with_grad)
        self.cache_labels = check_flag("cache_labels", cache_labels)
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = check_flag("use_horovod", use_horovod)
        _refuse_horovod(self)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        # patch gives this method to open_clip's loss: rely on attributes that both classes have.
        _refuse_horovod(self)
        loss = VF.clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group=_group(self),
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if check_flag("output_dict", output_dict) else loss


class SigLipLoss(nn.Module):
    r"""`open_clip.SigLipLoss` on vlmfast's kernels: no N x N matrix is ever held.

    .. math::
        L = -\frac{1}{N} \sum_{i,j} \log \sigma\left(
            z_{ij} (\text{scale} \cdot \langle I_i, T_j \rangle + \text{bias}) \right),
        \quad z_{ii} = 1, \; z_{ij} = -1

    Constructor and call are open_clip's (Zhai et al., "Sigmoid Loss for Language Image
    Pre-Training", 2023). With `world_size` > 1 all ranks of the default process group, or of
    `group`, must call it together; each returns the loss of its own images with all texts.

    Args:
        cache_labels: without effect, as there are no labels to cache.
        rank, world_size: of this process, as torch.distributed has them.
        dist_impl: how the texts of other ranks come here. "bidir" (the default) and "shift" pass
            them around a ring, in memory for two ranks' texts; "gather" and "reduce" gather all of
            them. The numbers are the same but for rounding.

    Attributes:
        backend, group: see `ClipLoss`. A `vlmfast.distributed.Ring` as group overrides dist_impl.

    Raises:
        TypeError, ValueError: as `vlmfast.functional.siglip_loss`; an unknown `dist_impl`; `rank`
            and `world_size` are not those of the process group.
    """

    backend: str | None = None
    group: Any = None

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        _check_ranks(rank, world_size)
        if dist_impl is not None and not isinstance(dist_impl, str):
            reject_type("dist_impl", "a string or None", type(dist_impl).__name__)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            reject("dist_impl", "bidir, shift, reduce, gather or None", repr(dist_impl))
        self.cache_labels = check_flag("cache_labels", cache_labels)
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        loss = VF.siglip_loss(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            group=_group(self, ring=self.dist_impl in ("bidir", "shift")),
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if check_flag("output_dict", output_dict) else loss


class NTXentLoss(nn.Module):
    r"""`lightly.loss.NTXentLoss` on vlmfast's kernels: no 2N x 2N matrix is ever held.

    .. math::
        L = -\frac{1}{2N} \sum_{i} \log
            \frac{e^{S_{i, p(i)}}}{\sum_{j \neq i} e^{S_{ij}}},
        \quad S_{ij} = \langle z_i, z_j \rangle / t

    over the 2N normalised rows z of both views, p(i) being the other view of i; t = temperature
    (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020).

    Args:
        temperature: positive.
        memory_bank_size: must be 0: there is no fused loss against a memory bank.
        gather_distributed: take the rows of all ranks of the default process group (or of
            `group`) as negatives; each rank returns the mean over its own rows, and gradients are
            those of the whole batch after DistributedDataParallel's averaging.

    Attributes:
        backend, group: see `ClipLoss`.

    Shapes:
        out0, out1 (N, D), of one dtype; normalised inside. The loss is a scalar.

    Raises:
        TypeError, ValueError: as `vlmfast.functional.ntxent_loss`; a temperature that is not
            positive.
        NotImplementedError: a memory bank is asked for.
    """

    backend: str | None = None
    group: Any = None

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        if not check_number("temperature", temperature) > 0:
            reject("temperature", "a positive number", temperature)
        several = isinstance(memory_bank_size, (tuple, list)) and len(memory_bank_size) > 0
        size = memory_bank_size[0] if several else memory_bank_size  # type: ignore[index]
        if check_integer("memory_bank_size", size):
            raise NotImplementedError(
                f"memory_bank_size: expected 0, got {memory_bank_size}; losses against a memory "
                "bank (MoCo) are not fused"
            )
        self.temperature = temperature
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        group = self.group
        if group is None and self.gather_distributed and dist.is_initialized():
            group = dist.group.WORLD
        views = ("out0", out0), ("out1", out1)
        return named_ntxent_loss(*views, self.temperature, group, self.backend)


def _check_ranks(rank: Any, world_size: Any) -> None:
    """Raises TypeError or ValueError unless 0 <= rank < world_size."""
    check_integer("world_size", world_size, least=1)
    if check_integer("rank", rank) >= world_size:
        reject("rank", f"0 <= rank < world_size = {world_size}", rank)


def _refuse_horovod(loss: Any) -> None:
    if loss.use_horovod:
        raise NotImplementedError(
            "use_horovod: expected False, got True; ranks are those of torch.distributed"
        )


def _group(loss: Any, ring: bool = False) -> Any:
    """The group that a loss of open_clip's constructor runs on; `ring`: passing columns around."""
    group = getattr(loss, "group", None)
    if loss.world_size == 1 and group is None:
        return None
    from vlmfast import distributed

    if group is None:
        if not dist.is_initialized():
            expected = "1, unless torch.distributed.init_process_group was called"
            reject("world_size", expected, loss.world_size)
        group = distributed.Ring() if ring else dist.group.WORLD
    for name, own, actual in (
        ("world_size", loss.world_size, distributed.world_size(group)),
        ("rank", loss.rank, distributed.rank_in(group)),
    ):
        if own != actual:
            reject(name, f"{actual}, as in the process group", own)
    return group
