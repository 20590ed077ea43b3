"""Launch configurations of the contrastive losses (see launch.py)."""

from vlmfast.kernels.launch import PLAIN, UNLIMITED, Table, rows, table

# The feature dimension is walked, so that any fits. PLAIN: one query a row; several keep the
# largest product and its query beside the running one.
_FLOAT = rows(
    (UNLIMITED, UNLIMITED, 64, 64, 8, 2, PLAIN),
    (UNLIMITED, UNLIMITED, 32, 64, 8, 2),
)

_MMA_SYNC = rows(
    (UNLIMITED, UNLIMITED, 128, 64, 8, 3, PLAIN),
    (UNLIMITED, UNLIMITED, 64, 64, 8, 2),
)

_FORWARD_90 = rows(
    (UNLIMITED, UNLIMITED, 128, 64, 8, 4, PLAIN),
    (UNLIMITED, UNLIMITED, 64, 64, 8, 3),
)

_BACKWARD_90 = rows(
    (UNLIMITED, UNLIMITED, 128, 128, 8, 3, PLAIN),
    (UNLIMITED, UNLIMITED, 128, 64, 8, 4),
)

# Tiles of 128 x 128 would spill; in float32 without tensor cores, those of 64 x 64.
_SIGMOID_90 = rows((UNLIMITED, UNLIMITED, 128, 64, 8, 4))

_OTHERS = {"mma_sync": _MMA_SYNC, "tf32": _FLOAT, "ieee": _FLOAT}

TABLES: dict[str, Table] = {
    "contrastive_loss_fwd": table(sm_90=_FORWARD_90, sm_100=_FORWARD_90, **_OTHERS),
    "contrastive_loss_bwd": table(sm_90=_BACKWARD_90, sm_100=_FORWARD_90, **_OTHERS),
    "contrastive_loss_bwd_sigmoid": table(
        sm_90=_SIGMOID_90,
        sm_100=_SIGMOID_90,
        mma_sync=rows((UNLIMITED, UNLIMITED, 128, 64, 8, 3)),
        tf32=rows((UNLIMITED, UNLIMITED, 64, 64, 8, 2)),
        ieee=rows((UNLIMITED, UNLIMITED, 32, 64, 8, 2)),
    ),
}
