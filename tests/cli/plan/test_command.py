"""``shardopt plan`` as it is called: its report, its JSON, its picture, its errors."""

import builtins
import json
import xml.etree.ElementTree as ET

import pytest

from shardopt.cli.doctor.calibrate import calibrate
from shardopt.layout.partition import ParamSpec, plan_partition
from shardopt.layout.traffic import default_bucket_nbytes, plan_traffic
from shardopt.planner.machine import write_calibration
from tests.support.checkpoints import call, refused
from tests.support.doctor import make_job, make_speeds

JOB = ["--params", "3e7", "--dtype", "bfloat16", "--tensors", "1", "--nodes", "16"]
JOB += ["--ranks-per-node", "2"]
SPEEDS = ["--link", "200Gbit", "--memory-bandwidth", "400GB/s"]


def plan(capsys, *words):
    return call(capsys, *words, command="plan")


def test_the_numbers_are_those_of_the_layout(capsys):
    found = plan(capsys, *JOB, *SPEEDS, "--json").json
    spec = ParamSpec("p0", (30_000_000,), "bfloat16", 0)
    partition = plan_partition([spec], 16, 2, default_bucket_nbytes(16, 32))
    ranks = [plan_traffic(partition, 15, lane) for lane in (0, 1)]
    assert found["node_traffic"]["nbytes"] == sum(rank.nbytes for rank in ranks)
    assert found["rank_traffic"]["messages"] == max(rank.messages for rank in ranks)
    assert found["layout"]["bucket_nbytes"] == partition.bucket_nbytes
    assert found["stage"] == 1
    assert found["memory"]["params_node_nbytes"] == 2 * partition.numel
    assert [peer["name"] for peer in found["peers"]] == [
        *("replicated NAdam", "torch ZeRO-1", "FSDP2")
    ]
    assert found["labels"]["times"] == "extrapolated"
    assert found["machine"]["origins"]["link_nbytes_per_s"] == "given"
    assert found["scaling"] is None


def test_states_of_8_bits_and_no_masters_are_planned_for(capsys):
    words = ["--optim-bits", "8", "--no-master-weights", "--json"]
    memory = plan(capsys, *JOB, *SPEEDS, *words).json["memory"]
    chunks = -(-30_000_000 // 4096)
    assert memory["masters_node_nbytes"] == 0
    assert memory["moments_node_nbytes"] == 2 * chunks * 16 * 260 // 16
    full = plan(capsys, *JOB, *SPEEDS, "--json").json
    assert full["memory"]["moments_node_nbytes"] > 3.9 * memory["moments_node_nbytes"]


def test_stage_two_has_columns_of_its_own(capsys):
    words = ["--params", "3e7", "--ranks-per-node", "4", "--memory-bandwidth", "20GB/s"]
    rows = plan(capsys, *words).stdout
    shown = plan(capsys, *words, "--stage", "2", "--ring", "32MiB").stdout
    for told in ("stage 2", "ring", "late gradients", "averaging in backward", "sum, stage 2"):
        assert told in shown, told
        assert told not in rows, told
    memory = plan(capsys, *words, "--stage", "2", "--json").json["memory"]
    assert (
        memory["grads_node_nbytes"] * 4
        == (plan(capsys, *words, "--json").json["memory"]["grads_node_nbytes"])
    )
    assert 0 < memory["late_node_nbytes"] < memory["ring_node_nbytes"] < 17 << 20


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--stage 2 --gpu h100", "policy.stage must be 1 with parameters on a device"),
        ("--stage 2 --nodes 2 --no-overlap", "1 with overlap=False on several nodes"),
        ("--ring 1MiB", "policy.ring_nbytes must be None with stage=1"),
        ("--accumulate node", "policy.accumulate must be exact with stage=1"),
        ("--accumulate node --stage 2", "policy.accumulate must be exact on one node"),
        ("--update-in-backward", "policy.update_in_backward must be False without stage=2"),
        ("--update-in-backward --stage 2 --clip", "max_grad_norm must be None"),
        (
            "--update-in-backward --stage 2 --nodes 3 --wire-dtype float16",
            "policy.wire_dtype must be bfloat16 or None",
        ),
        ("--update-in-backward --stage 2 --no-overlap --scaling", "1 with overlap=False on"),
        ("--update-in-backward --stage 2 --accumulate node", "False with accumulate="),
        ("--update-in-backward --stage 2 --check-finite", "must be False with check_finite"),
        ("--update-in-backward --stage 2 --dtype float16", "for parameters in float16"),
        ("--prefetch-params --no-overlap", "policy.prefetch_params must be False with overlap"),
        ("--prefetch-params --gpu h100", "must be False with parameters on a device"),
        ("--forward 1s", "--forward must come with --prefetch-params"),
        ("--node-memory 1GB --gpu h100", "--node-memory must come without --gpu"),
        ("--ranks 6 --nodes 4", "--ranks must be a multiple of --nodes; got 6 ranks on 4 nodes"),
    ],
)
def test_what_the_optimizer_refuses_is_refused(capsys, words, named):
    refused(plan(capsys, "--params", "3e7", *SPEEDS, *words.split()), named)


