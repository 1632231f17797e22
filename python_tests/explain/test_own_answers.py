"""The model's own answer: the same whatever its generation config says beside it, and never beyond its positions."""

import copy

import image_text_cases as image_text
import pytest
import tiny_encoder_decoders as encoder_decoders
import tiny_models
import torch
import transformers as hf

import atman_kernels as ak
from atman_kernels.hf.models.parts import decoder_of
from atman_kernels.inputs.limits import positions_of

PROMPT = "w5 w6 w7 w8"
# what changes how many answers come, in which form, and how they are searched for, but not what is most likely
BESIDE = {
    "dict": {"return_dict_in_generate": True},
    "everything": {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
        "output_hidden_states": True,
    },
    "beams": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 2.0},
    "draws": {"do_sample": True, "temperature": 3.0, "top_k": 3, "top_p": 0.1, "num_return_sequences": 2},
    "guesses": {"prompt_lookup_num_tokens": 2},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 3},
    "static cache": {"cache_implementation": "static"},
    "length": {"max_length": 2},
    "clock": {"max_time": 1e-9},
}  # fmt: skip


def setting(model, options):
    model.generation_config = copy.deepcopy(model.generation_config)
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("beside", BESIDE)
def test_the_answer_does_not_depend_on_what_is_asked_beside_it(beside):
    tokenizer = tiny_models.tokenizer()
    expected = ak.Explainer(tiny_models.build("llama"), tokenizer, progress=False).explain(PROMPT, max_new_tokens=5)
    model = setting(tiny_models.build("llama"), BESIDE[beside])
    before, config = model.generation_config.to_dict(), model.generation_config
    found = ak.Explainer(model, tokenizer, progress=False).explain(PROMPT, max_new_tokens=5)
    assert found.target == expected.target
    assert torch.equal(found.scores, expected.scores)
    assert model.generation_config is config
    assert config.to_dict() == before


def test_what_changes_the_answer_does():
    tokenizer = tiny_models.tokenizer()
    plain = ak.Explainer(tiny_models.build("llama"), tokenizer, progress=False).explain(PROMPT, max_new_tokens=5)
    first = plain.target.split()[0]
    banned = setting(tiny_models.build("llama"), {"bad_words_ids": [[int(first[1:])]]})
    assert ak.Explainer(banned, tokenizer, progress=False).explain(PROMPT, max_new_tokens=5).target.split()[0] != first


def test_stop_strings_end_the_answer(tiny_llama, tiny_tokenizer):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain = ak.Explainer(model, tiny_tokenizer, progress=False).explain("The dog", max_new_tokens=8)
    end = next(piece for piece in plain.target_tokens[1:] if piece and piece.isascii())
    count = plain.target_tokens.index(end) + 1
    setting(model, {"stop_strings": [end]})  # which needs the tokenizer
    found = ak.Explainer(model, tiny_tokenizer, progress=False).explain("The dog", max_new_tokens=8)
    assert count < 8
    assert found.target_tokens == plain.target_tokens[:count]
    of_words = setting(tiny_models.build("llama"), {"stop_strings": ["w5"]})  # transformers cannot look for these
    with pytest.raises(ak.InputError, match="stop_strings, \\['w5'\\], do not go with this model"):
        ak.Explainer(of_words, tiny_models.tokenizer(), progress=False).explain(PROMPT)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_answer_whatever_the_config_says(family):
    text = encoder_decoders.TEXT
    expected = encoder_decoders.explainer(encoder_decoders.build(family)).explain(text, max_new_tokens=3)
    for options in (BESIDE["everything"], BESIDE["beams"], BESIDE["draws"]):
        model = setting(encoder_decoders.build(family), options)
        found = encoder_decoders.explainer(model).explain(text, max_new_tokens=3)
        assert found.target == expected.target
        assert torch.equal(found.scores, expected.scores)


def test_image_models_answer_whatever_the_config_says():
    asked = {"text": "w5 <image>", "images": image_text.PICTURE, "max_new_tokens": 3}
    expected = image_text.explainer_of("llava").explain(**asked)
    for options in (BESIDE["everything"], BESIDE["beams"]):
        explainer = image_text.explainer_of("llava")
        setting(explainer.model, options)
        assert explainer.explain(**asked).target == expected.target


def test_captum_gets_an_answer_whatever_the_config_says():
    pytest.importorskip("captum")
    from atman_kernels.adapters.captum import AtManAttribution

    tokenizer = tiny_models.tokenizer()
    expected = AtManAttribution(tiny_models.build("llama"), tokenizer, progress=False).attribute(PROMPT)
    for options in (BESIDE["everything"], BESIDE["beams"]):
        model = setting(tiny_models.build("llama"), options)
        found = AtManAttribution(model, tokenizer, progress=False).attribute(PROMPT)
        assert found.output_tokens == expected.output_tokens
        assert torch.equal(found.token_attr, expected.token_attr)


# --- positions ---

SHORT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": tiny_models.VOCABULARY}
SMALL = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SHORT, ffn_dim=16, word_embed_proj_dim=32, max_position_embeddings=16)
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SHORT, intermediate_size=16, max_position_embeddings=16, eos_token_id=None)
    ),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=99, d_model=32, n_heads=4, n_layers=1, max_seq_len=16)),
    "roberta": lambda: hf.RobertaForCausalLM(
        hf.RobertaConfig(**SHORT, intermediate_size=16, max_position_embeddings=18, pad_token_id=1, is_decoder=True)
    ),
}


def small(family):
    torch.manual_seed(0)
    model = SMALL[family]().eval()
    model.generation_config.eos_token_id = None  # nothing but the positions ends an answer
    return model


