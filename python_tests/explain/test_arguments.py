"""What the public API takes for a list, a number, a text: numpy's and pandas' too, and what it refuses by name."""

import copy
import doctest
import itertools
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch

import atman_kernels as ak
from atman_kernels import arguments
from atman_kernels.evaluation import metrics, squad

PROMPT, ANSWER, OTHER = "w5 w6 w7 w8", "w9 w10", "w11"


class Series:
    """What pandas' Series is to us: a thing with `tolist`, whose truth value and whose [0] are no list's."""

    def __init__(self, values):
        self._values = list(values)

    def tolist(self):
        return list(self._values)

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def __bool__(self):
        raise ValueError("the truth value of a Series is ambiguous")

    def __getitem__(self, key):
        raise KeyError(key)


def pandas_series(values):
    return pytest.importorskip("pandas").Series(list(values))


LISTS = {
    "tuple": tuple,
    "array": lambda values: np.array(list(values), dtype=object),
    "series": Series,
    "pandas": pandas_series,
    "generator": iter,
    "keys": lambda values: dict.fromkeys(values).keys(),
}
NO_LISTS = {"text": "w5", "bytes": b"w5", "mapping": {"w5": 1}, "set": {"w5"}, "number": 3, "numpy number": np.int64(3)}


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture
def explainer(model, tokenizer):
    return ak.Explainer(model, tokenizer, progress=False)


@pytest.fixture
def idle(model, monkeypatch):
    """The model may not run: whatever is refused is refused before."""
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))


def test_examples():
    assert doctest.testmod(arguments).failed == 0


# --- lists ---


