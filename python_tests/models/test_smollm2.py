"""Real weights on real text: packed explanations of SmolLM2 equal separate full runs."""

import json
import os
from pathlib import Path

import eager_oracle
import pytest
import torch

import atman_kernels as ak
from atman_kernels.planning.factors import factor_rows

pytestmark = pytest.mark.slow
SQUAD = Path(os.environ.get("ATMAN_SQUAD", Path(__file__).parents[3] / "shared/data/squad-v1.1-sample.json"))
OWN_TEXT = (
    "The ferry to Vessel Island leaves at seven in the morning and again at noon, except on Mondays, when the crew "
    "repairs the nets. Captain Idra Molnar has steered it for nineteen years. A ticket costs four silver coins; "
    "children and goats travel free.\nQuestion: Who steers the ferry?\nAnswer:"
)


def questions():
    """(prompt, answer): one of our own, and one from SQuAD where it is at hand."""
    found = [(OWN_TEXT, " Captain Idra Molnar")]
    if SQUAD.exists():
        item = json.loads(SQUAD.read_text())["data"][3]["paragraphs"][1]
        asked = item["qas"][0]
        found.append((f"{item['context']}\nQuestion: {asked['question']}\nAnswer:", " " + asked["answers"][0]["text"]))
    return found


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    from atman_kernels.hf.models.loading import find_smollm2, load_model

    try:
        find_smollm2()
    except ak.InputError as error:
        pytest.skip(str(error))
    return load_model("smollm2", dtype="float32")


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("mode", ["log_additive", "multiplicative", "shifted"])
@pytest.mark.parametrize(("question", "factor"), [(0, 0.0), (1, 0.1)])
def test_packed_equals_separate_full_runs(smollm2, question, factor, mode, threshold):
    if question >= len(questions()):
        pytest.skip(f"no SQuAD file at {SQUAD}")
    model, tokenizer = smollm2
    prompt, answer = questions()[question]
    explainer = ak.Explainer(model, tokenizer, mode=mode, factor=factor, similarity_threshold=threshold, progress=False)
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    chosen = offsets[:: max(1, len(offsets) // 12)]  # each oracle run is a whole forward
    explanation = explainer.explain(prompt, answer, chosen)
    assert explanation.settings["path"] == "packed"
    ids = torch.tensor(tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"])
    with torch.no_grad():
        vectors = model.get_input_embeddings()(ids)
    vectors[-1] = 0  # the last answer token is not an input
    rows = factor_rows(explanation.units, len(ids), factor, embeddings=vectors, similarity_threshold=threshold)
    if threshold is not None:
        assert ((rows < 1).sum(1) > 1).any(), "some unit must have neighbours"
    expected = eager_oracle.leave_one_out(model, ids, len(offsets), rows, mode)
    assert expected.abs().max() > 0.1
    assert (explanation.scores.double() - expected).abs().max() <= 1e-4


def test_the_answer_rests_on_the_name(smollm2):
    model, tokenizer = smollm2
    explanation = ak.Explainer(model, tokenizer, progress=False).explain(OWN_TEXT, " Captain Idra Molnar", "word")
    strongest = {unit.text for unit, _ in explanation.top(3)}
    assert strongest & {"Idra", "Molnar", "Captain"}
