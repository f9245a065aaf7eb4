"""The curves of a run, drawn by hand from its log."""

import sys

from tests.support.launchers import LAUNCH, run
from train_lm.run_log import RunLog

PNG = b"\x89PNG"


def test_the_script_draws_a_run_that_has_only_begun(tmp_path):
    log = RunLog(tmp_path)
    log.begin("a", 0)
    log.write("start", run="a", step=0, caption="small", unigram_bits=4.7, bigram_bits=3.5)
    log.close()
    job = run([sys.executable, LAUNCH / "plot_loss.py", tmp_path], tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stdout == f"{tmp_path / 'loss.png'}\n"
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_a_folder_without_a_log_is_refused(tmp_path):
    job = run([sys.executable, LAUNCH / "plot_loss.py", tmp_path], tmp_path)
    assert job.returncode == 2
    assert "FOLDER must hold a train.jsonl" in job.stderr