@pytest.mark.filterwarnings("ignore:.*cannot be packed")
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("length", [12, 15, 16])
def test_an_answer_ends_with_the_models_positions(family, length):
    tokenizer, model = tiny_models.tokenizer(), small(family)
    tokenizer.eos_token = None
    prompt = " ".join(["w5"] * length)
    found = ak.Explainer(model, tokenizer, progress=False).explain(prompt, max_new_tokens=1 << 40)
    assert len(found.target_tokens) == 16 - length + 1  # the last token is predicted, not read
    given = ak.Explainer(model, tokenizer, progress=False).explain(prompt, " ".join(["w7"] * (17 - length)))
    assert len(given.target_tokens) == 17 - length


@pytest.mark.parametrize("family", SMALL)
def test_what_does_not_fit_is_known_before_the_model_runs(family, monkeypatch):
    tokenizer, model = tiny_models.tokenizer(), small(family)
    assert positions_of(decoder_of(model)) == 16
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    explainer = ak.Explainer(model, tokenizer, progress=False)
    with pytest.raises(ak.InputError, match="17 tokens, but the model has 16 positions"):
        explainer.explain(" ".join(["w5"] * 17))
    with pytest.raises(ak.InputError, match="17 tokens, but the model has 16 positions"):
        explainer.explain(" ".join(["w5"] * 12), " ".join(["w5"] * 6))


@pytest.mark.parametrize("family", ["bloom", "llama dynamic"])
def test_models_without_a_limit_have_none(family):
    tokenizer = tiny_models.tokenizer()
    tokenizer.eos_token = None
    if family == "bloom":
        model = tiny_models.build("bloom")
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        config = hf.LlamaConfig(**SHORT, intermediate_size=16, max_position_embeddings=16, rope_parameters=rope)
        model = hf.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    found = ak.Explainer(model, tokenizer, progress=False).explain(
        " ".join(["w5"] * 18), units=[(0, 2)], max_new_tokens=4
    )
    assert len(found.target_tokens) == 4


def test_a_transcript_ends_with_the_decoders_positions():
    listener, processor = encoder_decoders.whisper()
    listener.generation_config.eos_token_id = None
    most = listener.config.max_target_positions
    found = encoder_decoders.explainer(listener, processor).explain(
        audio=encoder_decoders.SAMPLES, units=[(0.0, 0.1)], max_new_tokens=10**9
    )
    assert 0 < len(found.target_tokens) <= most


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_steered_answer_ends_with_the_models_positions(family):
    tokenizer, model = tiny_models.tokenizer(), small(family)
    with ak.steer(model, tokenizer, [" ".join(["w5"] * 12), "w5 w6"], {}) as steered:
        answers = steered.generate(max_new_tokens=10**9, eos_token_id=None)
    assert [len(answer.split()) for answer in answers] == [5, 5]
    with ak.steer(model, tokenizer, " ".join(["w5"] * 17), {}) as steered:
        with pytest.raises(ak.InputError, match="prompt has 17 tokens, but the model has 16 positions"):
            steered.generate(max_new_tokens=1)
        with pytest.raises(ak.InputError, match="prompt has 17 tokens"):
            steered.generate()


def test_a_steered_answer_ends_with_a_stop_string(tiny_llama, tiny_tokenizer):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with ak.steer(model, tiny_tokenizer, "The dog", {}) as steered:
        (plain,) = steered.generate(max_new_tokens=8)
        end = next(character for character in plain if character.isascii())
        (found,) = steered.generate(max_new_tokens=8, stop_strings=[end])
        setting(model, {"stop_strings": [end]})
        (again,) = steered.generate(max_new_tokens=8)
    assert found == again == plain[: len(found)]
    assert end in found


# --- tokens that the model does not know ---


def with_added_token():
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["zebra"])
    return tokenizer


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("zebra w5", "w6"), "prompt"), (("w5", "zebra"), "target"), (("w5", "w6 zebra w7"), "target")],
)
def test_tokens_beyond_the_embeddings_are_named(monkeypatch, arguments, name):
    model, tokenizer = tiny_models.build("llama"), with_added_token()
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    message = rf"^{name}: token 'zebra' has id 99, but LlamaForCausalLM has embeddings for 99 ids; .*_embeddings\(100\)"
    with pytest.raises(ak.InputError, match=message):
        ak.Explainer(model, tokenizer).explain(*arguments)
    with pytest.raises(ak.InputError, match="'zebra' has id 99"):
        ak.Explainer(model, tokenizer).explain("w5", "w6", versus="zebra")
    with pytest.raises(ak.InputError, match="prompt 1: prompt: token 'zebra' has id 99"):
        ak.steer(model, tokenizer, ["w5", "zebra"], {}).__enter__()


def test_tokens_are_known_once_the_embeddings_are_resized():
    model, tokenizer = tiny_models.build("llama"), with_added_token()
    model.resize_token_embeddings(100)
    found = ak.Explainer(model, tokenizer, progress=False).explain("zebra w5", "w6 zebra")
    assert found.scores.shape == (2, 2)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("name", ["prompt", "target"])
def test_encoder_decoders_name_tokens_beyond_their_embeddings(family, name, monkeypatch):
    model = encoder_decoders.build(family)
    tokenizer = with_added_token()
    tokenizer.add_tokens([f"x{i}" for i in range(model.config.vocab_size - len(tokenizer))] + ["last"])
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ak.InputError, match=f"^{name}: token 'last' has id"):
        ak.Explainer(model, tokenizer).explain(**{"prompt": "w5", "target": "w6", name: "w5 last"})
