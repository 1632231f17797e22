"""Models that are shared among two and three processes, by tensor and by pipeline parallelism, against one process."""

import functools

import pytest
import shared_model_cases as cases
import torch
import transformers as hf
from shared_model import NOTHING, run_ranks
from shared_model_cases import PIPELINE, TENSOR

import atman_kernels as ak
from atman_kernels.hf.models import loading

GRADIENTS = ("input_x_gradient", "integrated_gradients", "attnlrp")
NAMES = ("llama", "granite_swa", "gpt_oss", "gemma2", "six_heads", "one_layer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name in NAMES:
        # transformers got the first lately, and did not compute the second in stages as in one process
        if name not in ("granite_swa", "gemma2") or "granite_swa" in hf.CONFIG_MAPPING:
            found[name] = str(tmp_path_factory.mktemp(name))
            cases.made(name).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def whole(folders):
    """What a function of the cases gives on a model in this process; each once."""
    return functools.cache(lambda function, name, *arguments: function(cases.loaded(folders[name]), *arguments))


@pytest.fixture(scope="module")
def two(folders):
    return run_ranks(2, cases.two_ranks, folders)


@pytest.fixture(scope="module")
def three(folders):
    return run_ranks(3, cases.three_ranks, folders)


def check(ranks, key, expected, most=1e-4):
    """On every rank, what one process gives."""
    for rank in ranks:
        assert key in rank, rank.get("failed", rank)
        assert len(rank[key]) > 1
        for name, value in rank[key].items():
            if isinstance(value, torch.Tensor):
                assert (expected[name] - value).abs().max() <= most, name
            else:
                assert expected[name] == value, name


@pytest.mark.parametrize(
    ("name", "sharding"), [("llama", TENSOR), ("granite_swa", TENSOR), ("gpt_oss", PIPELINE), ("gemma2", PIPELINE)]
)
def test_two_ranks_give_what_one_process_gives(two, folders, whole, name, sharding):
    """With grouped heads, with sinks that each rank has its own of, with windows in some layers of a stage only."""
    if name not in folders:
        pytest.skip(f"this transformers does not share {name}")
    expected = whole(cases.answers, name, 4)
    assert expected["path"] == "packed"
    check(two, f"{name} {sharding}", expected)


@pytest.mark.parametrize("sharding", [{"tp_size": 3}, {"pp_size": 3}])
def test_three_ranks_give_what_one_process_gives(three, whole, sharding):
    check(three[:2], f"six_heads {sharding}", whole(cases.answers, "six_heads", 6))


@pytest.mark.parametrize("sharding", [TENSOR, PIPELINE])
def test_16_bit_heads_are_widened(two, folders, sharding):
    """Layers are whole here: alone the head's rows are dealt out, or its logits sent on. All else would be rounding."""
    expected = cases.in_16_bits(cases.loaded(folders["gpt_oss"], dtype="bfloat16"))
    for rank in two:
        assert (rank[f"bfloat16 {sharding}"] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("sharding", "served"),
    [
        (TENSOR, {"atman", "linear", "shapley", "lasso", "random", *GRADIENTS}),
        (PIPELINE, {"atman", "shapley", "lasso", "random"}),
    ],
)
def test_methods_are_right_or_refused_by_name(two, whole, sharding, served):
    expected = whole(cases.by_method, "llama")
    for rank in two:
        for name, scores in rank[f"methods {sharding}"].items():
            if name in served:
                assert (scores - expected[name]).abs().max() <= 1e-4, name
            else:
                assert scores.startswith(f"method '{name}' needs all heads and layers of LlamaForCausalLM in one")


def test_heads_that_do_not_divide_are_told_how(two, whole):
    """The plan in the error is one that works."""
    expected = whole(cases.answers, "six_heads", 6)
    served = {"scores": expected["one"]}
    served |= {name: expected[name] for name in ("by token", "by head", "values by head", "generated", "steered")}
    for rank in two:
        said = rank["heads"].pop("said")
        assert "on 2 tensor-parallel ranks, which do not divide its 3 key-value heads" in said
        if 'there is a style "replicate"' in said:
            pytest.skip("this transformers' plans cannot keep an attention whole")
        assert '"model.layers.*.self_attn.q_proj": "replicate"' in said
    check(two, "heads", served)


def test_fewer_layers_than_stages(two):
    for rank in two:
        assert rank["layers"].endswith("it has 1 layers, too few for 2 pipeline stages")


def test_cached_keys_in_a_pipeline(two):
    for rank in two:
        assert rank["cache"].endswith("positions are not known on later stages; call generate with use_cache=False")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("prompt", "InputError: prompts: not the same on ranks 0 and 1 of 2, which share this model"),
        ("target", "InputError: targets: not the same on ranks 0 and 1 of 2, which share this model"),
        ("settings", "InputError: settings: not the same on ranks 0 and 1 of 2, which share this model"),
        ("factor", "InputError: factor: not the same on ranks 0 and 1 of 2, which share this model"),
        ("calls", "InputError: ranks that share a model must make the same calls in the same order: rank 0 is at the"),
    ],
)
def test_what_differs_is_named_on_every_rank(two, what, message):
    for rank in two:
        assert rank["differences"][what].startswith(message)


