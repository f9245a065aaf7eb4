"""The scaling case: who is at work, what counts as right, and the page and plots of its results."""

import json
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks import RESULTS_FOLDER, ROOT
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.cases.scaling import (
    COUNTS,
    LIMIT,
    LINKS,
    MESSAGES,
    OURS_FOR,
    PEERS,
    PLANNED_MB,
    PLANNED_MESSAGES,
    SENT_MB,
    STRONG,
    WEAK,
)
from benchmarks.cases.scaling.groups import BY_NODE, BY_RANK, plan_groups
from benchmarks.contenders.names import DDP, FSDP2, OPTAX, REDUCE_SCATTER, SHARDOPT
from benchmarks.harness.machine import Origin
from benchmarks.harness.record import append, read
from benchmarks.harness.result import Result
from benchmarks.report.scaling import markdown, page, series_of
from tests.support.errors import FORM

CASE = CASES["scaling"]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {"PYTHONPATH": PATHS}
LIMIT_S = 100
BLOCKS = [(rank // 4, rank % 4) for rank in range(12)]  # 3 nodes of 4 ranks
DEALT = [(rank % 2, rank // 2) for rank in range(4)]  # ranks dealt out to 2 nodes


def made(mode, ranks, nodes=1, by=BY_RANK, *, date="2026-01-01", **changes):
    """A result: shardopt takes 8 s a rank, a peer twice as long."""
    origin = Origin(f"{date}T00:00:00+00:00", "abc", {"cpu": "x", "cores": 2}, "MPICH 5.0.2", {})
    taken_s = 8.0 / ranks if mode == STRONG else 8.0 + ranks
    settings = {"scaling": mode, "nodes": nodes, "by": by, "oversubscribed": ranks > 8}
    made_of = {
        "samples_s": {SHARDOPT: [taken_s] * 3, REDUCE_SCATTER: [2 * taken_s] * 3},
        "figures": {LIMIT: taken_s / 2},
        "left_out": {OPTAX: "optax is not installed"},
    }
    numel = 1 << 20 if mode == STRONG else ranks << 20
    common = {"case": "scaling", "ranks": ranks, "threads": 1, "dtype": "float32", "numel": numel}
    return Result(**common | made_of | {"settings": settings, "origin": origin} | changes)


class TestGroups:
    """Which ranks are at work together."""

    def test_nodes_are_filled_one_after_the_other(self):
        found = [(len(g.ranks), g.num_nodes, g.by) for g in plan_groups(BLOCKS)]
        assert found == [
            (1, 1, (BY_RANK,)),
            (2, 1, (BY_RANK,)),
            (4, 1, (BY_RANK, BY_NODE)),
            (8, 2, (BY_RANK, BY_NODE)),
            (12, 3, (BY_RANK, BY_NODE)),
        ]
        assert plan_groups(BLOCKS)[3].ranks == tuple(range(8))

    def test_ranks_that_are_dealt_out_are_chosen_by_node_all_the_same(self):
        assert [g.ranks for g in plan_groups(DEALT)] == [(0,), (0, 2), (0, 1, 2, 3)]

    def test_whole_nodes_that_are_no_power_of_two(self):
        places = [(rank // 3, rank % 3) for rank in range(6)]
        found = [(len(g.ranks), g.by) for g in plan_groups(places)]
        assert found == [
            (1, (BY_RANK,)),
            (2, (BY_RANK,)),
            (3, (BY_NODE,)),
            (4, (BY_RANK,)),
            (6, (BY_RANK, BY_NODE)),
        ]

    def test_sizes_may_be_given(self):
        assert [len(g.ranks) for g in plan_groups(BLOCKS, [5, 4, 4])] == [4, 5]
        for sizes in ([13], [0]):
            with pytest.raises(ValueError, match="--ranks must be") as caught:
                plan_groups(BLOCKS, sizes)
            assert FORM.fullmatch(str(caught.value))

    def test_a_job_of_one_rank(self):
        assert [(g.ranks, g.by) for g in plan_groups([(0, 0)])] == [((0,), (BY_RANK, BY_NODE))]


OPTAX_STEPS = """
import numpy as np
import optax
param, grad = np.array({param}, np.float32), np.array({grad}, np.float32)
optimizer = optax.nadam(2e-3)
state = optimizer.init(param)
for _ in range({steps}):
    updates, state = optimizer.update(grad, state, param)
    param = optax.apply_updates(param, updates)
print(param.tolist())
"""
"""In a process of its own, as JAX's threads would be in the way of later tests that fork."""


@pytest.mark.parametrize("name", ["torch_nadam", "optax_nadam", "adam"])
def test_the_oracle_trains_as_the_framework_does(name):
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("benchmarks.contenders.oracle")
    param, steps = np.linspace(-2, 2, 9), 5
    grad = np.linspace(-3e-8, 5e-8, 9)
    size = sum(getattr(oracle, name)(step) for step in range(1, steps + 1))
    found = param - size * grad / (np.abs(grad) + 1e-8)
    if name == "optax_nadam":
        pytest.importorskip("optax")
        code = OPTAX_STEPS.format(param=param.tolist(), grad=grad.tolist(), steps=steps)
        text = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        expected = np.array(json.loads(text))
    else:
        kind = torch.optim.NAdam if name == "torch_nadam" else torch.optim.Adam
        tensor = torch.from_numpy(param.copy()).requires_grad_()
        tensor.grad = torch.from_numpy(grad)
        optimizer = kind([tensor], lr=2e-3)
        for _ in range(steps):
            optimizer.step()
        expected = tensor.detach().numpy()
    atol = 1e-6 if "optax" in name else 1e-10  # in float32, as is the product of torch's mus
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


class TestReport:
    """The page, the tables and the plots."""

    def test_efficiency(self):
        strong = [made(STRONG, ranks) for ranks in (4, 1, 2)]
        (series,) = series_of(strong, STRONG)
        assert [result.ranks for result in series.results] == [1, 2, 4]
        assert [series.efficiency(result, SHARDOPT) for result in series.results] == [1, 1, 1]
        (series,) = series_of([made(WEAK, 1), made(WEAK, 4)], WEAK)
        assert series.efficiency(series.results[1], SHARDOPT) == 9 / 12

    def test_efficiency_by_node_counts_nodes(self):
        both = f"{BY_RANK} and {BY_NODE}"
        results = [made(STRONG, 1), made(STRONG, 2, 1, both), made(STRONG, 4, 2, both)]
        by_rank, by_node = series_of(results, STRONG)
        assert [result.ranks for result in by_rank.results] == [1, 2, 4]
        assert [result.ranks for result in by_node.results] == [2, 4]
        assert by_node.efficiency(results[2], SHARDOPT) == 1
        assert by_node.size(results[2]) == 2

    def test_only_the_newest_job_is_shown(self):
        results = [made(STRONG, 1), made(STRONG, 2), made(STRONG, 1, date="2026-02-02")]
        (series,) = series_of(results, STRONG)
        assert series.results == (results[2],)

    def test_the_page(self):
        text = page([made(mode, ranks) for mode in (STRONG, WEAK) for ranks in (1, 2, 16)])
        assert "Strong scaling by rank: 1 Mi float32 parameters\n" in text
        assert "Weak scaling by rank: 1 Mi float32 parameters for each rank\n" in text
        assert "4e+03 (100%)" in text
        assert f"{OPTAX}: left out, optax is not installed" in text
        assert "16 ranks *" in text
        assert "oversubscribed" in text
        assert FSDP2 not in text

    def test_results_are_read_as_they_were_written(self, tmp_path):
        results = [made(STRONG, 1), made(STRONG, 2)]
        for result in results:
            append(CASE, result, tmp_path)
        assert read(CASE, tmp_path) == results

    def test_plots_leave_out_what_is_oversubscribed(self, tmp_path, capsys):
        for mode in (STRONG, WEAK):
            for ranks in (1, 2, 16):
                append(CASE, made(mode, ranks), tmp_path)
        main(["plot", "scaling", "--results", str(tmp_path), "--to", str(tmp_path / "plots")])
        paths = [tmp_path / "plots" / f"scaling_{mode}.svg" for mode in (STRONG, WEAK)]
        assert capsys.readouterr().out.split() == list(map(str, paths))
        for path in paths:
            root = ET.parse(path).getroot()
            words = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]
            assert {"shardopt", "reduce-scatter", "ideal", "limit", "2"} <= set(words)
            assert "16" not in words

    @pytest.mark.parametrize("ranks", [(), (1,), (1, 16)])
    def test_too_little_makes_no_plot(self, tmp_path, ranks):
        for each in ranks:
            append(CASE, made(STRONG, each), tmp_path)
        with pytest.raises(SystemExit, match="There are no results of scaling"):
            main(["plot", "scaling", "--results", str(tmp_path), "--to", str(tmp_path)])
        assert not list(tmp_path.glob("*.svg"))

    def test_tables_of_the_results_in_the_repository(self, tmp_path):
        path = tmp_path / "performance.md"
        path.write_text("<!-- scaling begin -->\n<!-- scaling end -->\n")
        main(["tables", "--scaling", "--into", str(path)])
        assert markdown(read(CASE, RESULTS_FOLDER)) in path.read_text()
        assert "| Strong scaling by rank: 8 Mi float32 parameters | 1 rank |" in path.read_text()

    def test_each_peer_is_compared_with_what_does_the_same(self):
        judged = {verdict.name for verdict in CASE.judge(made(STRONG, 2))}
        assert f"{REDUCE_SCATTER} / {SHARDOPT}" in judged
        assert len([ratio for ratio in CASE.ratios if " / " in ratio.name]) > len(OURS_FOR)


WORDS = ("scaling", "--numel", "4096", "--tensors", "3", "--rounds", "1")
SKIPPED = ("--skip", *(name for name in PEERS if name != REDUCE_SCATTER))


@pytest.mark.any_mpi
def test_three_ranks_on_three_nodes(mpirun, tmp_path):
    words = (*WORDS, "--numel-per-rank", "1000", "--ranks-per-node", "1", *SKIPPED)
    job = mpirun(3, "-m", "benchmarks", *words, "--out", tmp_path, env=ENVIRONMENT,
                 timeout_s=LIMIT_S)  # fmt: skip
    assert job.returncode == 0, job.output
    found = read(CASE, tmp_path)
    shown = [(r.settings["scaling"], r.ranks, r.settings["nodes"], r.numel) for r in found]
    strong = [(STRONG, ranks, ranks, 4096) for ranks in (1, 2, 3)]
    assert shown == [*strong, *((WEAK, ranks, ranks, 1000 * ranks) for ranks in (1, 2, 3))]
    for result in found:
        assert result.has(LIMIT)
        assert result.has(LINKS) == (result.ranks > 1)
        assert f"{REDUCE_SCATTER} / {SHARDOPT}" in {each.name for each in CASE.judge(result)}
    assert "Weak scaling by rank: 1,000 float32 parameters for each rank" in job.stdout


@pytest.mark.thorough
@pytest.mark.any_mpi
def test_peers_of_frameworks(mpirun, tmp_path):
    pytest.importorskip("torch")
    words = (*WORDS, "--only", STRONG, "--ranks", "2", "--out", tmp_path)
    job = mpirun(2, "-m", "benchmarks", *words, env=ENVIRONMENT, timeout_s=LIMIT_S)
    assert job.returncode == 0, job.output
    (result,) = read(CASE, tmp_path)
    assert all(result.has(name) != (name in result.left_out) for name in (SHARDOPT, *PEERS))
    assert not {DDP, FSDP2}.intersection(result.left_out)


@pytest.mark.any_mpi
def test_counts(mpirun, tmp_path):
    words = ("scaling", "--only", COUNTS, "--numel", "65536", "--tensors", "3", "--out", tmp_path)
    job = mpirun(2, "-m", "benchmarks", *words, env=ENVIRONMENT, timeout_s=LIMIT_S)
    assert job.returncode == 0, job.output
    found = read(CASE, tmp_path)
    assert [(result.ranks, result.settings["nodes"]) for result in found] == [
        (1, 1),
        (2, 1),
        (2, 2),
    ]
    assert all(result.value(SENT_MB) == result.value(PLANNED_MB) for result in found)
    assert [result.value(SENT_MB) >= 4 * 65536 / 1e6 for result in found] == [False, False, True]
    assert all(result.value(MESSAGES) == result.value(PLANNED_MESSAGES) for result in found)


WRONG = """
    import sys
    from benchmarks.__main__ import main
    from benchmarks.contenders.peers import ReduceScatter
    from mpi4py import MPI

    def step(self):
        self._comm.Reduce_scatter_block(self._grads, self._grad, MPI.SUM)
        self._grad *= self._comm.size  # a sum of sums
        self._kernel.update()
        self._comm.Allgather(MPI.IN_PLACE, self._params)

    ReduceScatter.step = step
    main(sys.argv[1:])
"""


@pytest.mark.any_mpi
def test_a_contender_that_is_wrong_ends_the_job_before_it_is_timed(mpirun, tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(textwrap.dedent(WRONG))
    words = (*WORDS, "--only", STRONG, *SKIPPED, "--out", tmp_path / "out")
    job = mpirun(2, program, *words, env=ENVIRONMENT, timeout_s=LIMIT_S)
    assert job.returncode != 0
    assert f"{REDUCE_SCATTER} must train as one process does" in job.output
    assert [result.ranks for result in read(CASE, tmp_path / "out")] == [1]
