"""Launch configurations of attention (see launch.py)."""

from vlmfast.kernels.launch import PLAIN, REPEATS, UNLIMITED, Table, rows, table

_FORWARD_90 = rows(
    (64, 64, 64, 64, 4, 3),
    (64, UNLIMITED, 128, 64, 4, 3, PLAIN),
    (64, UNLIMITED, 128, 64, 8, 3),
    (112, 64, 64, 64, 4, 2),
    (96, UNLIMITED, 128, 64, 8, 2),
    (112, UNLIMITED, 128, 64, 8, 2, PLAIN),
    (128, 64, 64, 64, 4, 2, PLAIN),
    (128, UNLIMITED, 128, 64, 8, 2, PLAIN),
    (128, UNLIMITED, 128, 32, 8, 2),
    (256, UNLIMITED, 128, 64, 8, 2, PLAIN),
    (256, UNLIMITED, 64, 32, 8, 2, REPEATS),  # with 4 warps, or 128 queries, a bias spills
)

_FORWARD = table(
    sm_90=_FORWARD_90,
    sm_100=_FORWARD_90,
    mma_sync=rows(
        (64, 64, 64, 64, 4, 2, PLAIN),
        (64, UNLIMITED, 128, 64, 8, 3, PLAIN),
        (64, UNLIMITED, 64, 32, 4, 2),
        (128, 64, 64, 32, 4, 2),
        (128, UNLIMITED, 128, 64, 8, 2, PLAIN),
        (128, UNLIMITED, 64, 32, 4, 2),
        (256, UNLIMITED, 64, 32, 8, 2),
    ),
    tf32=rows(
        (64, UNLIMITED, 64, 32, 8, 2),
        (128, UNLIMITED, 64, 32, 8, 1),
        (256, UNLIMITED, 32, 32, 8, 1),
    ),
    ieee=rows(
        (64, UNLIMITED, 64, 32, 8, 2, PLAIN),
        (64, UNLIMITED, 32, 32, 4, 1),
        (128, UNLIMITED, 64, 32, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
)

_BACKWARD_KEY_VALUE_90 = rows(
    (64, UNLIMITED, 64, 128, 8, 2),
    (96, UNLIMITED, 64, 64, 4, 2, PLAIN),
    (80, UNLIMITED, 32, 64, 4, 2),
    (128, UNLIMITED, 32, 64, 4, 2, PLAIN),
    (128, UNLIMITED, 16, 128, 8, 2),
    (256, UNLIMITED, 64, 32, 8, 1),
)

_BACKWARD_KEY_VALUE = table(
    sm_90=_BACKWARD_KEY_VALUE_90,
    sm_100=_BACKWARD_KEY_VALUE_90,
    mma_sync=rows(
        (64, UNLIMITED, 64, 128, 8, 2, PLAIN),
        (64, UNLIMITED, 32, 64, 4, 2),
        (112, UNLIMITED, 32, 64, 8, 2, PLAIN),
        (112, UNLIMITED, 32, 32, 4, 1),
        (128, UNLIMITED, 64, 64, 8, 2),
        (256, UNLIMITED, 32, 32, 8, 1),
    ),
    tf32=rows(
        (64, UNLIMITED, 32, 32, 8, 1),
        (128, UNLIMITED, 16, 32, 8, 1),
        (256, UNLIMITED, 16, 16, 8, 1),
    ),
    ieee=rows((128, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 16, 16, 4, 1)),
)

_BACKWARD_QUERY_90 = rows(
    (64, UNLIMITED, 128, 64, 8, 2),
    (128, UNLIMITED, 128, 32, 8, 2),
    (256, UNLIMITED, 128, 32, 8, 1, PLAIN),
    (256, UNLIMITED, 32, 64, 8, 1, REPEATS),  # with 4 warps, or 128 queries, it spills
)

_BACKWARD_QUERY = table(
    sm_90=_BACKWARD_QUERY_90,
    sm_100=_BACKWARD_QUERY_90,
    mma_sync=rows(
        (64, UNLIMITED, 128, 64, 8, 2, PLAIN),
        (64, UNLIMITED, 64, 32, 4, 2),
        (128, UNLIMITED, 128, 32, 8, 2),
        (256, UNLIMITED, 32, 64, 8, 1),
    ),
    tf32=rows(
        (64, UNLIMITED, 32, 32, 8, 1),
        (128, UNLIMITED, 32, 16, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    ieee=rows((128, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 16, 32, 8, 1)),
)

_BACKWARD_WHOLE = table(
    sm_90=rows(
        (64, 64, 64, 64, 4, 1, PLAIN),
        (64, 64, 32, 64, 4, 1),
        (64, 128, 32, 128, 8, 2),
        (64, 256, 32, 128, 8, 2, PLAIN, REPEATS),  # its grad_query; 4 warps spill
        (128, 64, 32, 64, 4, 1, PLAIN),
    ),
    sm_100=rows(
        (64, 64, 64, 64, 8, 1),
        (64, 128, 32, 128, 8, 2),
        (64, 256, 16, 128, 8, 1, PLAIN),
        (80, 128, 32, 128, 8, 1),
        (128, 64, 32, 64, 8, 1),
    ),
    mma_sync=rows(
        (64, 64, 32, 64, 8, 2),
        (64, 128, 32, 128, 8, 2),
        (128, 64, 32, 64, 8, 1),
    ),
    tf32=(),
    ieee=(),
)

# Only with a float mask, hence never PLAIN.
_BACKWARD_STATISTICS_90 = rows((128, UNLIMITED, 128, 64, 8, 2), (256, UNLIMITED, 64, 64, 8, 2))

_BACKWARD_STATISTICS_FLOAT = rows((128, UNLIMITED, 64, 32, 8, 1), (256, UNLIMITED, 16, 32, 8, 1))

_BACKWARD_STATISTICS = table(
    sm_90=_BACKWARD_STATISTICS_90,
    sm_100=_BACKWARD_STATISTICS_90,
    mma_sync=rows((128, UNLIMITED, 64, 32, 4, 2), (256, UNLIMITED, 32, 32, 8, 2)),
    tf32=_BACKWARD_STATISTICS_FLOAT,
    ieee=_BACKWARD_STATISTICS_FLOAT,
)

_BACKWARD_MASK_HALF = rows((128, UNLIMITED, 64, 64, 4, 1), (256, UNLIMITED, 64, 32, 8, 1))

_BACKWARD_MASK = table(
    sm_90=_BACKWARD_MASK_HALF,
    sm_100=_BACKWARD_MASK_HALF,
    mma_sync=_BACKWARD_MASK_HALF,
    tf32=rows((64, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 16, 32, 8, 1)),
    ieee=rows((64, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 32, 16, 8, 1)),
)

_BACKWARD_DELTA_ROWS = rows((256, UNLIMITED, 64, 0, 4, 1))

_BACKWARD_DELTA = table(*(_BACKWARD_DELTA_ROWS for _ in range(5)))

TABLES: dict[str, Table] = {
    "flash_attention_fwd": _FORWARD,
    "flash_attention_bwd_statistics": _BACKWARD_STATISTICS,
    "flash_attention_bwd_key_value": _BACKWARD_KEY_VALUE,
    "flash_attention_bwd_query": _BACKWARD_QUERY,
    "flash_attention_bwd_whole": _BACKWARD_WHOLE,
    "flash_attention_bwd_mask": _BACKWARD_MASK,
    "flash_attention_bwd_delta": _BACKWARD_DELTA,
}