def test_ranks_may_be_given_for_all_nodes_together(capsys):
    words = "--params", "3e7", *SPEEDS, "--nodes", "2", "--link", "1Gbit"
    by_node = plan(capsys, *words, "--ranks-per-node", "4")
    assert by_node.code == 0
    assert plan(capsys, *words, "--ranks", "8").stdout == by_node.stdout


def test_arrays_without_hooks_have_no_stage_two(capsys, tmp_path):
    script = tmp_path / "script.py"
    words = ["--model", f"{script}:make_model", *SPEEDS]
    script.write_text("import numpy\ndef make_model():\n    return {'w': [numpy.zeros(5)]}\n")
    refused(plan(capsys, *words, "--stage", "2"), "with parameters of NumPy or CuPy")
    assert plan(capsys, *words).code == 0
    pytest.importorskip("torch")
    script.write_text("import torch\ndef make_model():\n    return [torch.zeros(5)]\n")
    assert plan(capsys, *words, "--stage", "2").code == 0


def test_sums_by_node_can_be_left_out_to_fit(capsys):
    words = ["--params", "3e7", "--nodes", "2", *SPEEDS, "--stage", "2"]
    found = plan(capsys, *words, "--accumulate", "node", "--node-memory", "1GB", "--json").json
    exact = plan(capsys, *words, "--json").json["memory"]["node_nbytes"]
    settings = {each["name"]: each["node_nbytes"] for each in found["settings"]}
    assert settings['accumulate="exact"'] == exact < found["memory"]["node_nbytes"]


def test_the_settings_that_make_it_fit_are_named(capsys):
    words = ["--params", "3e7", "--dtype", "bfloat16", "--ranks-per-node", "4", *SPEEDS, "--clip"]
    words += ["--node-memory"]
    found = plan(capsys, *words, "600MB", "--json")
    planned, *others = found.json["settings"]
    assert (found.code, found.json["fits"]) == (1, False)
    assert planned["node_nbytes"] == found.json["memory"]["node_nbytes"] > 600e6
    sizes = {each["name"]: each["node_nbytes"] for each in others}
    for name, more in {
        "stage=2": ["--stage", "2"],
        "optim_bits=8": ["--optim-bits", "8"],
        "master_weights=False": ["--no-master-weights"],
        "all of these": ["--stage", "2", "--optim-bits", "8", "--no-master-weights"],
        "2 nodes": ["--nodes", "2"],
    }.items():
        memory = plan(capsys, *words, "600MB", *more, "--json").json["memory"]
        assert sizes.pop(name) == memory["node_nbytes"] < planned["node_nbytes"], name
    assert sizes == {"stage=2, update_in_backward=True": None}
    text = plan(capsys, *words, "600MB").stdout
    assert "Each node must hold 780 MB; it has 600 MB." in text
    assert "It fits with one of these, the cheapest first: stage=2." in text
    assert "update_in_backward=True: max_grad_norm must be None with" in text.replace("\n", " ")
    assert "It fits with all of these settings together." in plan(capsys, *words, "300MB").stdout
    assert "No setting makes it fit" in plan(capsys, *words, "1MB").stdout
    rich = plan(capsys, *words, "1TB")
    assert rich.code == 0
    assert "Each node must hold" not in rich.stdout


