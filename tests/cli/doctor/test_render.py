"""The report as text."""

from shardopt.cli import text
from shardopt.cli.doctor.job_findings import judge_job
from shardopt.cli.doctor.render import render
from shardopt.cli.doctor.speed_findings import judge_speeds
from tests.support.doctor import make_job, make_speeds, with_node


def test_the_report_fits_a_terminal():
    job = make_job((4,) * 60, omp="2")
    for number in range(60):
        job = with_node(job, number, host=f"compute-{number:03d}.rack-7.example.org")
    speeds = make_speeds(job, links=[1e9 + node for node in range(60)])
    findings = judge_job(job) + judge_speeds(job, speeds)
    report = render(job, speeds, findings)
    assert max(map(len, report.splitlines())) <= 100
    assert report.count("and 28 more") == 2
    words = report.split()
    for finding in findings:
        told = finding.text.split()
        assert any(words[i : i + len(told)] == told for i in range(len(words))), finding
    assert report.endswith("no problems")


def test_times_ranges_and_cuts_for_people():
    times = [2e-8, 1.5e-6, 999.6e-6, 0.0123, 1.0, 75.0]
    assert list(map(text.seconds, times)) == [
        "0.02 us",
        "1.50 us",
        "1.00 ms",
        "12.3 ms",
        "1.00 s",
        "75.0 s",
    ]
    assert text.ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    assert text.clip("a-long-name", 8) == "a-long.."
