"""Drop-in modules on fused kernels: same constructor arguments, state-dict keys and numbers."""

from vlmfast.nn.contrastive_loss import ClipLoss, NTXentLoss, SigLipLoss
from vlmfast.nn.flash_attention import MultiheadAttention

__all__ = ["ClipLoss", "MultiheadAttention", "NTXentLoss", "SigLipLoss"]
