"""Launch configurations of the contrastive losses (see launch.py)."""

from vlmfast.kernels.launch import PLAIN, UNLIMITED, Table, rows, table

# The feature dimension is walked, so that any fits. PLAIN: one query a row; several keep the
# largest product and its query beside the running one.
_CONTRASTIVE_FLOAT = rows(
    (UNLIMITED, UNLIMITED, 64, 64, 8, 2, PLAIN),
    (UNLIMITED, UNLIMITED, 32, 64, 8, 2),
)

_CONTRASTIVE_90 = rows(
    (UNLIMITED, UNLIMITED, 128, 64, 8, 4, PLAIN),
    (UNLIMITED, UNLIMITED, 64, 64, 8, 3),
)

_CONTRASTIVE = table(
    sm_90=_CONTRASTIVE_90,
    sm_100=_CONTRASTIVE_90,
    mma_sync=rows(
        (UNLIMITED, UNLIMITED, 128, 64, 8, 3, PLAIN),
        (UNLIMITED, UNLIMITED, 64, 64, 8, 2),
    ),
    tf32=_CONTRASTIVE_FLOAT,
    ieee=_CONTRASTIVE_FLOAT,
)

TABLES: dict[str, Table] = {
    "contrastive_loss_fwd": _CONTRASTIVE,
    "contrastive_loss_bwd": _CONTRASTIVE,
}