@pytest.mark.parametrize("kind", LISTS)
def test_every_kind_of_list_is_a_list(explainer, model, tokenizer, kind):
    make = LISTS[kind]
    expected = explainer.explain_batch([PROMPT, OTHER], [ANSWER, ANSWER], ["word", "token"], versus=[OTHER, "w12"])
    found = explainer.explain_batch(
        make([PROMPT, OTHER]), iter([ANSWER, ANSWER]), make(["word", "token"]), versus=make([OTHER, "w12"])
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert one.versus == other.versus
    spans = [(0, 2), (3, 8)]
    given = make(spans) if kind not in ("array", "pandas") else np.array(spans)
    assert torch.equal(explainer.explain(PROMPT, ANSWER, given).scores, explainer.explain(PROMPT, ANSWER, spans).scores)
    layered = ak.Explainer(model, tokenizer, layers=make([0, 2]), progress=False)
    assert layered.suppression["layers"] == [0, 2]
    pack = ak.VariantPack.build(make([1, 2]), make([3, 4]), make([0, 1]))
    assert pack.row_position.tolist() == [3, 4, 5]


def test_spans_of_a_generator_serve_both_answers(explainer):
    found = explainer.explain(PROMPT, ANSWER, (span for span in [(0, 2)]), versus=OTHER)
    assert torch.equal(found.scores, explainer.explain(PROMPT, ANSWER, [(0, 2)], versus=OTHER).scores)


def test_a_table_is_its_rows_and_not_the_names_of_its_columns(explainer):
    table = SimpleNamespace(__array__=lambda: np.array([[0, 2], [3, 5]]))  # as a DataFrame, which has no tolist
    assert arguments.entries(table, "units", "spans") == [[0, 2], [3, 5]]
    assert [unit.text for unit in explainer.explain(PROMPT, ANSWER, table).units] == ["w5", "w6"]
    frame = pytest.importorskip("pandas").DataFrame({"start": [0, 3], "end": [2, 5]})
    assert [unit.text for unit in explainer.explain(PROMPT, ANSWER, frame).units] == ["w5", "w6"]
    masks = pytest.importorskip("pandas").DataFrame([[True, False, False, True]])
    assert explainer.ablate(PROMPT, ANSWER, masks=masks).masks.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("bad", NO_LISTS)
@pytest.mark.parametrize("name", ["prompts", "targets", "units", "versus", "images"])
def test_what_is_no_list_is_refused_in_a_batch(explainer, idle, name, bad):
    if name == "units" and bad == "text":
        pytest.skip("a granularity for all prompts")
    given = {"prompts": [PROMPT, PROMPT], "targets": [ANSWER, ANSWER], name: NO_LISTS[bad]}
    with pytest.raises(ak.InputError, match=f"^{name} must be a list of .*, got .*{type(NO_LISTS[bad]).__name__}"):
        explainer.explain_batch(**given)


CALLS = {
    "layers": lambda m, t, bad: ak.Explainer(m, t, layers=bad),
    "layers of suppress": lambda m, t, bad: ak.suppress(m, None, layers=bad).__enter__(),
    "layers of steer": lambda m, t, bad: ak.steer(m, t, PROMPT, {}, layers=bad).__enter__(),
    "units": lambda m, t, bad: ak.Explainer(m, t).explain(PROMPT, ANSWER, bad),
    "masks": lambda m, t, bad: ak.Explainer(m, t, progress=False).ablate(PROMPT, ANSWER, masks=bad),
    "prompt": lambda m, t, bad: ak.Explainer(m, t).explain(bad, ANSWER),
    "target": lambda m, t, bad: ak.Explainer(m, t).explain(PROMPT, bad),
    "spans": lambda m, t, bad: ak.steer(m, t, [PROMPT, PROMPT], bad).__enter__(),
    "suffix_lengths": lambda m, t, bad: ak.VariantPack.build(bad, [1]),
    "prefix_lengths": lambda m, t, bad: ak.VariantPack.build([1], bad),
}


@pytest.mark.parametrize("bad", [*NO_LISTS, "lists"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_list_is_refused_by_its_name(model, tokenizer, call, bad):
    value = NO_LISTS.get(bad, [[["w5"]]])
    if (call in ("prompt", "target") and bad == "text") or (call == "spans" and bad == "mapping"):
        pytest.skip("is what it should be")
    with pytest.raises(ak.InputError, match=rf"^{call.split()[0]}"):
        CALLS[call](model, tokenizer, value)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("endless", [range(10**12), itertools.count()])
def test_lists_without_an_end_are_refused(model, tokenizer, endless, monkeypatch):
    monkeypatch.setattr(arguments, "MOST_ENTRIES", 1000)
    with pytest.raises(ak.InputError, match="layers has more than 1,000 entries"):
        ak.Explainer(model, tokenizer, layers=endless)


# --- numbers ---


def numpy_numbers(settings):
    """The same with numbers of numpy and 0-d arrays."""
    made = {int: np.int64, float: np.float32, bool: np.bool_, list: np.array}
    return {name: made[type(x)](x) if type(x) in made else x for name, x in settings.items()}


def arrays(settings):
    return {name: np.array(x) if isinstance(x, int | float) else x for name, x in settings.items()}


def tensors(settings):
    return {name: torch.tensor(x) if isinstance(x, int | float) else x for name, x in settings.items()}


@pytest.mark.parametrize("of", [numpy_numbers, arrays, tensors])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("atman", {}),
        ("shapley", {"permutations": 4, "seed": 3}),
        ("lasso", {"samples": 8, "alpha": 0.5, "keep": 0.25, "seed": 1}),
        ("raw_attention", {"layer": -1}),
        ("integrated_gradients", {"steps": 2, "batch": 2, "baseline": 4, "whole_answer": True}),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(model, tokenizer, of, method, options, tmp_path):
    settings = {"factor": 0.5, "similarity_threshold": 0.75, "token_budget": 64, "layers": [0, 1], "progress": False}
    expected = ak.Explainer(model, tokenizer, **settings).explain(
        PROMPT, max_new_tokens=2, include_target=True, method=method, **options
    )
    found = ak.Explainer(model, tokenizer, **of(settings)).explain(
        PROMPT, method=method, **of({"max_new_tokens": 2, "include_target": True, **options})
    )
    assert torch.equal(found.scores, expected.scores)
    assert found.settings == expected.settings  # plain numbers, which JSON knows
    found.save(tmp_path / "found.json")


def test_numbers_of_numpy_in_spans_steering_and_ops(model, tokenizer):
    number = np.int64
    spans = {(number(0), number(2)): np.float32(0.5), ak.Occurrence("w6", number(0)): np.float64(2), range(3, 4): 0}
    with ak.steer(model, tokenizer, PROMPT, spans) as steered:
        assert steered.factor.tolist() == [[0.5, 2, 1, 0]]
    with ak.steer(model, tokenizer, iter([PROMPT, PROMPT]), np.array([{"w5": 0.5}, {}], dtype=object)) as steered:
        assert steered.factor.tolist() == [[0.5, 1, 1, 1], [1, 1, 1, 1]]
    ids = torch.tensor([[5, 6, 7]])
    factor = torch.tensor([[0.5, 1, 1]])
    with ak.suppress(model, factor, layers=[0], queries=(1, None)), torch.no_grad():
        expected = model(ids).logits
    with ak.suppress(model, {number(0): factor}, queries=(number(1), None)), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    q = torch.randn(1, 1, 3, 4)
    settings = {"scale": 0.5, "softcap": 2.0, "sliding_window": 2, "is_causal": True}
    assert torch.equal(
        ak.suppressed_attention(q, q, q, **settings), ak.suppressed_attention(q, q, q, **numpy_numbers(settings))
    )


def test_numbers_of_numpy_in_results_and_measures(explainer):
    found = explainer.explain(PROMPT, ANSWER)
    assert found.top(np.int64(2)) == found.top(2)
    relevance, truth = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([False, False, True])
    assert metrics.hit(relevance, truth, np.int64(2))
    assert len(metrics.faithfulness(relevance, lambda gone: gone.sum(1), np.int32(3)).fractions) == 4
    settings = {"level": np.float32(0.5), "resamples": np.int64(99), "seed": np.int64(1)}
    plain = {"level": 0.5, "resamples": 99, "seed": 1}
    assert metrics.confidence_interval(relevance, **settings) == metrics.confidence_interval(relevance, **plain)
    items = [squad.Item(str(i), "", str(i), "", None, None) for i in range(4)]
    assert squad.drawn(items, np.int64(2), np.int64(7)) == squad.drawn(items, 2, 7)


NO_NUMBERS = (
    True,
    np.True_,
    "1",
    b"1",
    float("nan"),
    np.nan,
    [1],
    np.array([1]),
    torch.tensor([1]),
    1j,
    {},
    np.timedelta64(1),
)


@pytest.mark.parametrize("bad", NO_NUMBERS, ids=[f"{type(bad).__name__} {bad!r}"[:24] for bad in NO_NUMBERS])
@pytest.mark.parametrize(
    "name", ["factor", "similarity_threshold", "token_budget", "max_new_tokens", "seed", "permutations", "layers"]
)
def test_what_is_no_number_is_refused(model, tokenizer, idle, name, bad):
    settings = {name: [bad] if name == "layers" else bad}
    method = {"method": "shapley"} if name in ("seed", "permutations") else {}
    asked = settings if name in ("max_new_tokens", "seed", "permutations") else {}
    with pytest.raises(ak.InputError, match=rf"^{name} must be "):
        ak.Explainer(model, tokenizer, **{} if asked else settings).explain(PROMPT, **method, **asked)


@pytest.mark.parametrize("bad", NO_NUMBERS, ids=[f"{type(bad).__name__} {bad!r}"[:24] for bad in NO_NUMBERS])
def test_what_is_no_number_is_refused_by_measures_and_steering(model, tokenizer, idle, bad):
    relevance, truth = torch.tensor([0.2, 0.9]), torch.tensor([False, True])
    for name, call in {
        "k": lambda: metrics.hit(relevance, truth, bad),
        "steps": lambda: metrics.faithfulness(relevance, lambda gone: gone.sum(1), bad),
        "level": lambda: metrics.confidence_interval(relevance, level=bad),
        "resamples": lambda: metrics.confidence_interval(relevance, resamples=bad),
        "seed": lambda: metrics.confidence_interval(relevance, seed=bad),
        "count": lambda: squad.drawn([], bad, 0),
        "seed ": lambda: squad.drawn([], 1, bad),
        "spans": lambda: ak.steer(model, tokenizer, PROMPT, {"w5": bad}).__enter__(),
        "Occurrence: which": lambda: ak.Occurrence("w5", bad),
        "scale": lambda: ak.suppressed_attention(*[torch.zeros(1, 1, 2, 2)] * 3, scale=bad),
        "softcap": lambda: ak.suppressed_attention(*[torch.zeros(1, 1, 2, 2)] * 3, softcap=bad),
        "sliding_window": lambda: ak.suppressed_attention(*[torch.zeros(1, 1, 2, 2)] * 3, sliding_window=bad),
        "suffix_lengths": lambda: ak.VariantPack.build([bad], [1]),
        "queries": lambda: ak.suppress(model, None, queries=(0, bad)).__enter__(),
    }.items():
        with pytest.raises(ak.InputError, match=f"^{name.strip()}"):
            call()


@pytest.mark.parametrize("name", ["vision", "progress", "chat", "include_target"])
@pytest.mark.parametrize("bad", ["no", 1, None, np.int64(0)])
def test_what_is_neither_true_nor_false_is_refused(model, tokenizer, idle, name, bad):
    given = {name: bad}
    asked = given if name in ("chat", "include_target") else {}
    with pytest.raises(ak.InputError, match=f"^{name} must be True or False"):
        ak.Explainer(model, tokenizer, **{} if asked else given).explain(PROMPT, ANSWER, **asked)


@pytest.mark.parametrize("name", ["is_causal", "return_lse"])
def test_ops_take_no_text_for_true(name):
    with pytest.raises(ak.InputError, match=f"^{name} must be True or False, got 'no'"):
        ak.suppressed_attention(*[torch.zeros(1, 1, 2, 2)] * 3, **{name: "no"})


@pytest.mark.parametrize("shape", [(1, 1, 2, 0), (0, 1, 2, 0)])
def test_a_head_dimension_of_zero_is_refused(shape):
    q = torch.zeros(shape)
    with pytest.raises(ak.InputError, match="query must have a head dimension D >= 1, got shape"):
        ak.suppressed_attention(q, q, q)
    with pytest.raises(ak.InputError, match="query must have a head dimension D >= 1, got shape"):
        ak.packed_suppressed_attention(*[torch.zeros(1, 2, 0)] * 5, ak.VariantPack.build([2], [0]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4)])
def test_no_sequences_and_no_queries_give_nothing(backend, shape):
    keys = torch.randn(shape[0], 2, 3, 4)
    assert ak.suppressed_attention(torch.zeros(shape), keys, keys, backend=backend).shape == shape


# --- texts ---

HALVES = {"\ud83e": "U+D83E, half a character", "w5 \udce9": "character 3 is U+DCE9, the byte 0xE9 that was not UTF-8"}


ENTRANCES = {
    "prompt": lambda m, t, x: ak.Explainer(m, t).explain(x, ANSWER),
    "target": lambda m, t, x: ak.Explainer(m, t).explain(PROMPT, x),
    "versus": lambda m, t, x: ak.Explainer(m, t).explain(PROMPT, ANSWER, versus=x),
    "prompt: chat": lambda m, t, x: ak.Explainer(m, t).explain(x, ANSWER, chat=True),
    "prompt[0]['content']": lambda m, t, x: ak.Explainer(m, t).explain([{"role": "user", "content": x}]),
    "prompt[0]['role']": lambda m, t, x: ak.Explainer(m, t).explain([{"role": x, "content": "w5"}]),
    "prompt[0]['content'][0]['text']": lambda m, t, x: ak.Explainer(m, t).explain(
        [{"role": "user", "content": [{"type": "text", "text": x}]}]
    ),
    "prompt of ablate": lambda m, t, x: ak.Explainer(m, t).ablate(x, ANSWER, masks=torch.ones(1, 1) > 0),
    "prompt 1: prompt": lambda m, t, x: ak.steer(m, t, [PROMPT, x], {}).__enter__(),
    "spans": lambda m, t, x: ak.steer(m, t, PROMPT, {x: 0.0}).__enter__(),
    "Occurrence: of": lambda m, t, x: ak.Occurrence(x, 0),
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_half_a_character_is_refused_where_text_enters(model, tokenizer, idle, entrance, half):
    name = re.escape(re.split(": c| of ", entrance)[0])
    with pytest.raises(ak.InputError, match=f"^{name} is no text: .*{re.escape(HALVES[half])}"):
        ENTRANCES[entrance](model, tokenizer, half)


@pytest.mark.parametrize("bad", [float("nan"), b"w5", 3, [ANSWER], np.array([ANSWER]), None])
@pytest.mark.parametrize("name", ["targets", "versus", "prompts"])
def test_entries_that_are_no_texts_are_named_with_their_prompt(explainer, idle, name, bad):
    if bad is None and name != "prompts":
        pytest.skip("None is left to the model")
    given = {"prompts": [PROMPT, PROMPT], "targets": [ANSWER, ANSWER]}
    with pytest.raises(ak.InputError, match=f"^prompt 1: {name.removesuffix('s') if name != 'versus' else name} must"):
        explainer.explain_batch(**given | {name: [given["prompts"][0], bad]})


def test_all_prompts_are_read_before_the_model_answers_one(explainer, idle):
    with pytest.raises(ak.InputError, match=r"^prompt 1: units\[0\]: got \(0, 99\)"):
        explainer.explain_batch([PROMPT, PROMPT], units=["word", [(0, 99)]])
    with pytest.raises(ak.InputError, match=r"^prompt 1: prompt and target have 129 tokens, but the model has 128"):
        explainer.explain_batch([PROMPT, " ".join(["w5"] * 129)])


def test_a_text_of_a_subclass_is_its_text(explainer):
    text = np.str_(PROMPT)
    found = explainer.explain(text, np.str_(ANSWER), np.str_("word"))
    assert type(found.prompt) is str
    assert torch.equal(found.scores, explainer.explain(PROMPT, ANSWER, "word").scores)


# --- found by trying ---


@pytest.mark.parametrize("too_much", [1e39, 10**400])
def test_factors_beyond_float32_are_refused(model, tokenizer, too_much):
    with pytest.raises(ak.InputError, match=r"^factor must be a finite number >= 0, got 1"):
        ak.Explainer(model, tokenizer, factor=too_much)
    with pytest.raises(ak.InputError, match=r"^spans: the factor of 'w5' must be finite and >= 0, got 1"):
        ak.steer(model, tokenizer, PROMPT, {"w5": too_much}).__enter__()


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
def test_factors_beyond_the_dtype_of_the_scores_are_refused(model, backend):
    q, factor = torch.randn(1, 1, 2, 4), torch.tensor([[1e39, 1.0]], dtype=torch.float64)
    with pytest.raises(ak.InputError, match="factor must be finite and >= 0"):
        ak.suppressed_attention(q, q, q, factor, backend=backend)
    with pytest.raises(ak.InputError, match="factor must be finite and >= 0"):
        ak.packed_suppressed_attention(*[q[0]] * 5, ak.VariantPack.build([2], [0]), factor, backend=backend)
    assert ak.suppressed_attention(q.double(), q.double(), q.double(), factor, backend=backend).isfinite().all()
    with pytest.raises(ak.InputError, match="factor must be finite and >= 0"):
        ak.suppress(model, factor).__enter__()


@pytest.mark.parametrize("bad", [None, "gpt2", 3])
def test_what_is_no_tokenizer_is_refused_at_once(model, bad):
    with pytest.raises(ak.InputError, match=r"^tokenizer must be a tokenizer or processor of transformers, got"):
        ak.Explainer(model, bad)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[5.0, 6.0]]), r"input_ids must be integers, got torch.float32"),
        (torch.tensor([[True]]), r"input_ids must be integers, got torch.bool"),
        (torch.tensor([[5, 600]]), "has id 600, but LlamaForCausalLM has embeddings for 99 ids"),
        (torch.tensor([[5, -1]]), "prompt: token ids must be >= 0, got -1"),
    ],
)
def test_ready_inputs_that_the_model_does_not_know(model, tokenizer, ids, message):
    with pytest.raises(ak.InputError, match=message):
        ak.steer(model, tokenizer, {"input_ids": ids}, {}).__enter__()


