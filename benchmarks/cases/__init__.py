"""The cases: packages that declare their ``Case`` and measure it in the module ``measure``."""

from benchmarks.cases import checkpoint, faces, kernel, memory, nodes, overhead, step, writes
from benchmarks.harness.case import Case

CASES: dict[str, Case] = {
    package.CASE.name: package.CASE
    for package in (kernel, overhead, step, faces, writes, memory, checkpoint, nodes)
}
