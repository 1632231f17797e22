"""`explain_part`: in this process, and in a group that shares a model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import build, text_of, tokenizer

import atman_kernels as ak
from atman_kernels.errors import InputError
from atman_kernels.scale import explain_part, read_results

pytest.importorskip("pyarrow")

PROMPTS = [text_of(range(3 + i, 15 + 2 * i)) for i in range(6)]
GROUP = """
import os, sys
import torch, torch.distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, DistributedConfig
import atman_kernels as ak
from atman_kernels import scale

torch.set_num_threads(1)
folder, source = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype="float32", distributed_config=DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"])))
explainer = ak.Explainer(model, AutoTokenizer.from_pretrained(folder), progress=False)
for again in range(2):
    run = scale.explain_part(explainer, source, f"{source}.out/0", target_column="target", prompts_per_task=2)
    print(f"{run.rows} {run.explained} {run.failed}\\n", end="", flush=True)  # in one piece: two processes write
units = "word" if torch.distributed.get_rank() else "token"
try:
    scale.explain_part(explainer, source, f"{source}.other", units=units)
except ak.InputError as error:
    print(f"{error}\\n", end="", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def source(tmp_path):
    rows = [{"id": i, "prompt": prompt, "target": " w5"} for i, prompt in enumerate([*PROMPTS, ""])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in.jsonl"


@pytest.fixture(scope="module")
def explainer():
    return ak.Explainer(build("llama"), tokenizer(), progress=False)


def check(output, explainer):
    found = {each.id: each for each in read_results(output)}
    assert sorted(found) == list(range(7))
    assert found[6].error.startswith("InputError: prompt is empty")
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(found[i].explanation.scores, explainer.explain(prompt, " w5").scores, atol=1e-4)


def test_parts_make_up_the_whole(explainer, source, tmp_path):
    counts = [
        explain_part(
            explainer, source, tmp_path / f"out/{part}", part=part, parts=3, target_column="target", progress=False
        ).rows
        for part in range(3)
    ]
    assert counts == [3, 2, 2]
    check(tmp_path / "out", explainer)
    again = explain_part(explainer, source, tmp_path / "out/0", parts=3, target_column="target", progress=False)
    assert (again.rows, again.explained) == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": 3, "parts": 3}, "part must be an integer from 0 to 2, got 3"),
        ({"factor": 0.5}, "factor was settled when the explainer was made"),
        ({"units": "none"}, "units must be one of"),
        ({"target_column": "answer"}, "no row has a 'answer'"),
    ],
)
def test_what_does_not_fit(explainer, source, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        explain_part(explainer, source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [{"exact": 5}, {"recompute": 2}])
def test_results_say_what_is_an_estimate_and_how_deep_it_was_computed(explainer, tmp_path, depth):
    prompt = text_of(range(3, 80))
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": i, "prompt": f"w{4 + i} {prompt}"}) + "\n" for i in (0, 1))
    )
    asked = {"max_new_tokens": 2, **depth}
    explain_part(explainer, tmp_path / "in.jsonl", tmp_path / "out", progress=False, **asked)
    for each in read_results(tmp_path / "out"):
        expected, found = explainer.explain(f"w{4 + each.id} {prompt}", **asked), each.explanation
        assert (found.exact, found.recompute, found.effect) == (expected.exact, expected.recompute, expected.effect)
        assert torch.allclose(found.scores, expected.scores, atol=1e-4)
    with pytest.raises(InputError, match=r"options = .*this run has"):
        explain_part(explainer, tmp_path / "in.jsonl", tmp_path / "out", progress=False, max_new_tokens=2)


def test_more_parts_than_rows(explainer, source, tmp_path):
    assert explain_part(explainer, source, tmp_path / "out", part=8, parts=9).rows == 0


@pytest.mark.slow
def test_a_group_of_processes_explains_together(explainer, source, tmp_path):
    """Two with half of the model's heads each: one writes, both know what was done, and neither goes on alone."""
    explainer.model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "group.py").write_text(GROUP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "group.py", tmp_path / "model", source],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    refused = "settings: not the same on ranks 0 and 1 of 2, which share this model"
    assert lines == sorted(["7 7 1", "7 7 1", "7 0 1", "7 0 0", refused, refused])
    assert not (tmp_path / "in.jsonl.other").exists()
    check(tmp_path / "in.jsonl.out", explainer)