@pytest.mark.parametrize("bad", [0, "3", True, 2.0])
def test_a_list_has_a_length(explainer, bad):
    with pytest.raises(ak.InputError, match=r"^top must be an integer >= 1"):
        explainer.explain(PROMPT, ANSWER).show(top=bad)


# --- more than any machine has, or than anything holds ---


@pytest.mark.parametrize("span", [range(10**12), range(10**12, 0, -1), range(-1, 3), range(0)])
def test_ranges_without_an_end_are_refused_at_once(model, tokenizer, span):
    with pytest.raises(ak.InputError, match=r"^spans: got range\(.*expected token positions in \[0, 4\)"):
        ak.steer(model, tokenizer, PROMPT, {span: 0.0}).__enter__()


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("shapley", {"permutations": 10**20}),
        ("lasso", {"samples": 10**13}),
        ("lasso", {"samples": 10**30}),
        ("integrated_gradients", {"steps": 10**18}),
        ("integrated_gradients", {"batch": 10**30}),
    ],
)
def test_work_without_an_end_is_refused_at_once(explainer, idle, method, option):
    ((name, most),) = option.items()
    with pytest.raises(ak.InputError, match=rf"^{name} must be .* to 10?,?000,?0?0?0?.*got {most}"):
        explainer.explain(PROMPT, ANSWER, method=method, **option)


