"""A look-up task whose right explanation is known, and a small Llama that learns it in seconds.

A prompt lists records, each a key and its value, and ends with one of the keys; the answer is that key's value:

    k4 k4 v9  k0 k0 v2  k7 k7 v5  k0   ->   v2

Every key and every value occurs in one record only, so the answer can come from nowhere but the one `v2`. The key is
written twice for the truth to be a single token: of a key written once, the model needs the key as much as the value
(it finds the value by what precedes it), and either may rightly come first. Of two copies neither is indispensable.
"""

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYMBOLS = 12  # different keys, and as many different values
RECORDS = 6  # per prompt
RECORD = 3  # tokens: key, key, value
QUERIES = 12  # after the records of a training sequence, so that each sequence teaches as many answers
NAMES = [f"k{i}" for i in range(SYMBOLS)] + [f"v{i}" for i in range(SYMBOLS)]

STEPS = 600
BATCH = 32
WARM_UP = 50  # steps
LEARNING_RATE = 2e-3
# Strong, to keep the attention from saturating: where a softmax is certain beyond rounding, no suppression by a
# factor of 0.1 moves the answer, and there is nothing to rank.
WEIGHT_DECAY = 1.0


@dataclass(frozen=True)
class LookUp:
    """A question with its answer and the position of the token that holds it."""

    prompt: str
    answer: str
    value_position: int


def look_ups(count: int, seed: int) -> list[LookUp]:
    """Questions over `RECORDS` records; of about 10¹² possible ones, training sees some thousands."""
    ids, asked = _sequences(count, RECORDS, 1, torch.Generator().manual_seed(seed))
    return [
        LookUp(_text(row[:-1]), _text(row[-1:]), RECORD * record + RECORD - 1)
        for row, record in zip(ids.tolist(), asked[:, 0].tolist(), strict=True)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per symbol; none for spaces, no special ones."""
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def train(seed: int) -> LlamaForCausalLM:
    """A model of two layers that answers look-ups: about ten seconds on one core."""
    model = _untrained(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_factor)
    for _ in range(STEPS):
        records = int(torch.randint(2, RECORDS + 1, (), generator=generator))  # short lists are learned first
        ids, _ = _sequences(BATCH, records, QUERIES, generator)
        queries = torch.arange(RECORD * records, ids.shape[1], 2)  # positions of the keys that are asked for
        logits = model(ids[:, :-1], logits_to_keep=queries).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, queries + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def loss_rise_by_float_mask(model: LlamaForCausalLM, ids: Tensor, factor: float) -> Tensor:
    """Log-additive influence of every prompt token on the last of `ids`, with nothing but a mask for the model.

    Each token's variant is a full row of one batch, its column of the additive mask raised by ln(factor).

    Args:
        ids: (n + 1,) prompt and answer.
        factor: > 0.

    Returns:
        (n,) in nats.
    """
    n = len(ids) - 1
    masks = torch.full((n, n), -math.inf).triu(1).repeat(n + 1, 1, 1, 1)  # [variant, 1, query, key]; the last is base
    for token in range(n):
        masks[token, :, :, token] += math.log(factor)
    with torch.no_grad():
        logits = model(ids[:-1].repeat(n + 1, 1), attention_mask=masks).logits[:, -1]
    losses = -logits.double().log_softmax(-1)[:, ids[-1]]
    return losses[:-1] - losses[-1]


def _sequences(count: int, records: int, queries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 3·records + 2·queries) ids: records, then asked keys with answers; (count, queries) which were asked."""

    def different(first: int) -> Tensor:
        return first + torch.rand(count, SYMBOLS, generator=generator).argsort(dim=1)[:, :records]

    keys, values = different(0), different(SYMBOLS)
    asked = torch.randint(records, (count, queries), generator=generator)
    listed = torch.stack([keys, keys, values], dim=2).flatten(1)
    answered = torch.stack([keys.gather(1, asked), values.gather(1, asked)], dim=2).flatten(1)
    return torch.cat([listed, answered], dim=1), asked


def _untrained(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(NAMES),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        # Over some dozens of tokens this low base tells neighbours apart at many frequencies: heads that look one
        # token back, without which there is no look-up, form within 300 steps.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _learning_rate_factor(step: int) -> float:
    """Rises linearly, stays, and falls linearly over the last 40 %."""
    return min(1.0, (step + 1) / WARM_UP, max(0.02, (STEPS - step) / (0.4 * STEPS)))


def _text(ids: list[int]) -> str:
    return " ".join(NAMES[i] for i in ids)
