"""Tables in Markdown, for all that prints one."""

from collections.abc import Sequence

__all__ = ["markdown_table", "milliseconds"]


def markdown_table(
    header: Sequence[str], body: Sequence[Sequence[str]], is_padded: bool = False
) -> str:
    """A table; padded, its columns align in a terminal."""
    widths = [0] * len(header)
    if is_padded:
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * max(3, width) for width in widths]
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in (header, rule, *body)
    )
    return "\n".join(f"| {line} |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the point."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"
