"""The launches that the compile gate compiles: real models' shapes, and every feature once."""

from tools.compile_cases.common import CompileCase
from vlmfast.families import rows

CASES: dict[str, list[CompileCase]] = {
    family: row.CASES for family, row in rows("tools.compile_cases").items()
}