@pytest.mark.parametrize(
    ("what", "own"),
    [
        ("empty", "InputError: prompt is empty"),
        ("cancelled", "Cancelled: enough"),
        ("mode", "InputError: mode must be one of"),
    ],
)
def test_an_error_of_one_rank_is_one_of_all(two, what, own):
    first, second = (rank["differences"][what] for rank in two)
    kind, text = own.split(": ")
    assert first.startswith(own)
    assert second.startswith(f"{kind}: rank 0 of 2, which has a part of this model, cannot go on: {text}")


def test_factors_have_the_heads_of_the_whole_model(two):
    for rank in two:
        assert rank["differences"]["heads"] == "InputError: factor has 2 heads, but the model's attention has 4"


def test_the_smallest_budget_is_everybody_s(two, whole):
    expected = whole(cases.answers, "llama", 4)["one"]
    for rank in two:
        assert rank["differences"]["budget"] == 60
        assert (rank["differences"]["scores"] - expected).abs().max() <= 1e-4


def test_one_rank_shows_progress(two):
    """A function, such as the one that cancels above, is told on every rank."""
    assert [rank["differences"]["bar"] for rank in two] == [True, False]


def test_out_of_memory_on_one_rank_ends_all(two):
    first, second = (rank["lost"] for rank in two)
    assert second["said"].startswith("MemoryError: out of memory on rank 1 of 2, in the middle of a forward")
    assert second["cause"] == "tried to allocate 9 GiB"
    assert second["again"].startswith("RankError: the processes that share this model have to be started anew: rank 1")
    assert first["said"].startswith("RankError: another process that has a part of this model ended or did not answer")
    assert first["again"].startswith("RankError: the processes that share this model have to be started anew")


def test_a_rank_that_dies_is_no_hang(three):
    assert three[2] == NOTHING
    for rank in three[:2]:
        assert rank["killed"].startswith("RankError: another process that has a part of this model ended")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A folder with the real weights, the model and its tokenizer."""
    try:
        loading.find_smollm2()
    except ak.InputError as error:
        pytest.skip(str(error))
    model, tokenizer = ak.load_model("smollm2", dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), cases.smollm2_answers(model, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_real_weights(smollm2, size):
    """9 query heads and 3 key heads: three ranks take three and one each, two keep the attention whole."""
    folder, expected = smollm2
    assert expected["path"] == "packed"
    plan = {f"model.layers.*.self_attn.{name}_proj": "replicate" for name in "qkvo"} if size == 2 else None
    for rank in run_ranks(size, cases.real_weights, folder, plan):
        check([{"all": rank}], "all", expected)
