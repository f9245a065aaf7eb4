"""Start the jobs of ``benchmarks.cases.predict`` on hosts of their own."""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from benchmarks.cases.nodes.measure import command, hosts, run
from benchmarks.cases.predict import CASE, JobOptions, Options, calibrated
from benchmarks.harness.options import words_of
from benchmarks.harness.record import read
from benchmarks.harness.result import Result

_DOCTOR = ("shardopt", "doctor", "--json", "--calibrate")


def measure(options: Options) -> Iterator[Result]:
    """Run the jobs for each layout and MPI, and yield the results that they have written."""
    words = words_of(options, [field.name for field in fields(JobOptions)])
    for layout in options.layout:
        num_nodes, node_size = map(int, layout.split("x"))
        num_ranks = num_nodes * node_size
        for python in options.python or (sys.executable,):
            with tempfile.TemporaryDirectory(prefix="predict-") as folder:
                file = Path(folder) / "speeds.json"
                module, *doctor = _DOCTOR
                with hosts(num_nodes, node_size, options.rate) as prefix:
                    run(
                        [*prefix, *command(python, num_ranks, module), *doctor, str(file)],
                        quiet=True,
                    )
                    job = command(python, num_ranks, "benchmarks.cases.predict.job")
                    run([*prefix, *job, folder, *words])
                speeds = json.loads(file.read_text())["speeds"]
                figures = {calibrated(name): value for name, value in speeds.items()}
                for result in read(CASE, Path(folder)):
                    yield result.with_figures(figures)
