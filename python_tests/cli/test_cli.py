"""The command line end to end: what goes to which stream, into which file, and with which exit code."""

import importlib.util
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from click.testing import CliRunner

import atman_kernels
from atman_kernels.cli import main
from atman_kernels.cli.model import warnings_as_messages
from atman_kernels.cli.prompts import squad_question
from atman_kernels.errors import BackendUnavailableError, InputError, UnsupportedModelError

PROMPT = "The dog is named"
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Dogs",
            "paragraphs": [
                {
                    "context": "Pilot is a dog.",
                    "qas": [
                        {"id": "0", "question": "Who is a dog?", "answers": [{"text": "Pilot", "answer_start": 0}]},
                        {"id": "1", "question": "Who is a cat?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "The bell rang.",
                    "qas": [{"id": "2", "question": "What rang?", "answers": [{"text": "bell", "answer_start": 4}]}],
                },
            ],
        }
    ],
}


def atman(*arguments, stdin=None):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def explain_result(tiny_llama):
    """`atman explain` on the tiny model in float32, with JSON on standard output."""

    def run(*arguments, stdin=None):
        fixed = ("--model", tiny_llama, "--dtype", "float32", "--max-new-tokens", 3, "--json", "-")
        result = atman("explain", *fixed, *arguments, stdin=stdin)
        assert result.exit_code == 0, result.stderr
        return result

    return run


@pytest.fixture
def explain(explain_result):
    """The same; returns the parsed JSON."""
    return lambda *arguments, stdin=None: json.loads(explain_result(*arguments, stdin=stdin).stdout)


