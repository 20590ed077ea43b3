"""Launch configurations of cross-attention (see launch.py)."""

from vlmfast.kernels.launch import REPEATS, UNLIMITED, Table, rows, table

_CROSS_FORWARD_90 = rows(
    (96, UNLIMITED, 64, 64, 4, 2), (128, UNLIMITED, 64, 64, 4, 1), (256, UNLIMITED, 64, 32, 4, 1)
)

_CROSS_FORWARD = table(
    sm_90=_CROSS_FORWARD_90,
    sm_100=_CROSS_FORWARD_90,
    mma_sync=rows(
        (64, UNLIMITED, 64, 64, 4, 2),
        (128, UNLIMITED, 64, 32, 4, 2),
        (256, UNLIMITED, 32, 32, 8, 1),
    ),
    tf32=rows(
        (64, UNLIMITED, 64, 32, 8, 1),
        (128, UNLIMITED, 32, 32, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    ieee=rows(
        (64, UNLIMITED, 32, 32, 8, 1),
        (128, UNLIMITED, 32, 32, 4, 1),
        (256, UNLIMITED, 16, 16, 8, 1),
    ),
)

_CROSS_KEY_VALUE_90 = rows(
    (80, UNLIMITED, 64, 64, 4, 1),
    (128, UNLIMITED, 32, 64, 4, 1),
    (256, UNLIMITED, 32, 32, 8, 1, REPEATS),  # with 4 warps it spills
)

_CROSS_KEY_VALUE = table(
    sm_90=_CROSS_KEY_VALUE_90,
    sm_100=_CROSS_KEY_VALUE_90,
    mma_sync=rows(
        (64, UNLIMITED, 32, 64, 4, 1),
        (128, UNLIMITED, 32, 64, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    tf32=rows((64, UNLIMITED, 16, 32, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
    ieee=rows((128, UNLIMITED, 16, 32, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
)

# The whole image is one block of latents.
_CROSS_WHOLE = table(
    # 81 to 112 columns have a tile of 32, which 4 warps multiply twice.
    sm_90=rows((80, 64, 32, 64, 4, 1), (112, 64, 32, 64, 4, 1, REPEATS), (128, 64, 32, 64, 4, 1)),
    sm_100=rows((80, 64, 64, 64, 8, 1), (128, 64, 32, 64, 8, 1)),
    mma_sync=rows((64, 64, 32, 64, 8, 1), (128, 64, 32, 64, 8, 1)),
    tf32=(),
    ieee=(),
)

_CROSS_QUERY_90 = rows(
    (128, UNLIMITED, 64, 64, 4, 1),
    (256, UNLIMITED, 32, 32, 4, 1),
)

_CROSS_QUERY = table(
    sm_90=_CROSS_QUERY_90,
    sm_100=_CROSS_QUERY_90,
    mma_sync=rows(
        (64, UNLIMITED, 64, 32, 4, 1),
        (128, UNLIMITED, 64, 32, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    tf32=rows((64, UNLIMITED, 32, 16, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
    ieee=rows((128, UNLIMITED, 32, 16, 8, 1), (256, UNLIMITED, 16, 32, 8, 1)),
)

_CROSS_ROWS = rows((256, UNLIMITED, 32, 32, 4, 1))

_CROSS_EVERY_ROW = table(*(_CROSS_ROWS for _ in range(5)))

TABLES: dict[str, Table] = {
    "cross_attention_fwd": _CROSS_FORWARD,
    "cross_attention_fill": _CROSS_EVERY_ROW,
    "cross_attention_bwd_key_value": _CROSS_KEY_VALUE,
    "cross_attention_bwd_whole": _CROSS_WHOLE,
    "cross_attention_bwd_query": _CROSS_QUERY,
    "cross_attention_bwd_uniform": _CROSS_EVERY_ROW,
}