@pytest.mark.parametrize("units", ["token", "sentence"])
def test_a_language_is_a_text(explainer, idle, units):
    with pytest.raises(ak.InputError, match=r"^language is no text: character 0 is U\+D800"):
        explainer.explain(PROMPT, ANSWER, units, language="\ud800")


def test_the_other_answer_is_named(explainer, idle):
    with pytest.raises(ak.InputError, match=r"^versus, as the target: target is empty"):
        explainer.explain(PROMPT, ANSWER, versus="   ")
    with pytest.raises(ak.InputError, match=r"^versus, as the target: prompt and target have"):
        explainer.explain(PROMPT, ANSWER, versus=" ".join(["w5"] * 130))
    with pytest.raises(ak.InputError, match=r"^prompt 1: versus, as the target: target is empty"):
        explainer.explain_batch([PROMPT, PROMPT], [ANSWER, ANSWER], versus=[None, " "])


@pytest.mark.parametrize(
    ("factor", "what"), [(torch.ones(1, 5, device="meta"), "meta"), (torch.ones(1, 5).to_sparse(), "sparse")]
)
def test_factors_have_values(model, factor, what):
    for name in ("factor", "value_factor"):
        with pytest.raises(ak.InputError, match=rf"^{name} must be a dense tensor with values, got one .*{what}"):
            ak.suppress(model, **({"factor": None} | {name: factor})).__enter__()


