"""A data set on workers of which one is killed every 20 seconds, under a process that is killed twice.

On a busy machine a model takes longer than that to load: there must be new rows since the last death, too. Ray would
have its workers wait for whatever else runs here; that is switched off.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny_models import build, text_of, tokenizer

import atman_kernels as ak
from atman_kernels.scale import read_results

pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow
ROWS, TOKENS = 500, 150
SECONDS_BETWEEN_DEATHS = 20.0
DRIVER_DIES_AT = (150, 320)  # rows


def written(folder):
    """Ids on disk, as any reader sees them at this moment."""
    return parquet.read_table(folder, columns=["id"])["id"].to_pylist() if any(folder.glob("*.parquet")) else []


def kill_a_worker(driver):
    """Whether there was one."""
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                process.kill()
                return True
        except psutil.NoSuchProcess:
            pass
    return False


def test_every_row_is_there_once_and_right(tmp_path):
    random.seed(0)
    rows = [{"id": i, "prompt": text_of(random.choices(range(3, 99), k=TOKENS)), "target": " w5"} for i in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = build("llama").float()
    model.config.max_position_embeddings = 2 * TOKENS
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out, deaths, lives, last, count = tmp_path / "out", 0, 0, time.monotonic(), 0
    command = [sys.executable, "-c", "from atman_kernels.cli import main; main()", "explain"]
    command += ["--dataset", str(tmp_path / "in.jsonl"), "--out", str(out), "--target-column", "target"]
    command += ["--model", str(tmp_path / "model"), "--dtype", "float32", "--workers", "2", "--gpus-per-worker", "0"]
    before = set(psutil.pids())
    while lives < 10:
        lives += 1
        with subprocess.Popen(command, start_new_session=True, env=os.environ | {"RAY_worker_niceness": "0"}) as driver:
            while driver.poll() is None:
                time.sleep(0.5)
                done = written(out)
                is_time = time.monotonic() - last >= SECONDS_BETWEEN_DEATHS and len(done) > count
                if is_time and kill_a_worker(driver):
                    deaths, last, count = deaths + 1, time.monotonic(), len(done)
                assert len(done) == len(set(done)), "a reader sees a row twice"
                if lives <= len(DRIVER_DIES_AT) and len(done) >= DRIVER_DIES_AT[lives - 1]:
                    os.kill(driver.pid, signal.SIGKILL)
        if driver.returncode == 0:
            break
        assert driver.returncode == -signal.SIGKILL
    found = {each.id: each for each in read_results(out)}
    print(f"{lives - 1} deaths of the driver, {deaths} of workers")
    assert lives == 1 + len(DRIVER_DIES_AT)
    assert deaths >= 2
    assert sorted(written(out)) == list(range(ROWS))
    assert [each.error for each in found.values() if each.error] == []
    explainer = ak.Explainer(model, tokenizer(), progress=False)
    undisturbed = explainer.explain_batch([row["prompt"] for row in rows], [row["target"] for row in rows])
    apart = [(found[i].explanation.scores - each.scores).abs().max() for i, each in enumerate(undisturbed)]
    print(f"scores differ by {max(apart):.1e} at most")
    assert max(apart) < 1e-4
    _wait_for_the_end_of(before)


def _wait_for_the_end_of(before):
    """Nothing of a killed driver's Ray goes on."""
    for _ in range(60):
        left = []
        for process in psutil.process_iter(["cmdline"]):
            if process.pid not in before and any("atman-ray-" in part for part in process.info["cmdline"] or []):
                left.append(process.info["cmdline"][0])
        if not left:
            return
        time.sleep(0.5)
    pytest.fail(f"still there: {left}")