@pytest.fixture
def no_model(monkeypatch):
    """Input is refused before a model is loaded."""
    monkeypatch.setattr(
        "atman_kernels.hf.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )


@pytest.fixture
def squad(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(SQUAD))
    return file


# --- explain ---


def test_choices_are_the_librarys():
    from atman_kernels.cli.explain import MODES
    from atman_kernels.cli.values import UNITS
    from atman_kernels.formula import MODES as OF_THE_FORMULA
    from atman_kernels.planning.units import GRANULARITIES

    assert set(MODES) == set(OF_THE_FORMULA)
    assert set(UNITS) == set(GRANULARITIES)


def test_heatmap_to_stdout_messages_to_stderr(tiny_llama):
    result = atman("explain", "--model", tiny_llama, "--target", " Pilot", "--dtype", "float32", "--top", 2, PROMPT)
    assert result.exit_code == 0
    assert "Strongest units" in result.stdout
    assert "dog" in result.stdout
    assert "Loading" not in result.stdout
    assert "in float32 (as asked)" in result.stderr
    assert "tokens through the model" in result.stderr


def test_auto_dtype_is_said_with_its_reason(tiny_llama, monkeypatch):
    monkeypatch.setattr(
        "atman_kernels.hf.models.loading.choose_dtype", lambda device: (torch.float32, "because of the moon")
    )
    result = atman("explain", "--model", tiny_llama, "--device", "cpu", "--target", " Pilot", PROMPT)
    assert "on cpu in float32 (because of the moon)" in result.stderr


def test_quiet(tiny_llama):
    result = atman("explain", "--model", tiny_llama, "--target", " Pilot", "--quiet", PROMPT)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "Strongest units" in result.stdout


def test_same_scores_as_the_explainer(explain, tiny_llama):
    from atman_kernels.hf.models.loading import load_model

    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu")
    explainer = atman_kernels.Explainer(
        model, tokenizer, mode="multiplicative", factor=0.3, similarity_threshold=0.6, layers=[1], progress=False
    )
    expected = explainer.explain(PROMPT, " Pilot rang", units="word", include_target=True)
    options = ("--mode", "multiplicative", "--factor", 0.3, "--threshold", 0.6, "--layers", "1", "--units", "word")
    found = explain("--target", " Pilot rang", "--include-target", *options, PROMPT)
    torch.testing.assert_close(torch.tensor(found["scores"]), expected.scores, atol=1e-5, rtol=0)
    assert float(expected.scores.abs().max()) > 1e-3
    for name in ("mode", "factor", "similarity_threshold", "layers", "units", "dtype"):
        assert found["settings"][name] == expected.settings[name]


def test_named_spans_cut_into_words(explain):
    words = PROMPT.split()
    cut = len(" ".join(words[:3]))
    spans = ("--span", f"0-{cut}=Doc A", "--span", f"{cut}-{len(PROMPT)}=Doc = B")
    found = explain("--target", " Pilot", *spans, "--units", "word", "--refine", 1, PROMPT)
    assert found["levels"] == ["span", "word"]
    assert [unit["name"] for unit in found["units"][:2]] == ["Doc A", "Doc = B"]
    assert len({unit.get("parent") for unit in found["units"]}) == 2
    plain = explain("--target", " Pilot", *spans, PROMPT)
    assert [len(plain["units"]), plain["levels"]] == [2, []]
    assert explain("--target", " Pilot", "--units", "sentence,word", PROMPT)["levels"] == ["sentence", "word"]


def test_method_and_other_answer(explain, tiny_llama):
    from atman_kernels.hf.models.loading import load_model

    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu")
    expected = atman_kernels.Explainer(model, tokenizer, progress=False).explain(
        PROMPT, " Pilot", "word", versus=" rang", method="shapley", permutations=6, seed=3
    )
    options = ("--method", "shapley", "--permutations", 6, "--seed", 3, "--units", "word")
    found = explain("--target", " Pilot", "--versus", " rang", *options, PROMPT)
    torch.testing.assert_close(torch.tensor(found["scores"]), expected.scores, atol=1e-5, rtol=0)
    assert found["settings"]["versus"] == " rang"
    assert found["settings"]["options"] == {"permutations": 6, "seed": 3}


@pytest.mark.parametrize(("given", "expected"), [("0-1", [0, 1]), ("1,0", [0, 1]), ("1", [1]), ("0,0-1", [0, 1])])
def test_layers(explain, given, expected):
    assert explain("--layers", given, "--target", " Pilot", PROMPT)["settings"]["layers"] == expected


def test_prompt_from_argument_file_and_stdin(explain, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n")
    prompts = [explain(*source, stdin=stdin)["prompt"] for source, stdin in (
        ((PROMPT,), None), (("--file", file), None), (("-",), f"{PROMPT}\n"), (("--file", "-"), f"{PROMPT}\r\n"),
    )]  # fmt: skip
    assert prompts == [PROMPT] * 4


def test_model_answers_when_no_target_is_given(explain):
    found = explain("--max-new-tokens", 2, PROMPT)
    assert len(found["target_tokens"]) == 2


def test_target_glued_to_the_prompt_is_pointed_out(tiny_llama):
    arguments = ("explain", "--model", tiny_llama, PROMPT, "--target")
    assert "namedPilot" in atman(*arguments, "Pilot").stderr
    assert "without a space" not in atman(*arguments, " Pilot").stderr


def test_chat_template(explain):
    assert explain("--chat", PROMPT)["prompt"] == f"[user] {PROMPT}\n[assistant] "


def test_json_file_can_be_loaded(tiny_llama, tmp_path):
    result = atman("explain", "--model", tiny_llama, "--target", " Pilot", "--json", tmp_path / "e.json", PROMPT)
    assert result.exit_code == 0
    assert "Strongest units" in result.stdout
    explanation = atman_kernels.Explanation.load(tmp_path / "e.json")
    assert (explanation.prompt, explanation.target) == (PROMPT, " Pilot")


def test_html_is_escaped(tiny_llama, tmp_path):
    prompt = "The dog <script>alert('rang')</script> is"
    page = tmp_path / "page.html"
    options = ("--target", " </script><b>", "--html", page, "--units", "word")
    result = atman("explain", "--model", tiny_llama, *options, prompt)
    assert result.exit_code == 0
    html = page.read_text()
    assert "alert" in html
    assert "<script>alert" not in html
    assert "</script><b>" not in html


# --- SQuAD ---


def test_squad_item(explain, squad):
    found = explain("--squad", squad, "--item", 2)
    assert found["prompt"] == "The bell rang.\n\nQuestion: What rang?\nAnswer:"
    assert found["target"] == " bell"


def test_squad_target_can_be_replaced(explain, squad):
    assert explain("--squad", squad, "--item", 0, "--target", " dog")["target"] == " dog"


def test_squad_as_chat(explain, squad):
    found = explain("--squad", squad, "--item", 0, "--chat")
    assert found["prompt"] == "[user] Pilot is a dog.\n\nWho is a dog?\n[assistant] "
    assert found["target"] == "Pilot"


def test_squad_question_without_an_answer_is_left_to_the_model(explain, squad):
    found = explain("--squad", squad, "--item", 1)
    assert "Who is a cat?" in found["prompt"]
    assert len(found["target_tokens"]) == 3


def test_squad_sample(squad_sample):
    question = squad_question(str(squad_sample), 7)
    assert question.question.endswith("?")
    assert question.answer in question.context


# --- failures: an exit code and one line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPT,), "--model or --gguf is missing"),
        (("--model", "m"), "exactly one of"),
        (("--model", "m", "--file", "f", PROMPT), "exactly one of"),
        (("--model", "m", "--file", "no-such-file"), "no-such-file cannot be read: No such file"),
        (("--model", "m", ""), "prompt is empty"),
        (("--model", "m", "-"), "prompt is empty"),
        (("--model", "m", "--item", "1", PROMPT), "--item needs --squad"),
        (("--model", "m", "--squad", "squad.json"), "--squad needs --item"),
        (("--model", "m", "--squad", "squad.json", "--item", "1", PROMPT), "brings its own prompt"),
        (("--model", "m", "--squad", "squad.json", "--item", "3"), "--item must be in 0..2"),
        (("--model", "m", "--squad", "squad.json", "--item", "-1"), "--item must be in 0..2"),
        (("--model", "m", "--squad", "other.json", "--item", "0"), "not in SQuAD format"),
        (("--model", "m", "--squad", "binary", "--item", "0"), "not UTF-8"),
        (("--model", "m", "--squad", "text", "--item", "0"), "not JSON"),
        (("--model", "m", "--file", "binary"), "binary is not UTF-8"),
        (("--model", "m", "--units", "letter", PROMPT), "--units"),
        (("--model", "m", "--units", "word,letter", PROMPT), "'letter' is not one of token, word"),
        (("--model", "m", "--units", "word,sentence", PROMPT), "sentences do not refine words"),
        (("--model", "m", "--span", "5", PROMPT), "expected characters as in 0-120 or 0-120=Name, got '5'"),
        (("--model", "m", "--span", "0-9", "--span", "5-12", "--units", "word", PROMPT), "not to overlap"),
        (("--dataset", "d", "--out", "o", "--span", "0-9"), "--span does not go with --dataset"),
        (("--model", "m", "--mode", "subtractive", PROMPT), "--mode"),
        (("--model", "m", "--factor", "-1", PROMPT), "--factor"),
        (("--model", "m", "--threshold", "0", PROMPT), "--threshold"),
        (("--model", "m", "--threshold", "1.1", PROMPT), "--threshold"),
        (("--model", "m", "--layers", "2-", PROMPT), "--layers"),
        (("--model", "m", "--layers", "a", PROMPT), "--layers"),
        (("--model", "m", "--dtype", "int8", PROMPT), "--dtype"),
        (("--model", "m", "--html", "no/such/folder/page.html", PROMPT), "--html must be a file"),
        (("--model", "m", "--json", ".", PROMPT), "--json must be a file"),
        (("--model", "m", "--device", "toaster", PROMPT), "device 'toaster'"),
        (("--model", "m", "--nonsense", PROMPT), "--nonsense"),
        (("--model", "m", "--method", "shapely", PROMPT), "method must be one of 'atman', 'linear', 'shapley'"),
        (("--model", "m", "--permutations", "8", PROMPT), "'atman' has no option 'permutations'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("no_model")
def test_wrong_input(arguments, message, squad, monkeypatch):
    monkeypatch.chdir(squad.parent)
    (squad.parent / "other.json").write_text('{"data": [{"title": "no paragraphs"}]}')
    (squad.parent / "binary").write_bytes(b"\xff\xfe\x00")
    (squad.parent / "text").write_text("not { JSON")
    result = atman("explain", *arguments, stdin="")
    assert result.exit_code == 2
    assert message in result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Loading")]
    assert len(errors) == 1, result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "", PROMPT), "target is empty"),
        (("--target", " Pilot", "--versus", "", PROMPT), "versus is empty"),
        (("--layers", "7", "--target", " Pilot", PROMPT), "layer"),
        (("--factor", "nan", "--target", " Pilot", PROMPT), "factor"),
        (("--target", " Pilot", "~" * 1100), "positions"),
    ],
    ids=["empty target", "empty versus", "layer", "factor", "too long"],
)
def test_input_that_does_not_fit_the_model(arguments, message, tiny_llama, tmp_path):
    page = tmp_path / "page.html"
    result = atman("explain", "--model", tiny_llama, "--dtype", "float32", "--quiet", "--html", page, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not page.exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong\nhere"), 2),
        (UnsupportedModelError("not this one"), 3),
        (BackendUnavailableError("not here"), 3),
        (RuntimeError("out of luck"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error, code, monkeypatch):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("atman_kernels.hf.models.loading.load_model", failing)
    result = atman("explain", "--model", "m", "--quiet", PROMPT)
    assert result.exit_code == code
    assert len(result.stderr.splitlines()) == 1
    assert ("--traceback" in result.stderr) == (code == 1)


def test_traceback_on_request(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("atman_kernels.hf.models.loading.load_model", failing)
    result = atman("--traceback", "explain", "--model", "m", PROMPT)
    assert isinstance(result.exception, RuntimeError)


def test_unsupported_model(tmp_path, tiny_tokenizer):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    result = atman("explain", "--model", tmp_path, "--quiet", PROMPT)
    assert (result.exit_code, "not a causal language model" in result.stderr) == (3, True)


def test_in_a_process_of_its_own():
    code = "from atman_kernels.cli import main; main()"
    command = [sys.executable, "-c", code, "explain", "--model", "m", "-"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    error = "Error: prompt is empty; expected a text with at least one character\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", error)


def test_help_loads_nothing_heavy():
    code = """
import sys
from atman_kernels.cli import main
for command in ("--help", "explain --help", "bench --help"):
    main(command.split(), standalone_mode=False)
print([name for name in ("torch", "transformers", "rich", "numpy") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_library_warnings_become_notes(capsys):
    with warnings_as_messages():
        warnings.warn("slower than usual", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "Note: slower than usual\n"


# --- the other commands ---


def test_no_arguments_show_the_help():
    result = atman()
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("explain", "demo", "doctor", "bench"))


def test_version():
    assert atman_kernels.__version__ in atman("--version").stdout


def test_doctor():
    found = json.loads(atman("doctor", "--json").stdout)
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["backends"]["reference"] is None
    assert found["backends"]["cuda"]
    shown = atman("doctor").stdout
    for name, reason in found["backends"].items():
        (line,) = (line for line in shown.splitlines() if line.startswith(f"backend {name} "))
        assert (reason or "can run") in line


def test_bench_ops():
    result = atman("bench", "ops", "--length", 24, "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["length"] == 24
    assert row["ratio"] == pytest.approx(row["dense_bias_ms_per_variant"] / row["packed_ms_per_variant"])
    assert "24" in atman("bench", "ops", "--length", 24).stdout


def test_bench_ops_compares_before_it_times(monkeypatch):
    from atman_kernels.cli import bench

    packed = bench._packed
    monkeypatch.setattr(bench, "_packed", lambda *inputs: lambda: [1.01 * part for part in packed(*inputs)()])
    with pytest.raises(RuntimeError, match="the two ways differ"):
        bench.measure(16, torch.device("cpu"), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_bench_tune_needs_a_gpu():
    result = atman("bench", "tune")
    assert result.exit_code == 3
    assert "tuning needs a GPU" in result.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [(("bench",), "benchmarks"), (("bench", "scaling", "--help", "--size", "1B"), "benchmarks.scaling")],
)
def test_benchmarks_of_the_repository_are_run_there(command, module):
    """A command of the package runs nothing of a checkout that it may be in."""
    result = atman(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"in the repository, not in the package: run `python -m {module}` there" in result.stderr
    assert importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize(
    ("options", "said", "offered"),
    [
        ((), True, True),
        (("--recompute", 1), True, False),
        (("--method", "linear"), False, False),
        (("-q",), False, False),
    ],
)
def test_what_will_take_long_is_said_before(explain_result, monkeypatch, options, said, offered):
    """The machine's rate comes from the unperturbed runs; a method that runs no variants has none."""
    from atman_kernels.cli import estimate

    monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
    monkeypatch.setattr(estimate, "TOO_LONG", 0.0)
    told = explain_result(PROMPT, *options).stderr
    assert (re.search(r"\d+ tokens through the model will take about \d\S* \w+ here", told) is not None) == said
    assert ("--exact 16 finds the 16 strongest" in told) == offered


def test_demo_on_a_tiny_model(tiny_llama, tmp_path, monkeypatch):
    from atman_kernels.hf.models import loading

    load_model = loading.load_model
    asked_for = []

    def instead(model, **options):
        asked_for.append(model)
        return load_model(tiny_llama, **options | {"gguf_file": None})

    monkeypatch.setattr(loading, "load_model", instead)
    monkeypatch.chdir(tmp_path)
    result = atman("demo", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert asked_for == ["smollm2"]
    assert "Strongest units" in result.stdout
    assert "How to read it" in result.stderr
    assert "lighthouse" in (tmp_path / "atman-demo.html").read_text()


@pytest.mark.slow
def test_demo_finds_the_answer(tmp_path):
    """SmolLM2 reads the answer in the paragraph, and the explanation says where."""
    from atman_kernels.cli.demo import explain_demo
    from atman_kernels.hf.models.loading import find_smollm2, load_model

    try:
        find_smollm2()
    except InputError as error:
        pytest.skip(str(error))
    explanation = explain_demo(*load_model("smollm2", dtype="float32", device="cpu"))
    assert "Pilot" in explanation.target
    assert any("Pilot" in unit.text for unit, _ in explanation.top(3))


# --- steer ---


def steer(tiny_llama, *arguments):
    return atman("steer", "--model", tiny_llama, "--dtype", "float32", "--max-new-tokens", 6, *arguments)


def test_steer_prints_both_answers(tiny_llama):
    result = steer(tiny_llama, "--suppress", "dog", "--amplify", "named", "--amplify-factor", 4, PROMPT)
    assert result.exit_code == 0, result.stderr
    assert "The [dog ×0.1] is [named ×4]" in result.stdout
    assert "Plain" in result.stdout
    assert "Steered" in result.stdout
    assert "Loading" not in result.stdout
    quiet = steer(tiny_llama, "--suppress", "dog", "--quiet", PROMPT)
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_steer_json_holds_the_librarys_answers(tiny_llama, tmp_path):
    from atman_kernels.hf.models.loading import load_model

    options = ("--chat", "--suppress", "the d.g", "--regex", "--occurrence", -1, "--factor", 0, "--layers", "0-1")
    prompt = "Pilot is the dog. Who is the dog?"
    result = steer(tiny_llama, *options, "--json", "-", prompt)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    text = f"[user] {prompt}\n[assistant] "
    start = text.rindex("the dog")
    (span,) = found["spans"]
    assert (found["prompt"], span["text"], span["start"], span["factor"]) == (text, "the dog", start, 0.0)
    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu")
    with atman_kernels.steer(model, tokenizer, prompt, {(start, start + 7): 0.0}, chat=True) as steered:
        assert found["steered"] == steered.generate(max_new_tokens=6, do_sample=False)[0]
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert found["plain"] == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert found["plain"] != found["steered"]
    file = tmp_path / "steered.json"
    assert steer(tiny_llama, *options, "--json", file, prompt).exit_code == 0
    assert json.loads(file.read_text(encoding="utf-8")) == found


def test_steer_draws_and_searches_as_asked(tiny_llama):
    from atman_kernels.hf.models.loading import load_model

    def answered(*options):
        return json.loads(steer(tiny_llama, "--suppress", "dog", "--factor", 0, *options, "--json", "-", PROMPT).stdout)

    drawn = [answered("--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0]["plain"] != drawn[2]["plain"]
    assert drawn[0]["settings"]["temperature"] == 2
    model, tokenizer = load_model(tiny_llama, dtype="float32", device="cpu")
    with atman_kernels.steer(model, tokenizer, PROMPT, {"dog": 0.0}) as steered:
        expected = steered.generate(max_new_tokens=6, do_sample=False, num_beams=3)[0]
    assert answered("--beams", 3)["steered"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((PROMPT,), "--suppress or --amplify is missing"),
        (("--suppress", "cat", PROMPT), "'cat' does not occur in the prompt"),
        (("--suppress", "a", PROMPT + " a"), "'a' occurs 2 times"),
        (("--suppress", "a", "--occurrence", "3", PROMPT), "'a' has no occurrence 3"),
        (("--suppress", "a", "--occurrence", "last", PROMPT), "expected a number, from 0, or all, got 'last'"),
        (("--suppress", "(", "--regex", PROMPT), "'(' is no regular expression"),
        (("--suppress", "dog", "--amplify", "dog", PROMPT), "'dog' is both in --suppress and in --amplify"),
        (("--suppress", "dog", "--factor", "1.5", PROMPT), "--factor"),
        (("--suppress", "dog", "--json", "/nowhere/at/all.json", PROMPT), "--json must be a file"),
        (("--suppress", "dog"), "prompt: give exactly one"),
    ],
)
def test_steer_refuses_what_does_not_fit_before_a_model_is_loaded(no_model, options, message):
    result = atman("steer", "--model", "tiny", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
