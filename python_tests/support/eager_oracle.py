"""Suppression written independently of the package: an eager attention function that holds all scores.

The masks are those that transformers makes for its own eager attention. Every variant is one full forward.
"""

import math
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

_setting: dict = {}


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = attention_mask < -1e9 if attention_mask is not None else torch.zeros_like(scores, dtype=torch.bool)
    layers = _setting["layers"]
    calls = _setting["calls"]
    calls.setdefault(id(module), len(calls))
    if layers is None or calls[id(module)] in layers:
        c = _setting["factor"][:, None, None, : key.shape[2]].to(scores.dtype)
        if _setting["mode"] == "log_additive":
            scores = scores + torch.log(c)
        elif _setting["mode"] == "multiplicative":
            scores = scores * c
        else:
            lowest = torch.where(hidden, math.inf, scores).min(dim=-1, keepdim=True).values
            scores = lowest + (scores - lowest) * c
    scores = torch.where(hidden, -math.inf, scores)
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink.to(scores.dtype)], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)  # nothing to see
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), None


AttentionInterface.register("test_oracle", _attention)
AttentionMaskInterface.register("test_oracle", eager_mask)


@contextmanager
def suppressed(model: PreTrainedModel, factor: torch.Tensor, mode: str, layers):
    before = model.config._attn_implementation
    model.set_attn_implementation("test_oracle")
    _setting.update(factor=factor, mode=mode, layers=layers, calls={})
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def target_logprobs(model, ids: torch.Tensor, n: int, factor: torch.Tensor, mode: str, layers=None) -> torch.Tensor:
    """(m,) log-probs of ids[n:] under one factor row (L,), by one full forward."""
    with suppressed(model, factor[None], mode, layers), torch.no_grad():
        logits = model(ids[None, :-1], use_cache=False).logits[0, n - 1 :].double()
    return logits.log_softmax(-1).gather(1, ids[n:, None])[:, 0]


def leave_one_out(model, ids: torch.Tensor, n: int, rows: torch.Tensor, mode: str, layers=None) -> torch.Tensor:
    """(n_units, m): rise of the loss of every target token, for every row of factors (L,)."""
    base = target_logprobs(model, ids, n, torch.ones(len(ids)), mode, layers)
    return torch.stack([base - target_logprobs(model, ids, n, row, mode, layers) for row in rows])


def whole_model_logprobs(
    model, inputs: dict, answer: torch.Tensor, n: int, factor: torch.Tensor, mode: str, layers=None
) -> torch.Tensor:
    """(m,) log-probs of an answer after n prompt tokens, by one forward of everything, image encoders included.

    Only the text decoder is suppressed. `inputs` are what the model takes for prompt and answer but its last token.
    """
    with suppressed(model.get_decoder(), factor[None], mode, layers), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, n - 1 :].double()
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def _by_part(module, *args, **kwargs):
    """As `_attention`, with factors of the part that the module belongs to: one tensor per call of the module."""
    factors = _setting["of_part"][_setting["part"][module]]
    if isinstance(factors, dict):
        (factors,) = (own for end, own in factors.items() if _setting["names"][module].endswith(end))
    call = _setting["turns"].get(module, 0)
    _setting["turns"][module] = call + 1
    _setting["factor"] = factors[call]
    return _attention(module, *args, **kwargs)


AttentionInterface.register("test_oracle_by_part", _by_part)
AttentionMaskInterface.register("test_oracle_by_part", eager_mask)


def seen_logprobs(
    model, inputs: dict, answer: torch.Tensor, n: int, factor: torch.Tensor, vision: list | dict, mode: str
) -> torch.Tensor:
    """As `whole_model_logprobs`, with the vision encoder suppressed as well.

    `vision` holds the factors (images, keys) of the successive calls of each of the encoder's attention modules, or a
    list of such by the end of the module's name.
    """
    decoder = set(model.get_decoder().modules())
    parts = {module: "text" if module in decoder else "vision" for module in model.modules()}
    _setting.update(mode=mode, layers=None, calls={}, part=parts, of_part={"text": [factor[None]], "vision": vision})
    _setting.update(turns={}, names={module: name for name, module in model.named_modules()})
    before = {id(m.config): (m.config, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")}
    for config, _ in before.values():
        config._attn_implementation_internal = "test_oracle_by_part"
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, n - 1 :].double()
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation
    assert {"text", "vision"} == {parts[module] for module in _setting["turns"]}
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
