"""Launch configurations of window attention (see launch.py)."""

from vlmfast.kernels.launch import PLAIN, REPEATS, UNLIMITED, Table, rows, table

# Rows marked REPEATS would spill with 4 warps, some of them by 8 bytes only.
_WINDOW_FORWARD_90 = rows(
    (64, 64, 64, 64, 4, 2),
    (32, 144, 64, 64, 4, 2),
    (32, 256, 128, 64, 8, 2, PLAIN),
    (32, 256, 64, 32, 4, 1),
    (128, UNLIMITED, 64, 32, 8, 1, REPEATS),
)

_WINDOW_FORWARD_FLOAT = rows((128, UNLIMITED, 32, 32, 8, 1))

_WINDOW_FORWARD = table(
    sm_90=_WINDOW_FORWARD_90,
    sm_100=_WINDOW_FORWARD_90,
    mma_sync=rows(
        (64, 64, 64, 64, 4, 2),
        (32, 256, 64, 64, 4, 2),
        (128, UNLIMITED, 64, 32, 8, 1),
    ),
    tf32=_WINDOW_FORWARD_FLOAT,
    ieee=_WINDOW_FORWARD_FLOAT,
)

_WINDOW_BACKWARD_WHOLE_90 = rows((32, 64, 64, 64, 8, 2, PLAIN, REPEATS))

_WINDOW_BACKWARD_WHOLE_HALF = rows((32, 64, 64, 64, 8, 2, PLAIN))

_WINDOW_BACKWARD_WHOLE = table(
    sm_90=_WINDOW_BACKWARD_WHOLE_90,
    sm_100=_WINDOW_BACKWARD_WHOLE_HALF,
    mma_sync=_WINDOW_BACKWARD_WHOLE_HALF,
    tf32=(),
    ieee=(),
)

_WINDOW_BACKWARD_QUERY_90 = rows(
    (32, 144, 64, 32, 4, 2, PLAIN),
    (32, 144, 64, 64, 4, 1),
    (32, 256, 64, 64, 8, 2, PLAIN, REPEATS),
    (32, 256, 64, 32, 8, 2, REPEATS),
    (64, 64, 64, 64, 4, 1),
    (128, UNLIMITED, 64, 32, 8, 1, REPEATS),
)

_WINDOW_BACKWARD_KEY_VALUE_FLOAT = rows((128, UNLIMITED, 16, 16, 8, 1))

_WINDOW_BACKWARD_BIAS_FLOAT = rows((128, UNLIMITED, 32, 32, 8, 1))

_WINDOW_BACKWARD_QUERY = table(
    sm_90=_WINDOW_BACKWARD_QUERY_90,
    sm_100=_WINDOW_BACKWARD_QUERY_90,
    mma_sync=rows((32, 144, 64, 32, 4, 2), (128, UNLIMITED, 64, 32, 8, 1)),
    tf32=rows((128, UNLIMITED, 16, 32, 8, 1)),
    ieee=rows((128, UNLIMITED, 16, 16, 8, 1)),
)

_WINDOW_BACKWARD_KEY_VALUE_90 = rows(
    (32, 144, 32, 64, 4, 1, PLAIN),
    (32, 64, 32, 64, 4, 1),
    (32, 144, 32, 64, 8, 1, REPEATS),
    (32, 256, 64, 64, 8, 2, PLAIN, REPEATS),
    (32, 256, 64, 32, 8, 1, REPEATS),
    (128, UNLIMITED, 64, 32, 8, 1, REPEATS),
)

_WINDOW_BACKWARD_KEY_VALUE = table(
    sm_90=_WINDOW_BACKWARD_KEY_VALUE_90,
    sm_100=_WINDOW_BACKWARD_KEY_VALUE_90,
    mma_sync=rows((32, 144, 64, 64, 8, 2), (128, UNLIMITED, 64, 32, 8, 1)),
    tf32=_WINDOW_BACKWARD_KEY_VALUE_FLOAT,
    ieee=_WINDOW_BACKWARD_KEY_VALUE_FLOAT,
)

_WINDOW_BACKWARD_BIAS_HALF = rows(
    (32, UNLIMITED, 64, 64, 4, 2, PLAIN),
    (32, UNLIMITED, 64, 64, 8, 1),
    (128, UNLIMITED, 64, 32, 8, 1),
)

_WINDOW_BACKWARD_BIAS = table(
    sm_90=_WINDOW_BACKWARD_BIAS_HALF,
    sm_100=_WINDOW_BACKWARD_BIAS_HALF,
    mma_sync=_WINDOW_BACKWARD_BIAS_HALF,
    tf32=_WINDOW_BACKWARD_BIAS_FLOAT,
    ieee=_WINDOW_BACKWARD_BIAS_FLOAT,
)

TABLES: dict[str, Table] = {
    "window_attention_fwd": _WINDOW_FORWARD,
    "window_attention_bwd_whole": _WINDOW_BACKWARD_WHOLE,
    "window_attention_bwd_query": _WINDOW_BACKWARD_QUERY,
    "window_attention_bwd_bias": _WINDOW_BACKWARD_BIAS,
    "window_attention_bwd_key_value": _WINDOW_BACKWARD_KEY_VALUE,
}