def test_embeddings_keep_moments_of_32_bits_as_far_as_they_are_known(capsys, tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "script.py"
    made = "torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100, bias=False))"
    script.write_text(f"import torch\ndef make_model():\n    return {made}\n")
    words = ["--model", f"{script}:make_model", "--optim-bits", "8", *SPEEDS]
    found = plan(capsys, *words, "--json").json
    assert found["model"]["coded_numel"] == 6400
    assert found["memory"]["moments_node_nbytes"] == 8 * 8192 + 2 * 2 * 16 * 260
    assert "moments of 8 bits  of 6,400 parameters" in plan(capsys, *words).stdout
    text = plan(capsys, *JOB, *SPEEDS, "--optim-bits", "8").stdout
    assert "embeddings, which NAdam(model) leaves out, are known with --model" in text


def test_dtypes_that_cannot_do_with_less_are_named(capsys):
    words = ["--params", "3e7", "--dtype", "float64", "--optim-bits", "8"]
    refused(plan(capsys, *words), "must be float32, bfloat16 or float16 for moments of 8 bits")


def test_the_report_labels_what_it_has_not_measured(capsys):
    words = ["--backward", "1s", "--node-mtbf", "5y", "--slow-nodes", "0.1:2"]
    text = plan(capsys, *JOB, *SPEEDS, *words).stdout
    assert max(map(len, text.splitlines())) <= 100
    for told in (
        "Memory, exact",
        "Traffic of a step, exact",
        "Time of a step, extrapolated",
        "by formula",
        "(given)",
        "(assumed)",
        "band of the step",
        "hidden behind backward",
        "Beyond 8 nodes times are extrapolated",
        "interval worth choosing",
        "Daly",
        "drawn as slow",
    ):
        assert told in text, told
    few = [word if word != "16" else "4" for word in JOB]
    text = plan(capsys, *few, *SPEEDS).stdout
    assert "Time of a step, simulated" in text
    assert "extrapolated" not in text


def test_shards_that_are_uneven_are_remarked_on(capsys):
    """A bucket of 4 chunks on 16 nodes: the last one owns a chunk of every other lane part."""
    uneven = "The last node owns"
    assert uneven in plan(capsys, *JOB, *SPEEDS, "--bucket", "32KiB").stdout
    assert uneven not in plan(capsys, *JOB, *SPEEDS, "--bucket", "8MiB").stdout


def test_without_rich_the_tables_are_plain(capsys, monkeypatch):
    load = builtins.__import__

    def load_no_rich(name, *args, **settings):
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return load(name, *args, **settings)

    with_rich = plan(capsys, *JOB, *SPEEDS).stdout
    monkeypatch.setattr(builtins, "__import__", load_no_rich)
    plain = plan(capsys, *JOB, *SPEEDS).stdout
    kept = [line.replace("─", "").split() for line in with_rich.splitlines()]
    assert [words for words in kept if words] == [
        line.split() for line in plain.splitlines() if line.strip()
    ]


def test_scaling_and_its_picture(capsys, tmp_path):
    out = tmp_path / "out.svg"
    text = plan(capsys, *JOB, *SPEEDS, "--plot", out).stdout
    assert "lanes exchange: " in text
    assert "4096" in text
    drawn = " ".join(t for t in ET.fromstring(out.read_text()).itertext() if t.strip())
    for told in ("simulated, not measured", "extrapolated beyond 8 nodes", "x 0.5 to 2"):
        assert told in drawn


def test_speeds_from_a_calibration(capsys, tmp_path):
    job = make_job()
    speeds, origin = calibrate(job, make_speeds(job, exchange=2e9))
    path = tmp_path / "speeds.json"
    write_calibration(path, speeds, origin)
    assert json.loads(path.read_text())["measured"]["hosts"] == ["h1", "h2"]
    found = plan(capsys, *JOB, "--calibration", path, "--json").json["machine"]
    assert found["link_nbytes_per_s"] == 2e9
    assert found["memory_nbytes_per_s"] == 100e9
    assert (found["latency_s"], found["origins"]["latency_s"]) == (20e-6, "calibrated")
    lone = make_job(sizes=(2,))
    assert (found["message_s"], found["origins"]["message_s"]) == (15e-6, "calibrated")
    lone = calibrate(lone, make_speeds(lone, disk=(2e9,), updates=(8e9,)))[0]
    assert lone == {"memory_nbytes_per_s": 8e9, "barrier_s": 5e-6, "disk_nbytes_per_s": 2e9}


def test_a_slow_link_and_a_late_rank_hold_up_all_others(capsys):
    def step_s(*words):
        return plan(capsys, *JOB, *SPEEDS, *words, "--json").json["simulated"]["step_s"]

    alone = step_s()
    assert step_s("--late-rank", "50ms") == pytest.approx(alone + 0.05, rel=1e-9)
    assert alone < step_s("--slow-link", "2") < 2 * alone
    text = plan(capsys, *JOB, *SPEEDS, "--slow-link", "2", "--late-rank", "50ms").stdout
    assert "One node sends 2 times slower: all others wait for it." in text
    assert "One rank comes 50.0 ms late: all others wait for it." in text


def test_gpus_that_are_too_small(capsys):
    words = ["--params", "70e9", "--dtype", "bfloat16", "--ranks-per-node", "8", "--gpu", "h100"]
    result = plan(capsys, *words)
    assert result.code == 1
    assert "Each GPU must hold 385 GB; h100 has 80.0 GB." in result.stdout
    assert plan(capsys, "--params", "1e9", *words[2:], "--offload").code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "arguments must match --help"),
        (["--params", "7e9"], "--memory-bandwidth must be given"),
        (["--params", "7e9", "--nodes", "2", *SPEEDS[2:]], "--link must be given"),
        (["--params", "7x", *SPEEDS], "--params must be a whole number"),
        (["--params", "1e30", *SPEEDS], "--bucket must cut the model into at most 1,000,000"),
        ([*JOB, *SPEEDS, "--bucket", "1B"], "--bucket must cut the model into at most 1,000,000"),
        ([*JOB, *SPEEDS, "--bucket", "0.1B"], "--bucket must be bytes > 0"),
        ([*JOB, *SPEEDS, "--backward", ""], "--backward must be a time > 0"),
        (["--params", "7e9", "--tensors", "1e9", *SPEEDS], "--tensors must be at most 1,000,000"),
        (["--params", "7e9", "--dtype", "bf16", *SPEEDS], "--dtype must be one of float16"),
        ([*JOB, "--link", "200", *SPEEDS[2:]], "--link must be bytes or bits per second"),
        ([*JOB, *SPEEDS, "--gpu", "k80"], "--gpu must be one of"),
        ([*JOB, *SPEEDS, "--offload"], "--offload must come with --gpu"),
        ([*JOB, *SPEEDS, "--slow-nodes", "2"], "--slow-nodes must be a share"),
        ([*JOB, *SPEEDS, "--slow-link", "0.5"], "--slow-link must be a factor >= 1"),
        ([*JOB, *SPEEDS, "--late-rank", "soon"], "--late-rank must be"),
        ([*JOB, *SPEEDS, "--calibration", "none.json"], "none.json must be accessible"),
        (["--safetensors", "none.safetensors", *SPEEDS], "none.safetensors must be accessible"),
        (["--model", "none.py:f", *SPEEDS], "--model must be script.py:function"),
    ],
)
def test_wrong_options(capsys, words, told):
    refused(plan(capsys, *words), told)


def test_help(capsys):
    text = plan(capsys, "--help").stdout
    assert "example:\n  shardopt plan " in text
    assert max(map(len, text.splitlines())) <= 100