def test_queries_to_the_end_of_everything(model):
    ids, factor = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.0]])
    logits = []
    for end in (None, 10**12, 10**30):
        with ak.suppress(model, factor, queries=(2, end)), torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    with pytest.raises(ak.InputError, match=r"^queries: got \(1000"):
        ak.suppress(model, factor, queries=(10**12, None)).__enter__()


def test_ops_take_dense_tensors():
    q = torch.randn(1, 1, 2, 4)
    call = {"query": q, "key": q, "value": q, "factor": torch.ones(1, 2)}
    ak.suppressed_attention(**call)
    for name, tensor in call.items():
        with pytest.raises(ak.InputError, match=rf"^{name} must be a dense tensor, got layout torch.sparse_coo"):
            ak.suppressed_attention(**call | {name: tensor.to_sparse()})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_wider_than_everything_hides_nothing(backend, is_causal):
    q = torch.randn(1, 1, 3, 4)
    plain = ak.suppressed_attention(q, q, q, is_causal=is_causal, backend=backend)
    for window in (2**31, 10**30):
        wide = ak.suppressed_attention(q, q, q, is_causal=is_causal, sliding_window=window, backend=backend)
        torch.testing.assert_close(wide, plain)


@pytest.mark.parametrize("many", [2**31, 10**12, 10**30])
def test_packs_of_more_than_32_bits_count(many):
    for name, lengths in {"suffix_lengths": ([many], [1]), "prefix_lengths": ([1], [many])}.items():
        with pytest.raises(ak.InputError, match=f"^{name} must be at most 2,147,483,647"):
            ak.VariantPack.build(*lengths)
    with pytest.raises(ak.InputError, match=r"^suffix_lengths must add up to at most 2,147,483,647"):
        ak.VariantPack.build([2**30, 2**30], [0, 0])


def test_a_mask_of_ready_inputs_has_their_shape(model, tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    for mask in (torch.ones(1, 2, dtype=torch.long), [1, 1, 1]):
        with pytest.raises(
            ak.InputError, match=r"^prompt: attention_mask must be a tensor of input_ids' shape \(1, 3\)"
        ):
            ak.steer(model, tokenizer, {"input_ids": ids, "attention_mask": mask}, {}).__enter__()


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "inputs"])
def test_a_steered_answer_has_the_steerings_prompt(model, tokenizer, name):
    with ak.steer(model, tokenizer, PROMPT, {"w5": 0.0}) as steered:
        with pytest.raises(ak.InputError, match=rf"^{name}: the prompts are those of the steering"):
            steered.generate(**{name: torch.tensor([[5]])})
        assert steered.generate(max_new_tokens=1, do_sample=False)


def test_a_steering_is_not_copied(model, tokenizer):
    with ak.steer(model, tokenizer, PROMPT, {"w5": 0.0}) as steered:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copied(steered)
