"""The table of measured steps beside those that ``shardopt plan`` simulates."""

from pathlib import Path

from benchmarks.cases.predict import CASE
from benchmarks.harness.record import read

PREDICTIONS = "predictions"


def predictions_text(folder: Path) -> str:
    """Write a row for each kind of step on each layout, and the fitted speeds, as Markdown."""
    from shardopt.planner.prediction import predict, read_steps  # here: loads NumPy

    results = read(CASE, folder)
    machine, predictions = predict(read_steps(result.to_json() for result in results))
    head = ["Job", "Step", "Measured, ms", "Fitted on 2 and 4 nodes", "As calibrated", ""]
    rows = [head, ["---", "---", *["---:"] * 3, "---"]]
    for each in predictions:
        layout, step = each.step.layout, each.step
        cells = [
            f"{1e3 * simulated_s:.0f} ({100 * each.error(simulated_s):+.0f} %)"
            if simulated_s is not None
            else ""
            for simulated_s in (each.fitted_s, each.calibrated_s)
        ]
        kind = step.key.removeprefix("step, ").replace("step", "default")
        role = "fitted" if step.is_fitted else "CPU-bound" if step.is_cpu_bound else "checked"
        job = f"{layout.num_nodes} x {layout.node_size}"
        rows.append([job, kind, f"{1e3 * step.measured_s:.0f}", *cells, role])
    origin = results[-1].origin
    link = machine.link_nbytes_per_s or 0.0
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + (
        f"\n\nFitted: {link / 1e6:.1f} MB/s each way, latency {1e6 * machine.latency_s:.0f} µs, "
        f"{1e6 * machine.message_s:.0f} µs a message. Beyond 8 nodes nothing has been measured: "
        f"there all is extrapolated. {origin.machine['cpu']}, {origin.machine['cores']} cores, "
        f"{origin.mpi}, {origin.date[:10]}."
    )
