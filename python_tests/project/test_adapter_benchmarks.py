"""The adapters' benchmark on a tiny model: it checks before it times, and writes what it says."""

import json

import click
import own_text_model
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

pytest.importorskip("captum")
pytest.importorskip("inseq")
from benchmarks import adapters
from benchmarks.prompts import OWN_PARAGRAPH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return own_text_model.saved(tmp_path_factory.mktemp("model"))


def test_the_program(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "find_squad", lambda _: None)
    output = tmp_path / "out.json"
    done = CliRunner().invoke(
        adapters.main, ["--quick", "--model", str(folder), "--output", str(output)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["environment"]["versions"]["inseq"]
    ablation, shapley, of_sentences, occlusion = result["records"]
    assert ablation["features"] == 128
    assert ablation["peer_scaled_by"] == 129 / 8
    assert ablation["peer_extrapolated"]
    assert (shapley["texts"], shapley["permutations"]) == (2, 2)
    forwards = [2 * n + 2 for n in shapley["features"]]
    assert shapley["peer_scaled_by"] == pytest.approx(sum(forwards) / sum(n + 2 for n in shapley["features"]))
    assert (of_sentences["texts"], of_sentences["features"], of_sentences["peer_scaled_by"]) == (1, [2], 1)
    assert not occlusion["peer_extrapolated"]
    assert 1 in occlusion["peer_batches_that_are_right"]
    for record in result["records"]:
        ratio = record["peer_seconds"][0] / record["ours_seconds"][0]
        assert record["ratio"]["median"] == pytest.approx(ratio)


def test_what_is_wrong_is_not_timed():
    assert adapters.checked(torch.ones(2), torch.ones(2), "ours") == 0
    for wrong in (torch.tensor([1.0, 1.1]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(click.ClickException, match="ours is off by"):
            adapters.checked(wrong, torch.ones(2), "ours")


def test_sentences_are_cut_before_their_last_words(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    found = adapters.cut_sentences(tokenizer, None, 12)
    assert len(found) == 12
    prompt, target = tokenizer.decode(found[0].inp.inp_tensor[0]), found[0].target
    assert OWN_PARAGRAPH.startswith(prompt + target)
    assert len(target.split()) == adapters.TARGET_WORDS


def test_a_text_has_as_many_sentences_as_features():
    asked = adapters.text_of_sentences(None, 20)
    assert asked.inp.n_itp_features == 20
    text = asked.inp.to_model_input()
    assert text.count(". ") == 19
    assert text.endswith("\nAnswer:")
