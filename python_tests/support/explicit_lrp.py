"""AttnLRP by its definition: relevances, not gradients, carried through a tiny Llama one matrix at a time.

Every rule is written as the paper states it (arXiv 2402.05602, with ε → 0): what comes out of an operation is divided
among what went in by the share that each had in it. float64 throughout, on activations that are computed here too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Relevance:
    tokens: Tensor  # (L,)
    absorbed: Tensor  # what the layers' softmax kept, in all
    logit: Tensor


def linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """z = x Wᵀ; R_j = x_j Σ_i W_ij R_i / z_i."""
    z = x @ weight.T
    return x * ((relevance / z) @ weight)


def product(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """z_ij = Σ_k a_ik b_kj: each term a_ik b_kj has R_ij · a_ik b_kj / z_ij, half of it for either factor."""
    terms = a[..., :, :, None] * b[..., None, :, :]  # (…, i, k, j)
    z = terms.sum(-2, keepdim=True)
    share = torch.where(z == 0, 0.0, terms / z) * relevance[..., :, None, :] / 2
    return share.sum(-1), share.sum(-3)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotation(positions: Tensor, dim: int, theta: float) -> Tensor:
    """(L, D, D): the matrix that turns a head's vector at each position."""
    angles = positions[:, None].double() / theta ** (torch.arange(0, dim, 2).double() / dim)
    matrix = torch.zeros(len(positions), dim, dim, dtype=torch.double)
    for i in range(dim // 2):
        j = i + dim // 2
        matrix[:, i, i] = matrix[:, j, j] = angles[:, i].cos()
        matrix[:, i, j], matrix[:, j, i] = -angles[:, i].sin(), angles[:, i].sin()
    return matrix


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("lij,hlj->hli", matrix, x)


def unrotate(x: Tensor, matrix: Tensor, relevance: Tensor) -> Tensor:
    """The linear rule for one matrix per position."""
    return x * torch.einsum("lij,hli->hlj", matrix, relevance / rotate(x, matrix))


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(len(x), count, -1).transpose(0, 1)  # (L, H·D) -> (H, L, D)


def joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


class Attention:
    """One attention block: forward, then the relevance of what it read."""

    def __init__(self, module, config, matrix: Tensor) -> None:
        self.weights = {n: getattr(module, f"{n}_proj").weight.detach().double() for n in "qkvo"}
        self.config, self.matrix = config, matrix
        self.group = config.num_attention_heads // config.num_key_value_heads

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        counts = {"q": self.config.num_attention_heads, "k": self.config.num_key_value_heads}
        self.q = heads(x @ self.weights["q"].T, counts["q"])
        self.k, self.v = (heads(x @ self.weights[n].T, counts["k"]) for n in "kv")
        self.turned_q, self.turned_k = rotate(self.q, self.matrix), rotate(self.k, self.matrix)
        many_k, self.many_v = (t.repeat_interleave(self.group, 0) for t in (self.turned_k, self.v))
        self.scaled_k = many_k * many_k.shape[-1] ** -0.5
        self.scores = self.turned_q @ self.scaled_k.mT
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        self.weighting = self.scores.masked_fill(hidden, -torch.inf).softmax(-1)
        self.read = joined(self.weighting @ self.many_v)
        return self.read @ self.weights["o"].T

    def backward(self, relevance: Tensor) -> tuple[Tensor, Tensor]:
        r = heads(linear(self.read, self.weights["o"], relevance), self.config.num_attention_heads)
        r_weighting, r_v = product(self.weighting, self.many_v, r)
        # softmax: R_j = x_j (R_j − s_j Σ R); the rest is the bias of its linearisation
        r_scores = self.scores * (r_weighting - self.weighting * r_weighting.sum(-1, keepdim=True))
        absorbed = r_weighting.sum() - r_scores.sum()
        r_q, r_k = product(self.turned_q, self.scaled_k.mT, r_scores)
        r_k, r_v = (t.unflatten(0, (-1, self.group)).sum(1) for t in (r_k.mT, r_v))
        parts = {"q": unrotate(self.q, self.matrix, r_q), "k": unrotate(self.k, self.matrix, r_k), "v": r_v}
        shares = [linear(self.x, self.weights[n], joined(r)) for n, r in parts.items()]
        return sum(shares, torch.zeros(())), absorbed


def mlp(module, x: Tensor, relevance: Tensor | None) -> Tensor:
    """Forward without, backward with a relevance."""
    gate, up, down = (getattr(module, f"{n}_proj").weight.detach().double() for n in ("gate", "up", "down"))
    activated, factor = torch.nn.functional.silu(x @ gate.T), x @ up.T
    if relevance is None:
        return (activated * factor) @ down.T
    half = linear(activated * factor, down, relevance) / 2  # to the activation, which passes it whole, and to `up`
    return linear(x, gate, half) + linear(x, up, half)


def attnlrp(model, ids: Tensor, row: int, target: int) -> Relevance:
    """Relevance of the tokens of `ids` (L,) for the logit of `target` at `row`, in a bias-free Llama."""
    config, layers = model.config, model.model.layers
    dim = config.hidden_size // config.num_attention_heads
    matrix = rotation(torch.arange(len(ids)), dim, config.rope_parameters["rope_theta"])
    norm = {id(m): m.weight.detach().double() for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"}
    x = embedded = model.get_input_embeddings().weight.detach().double()[ids]
    trace = []
    for layer in layers:
        attention = Attention(layer.self_attn, config, matrix)
        a = attention.forward(rms_norm(x, norm[id(layer.input_layernorm)], config.rms_norm_eps))
        normed = rms_norm(x + a, norm[id(layer.post_attention_layernorm)], config.rms_norm_eps)
        m = mlp(layer.mlp, normed, None)
        trace.append((layer, attention, x, a, normed, m))
        x = x + a + m
    last = rms_norm(x, norm[id(model.model.norm)], config.rms_norm_eps)
    head = model.lm_head.weight.detach().double()
    relevance = torch.zeros_like(x)
    relevance[row] = last[row] * head[target]  # the linear rule for a relevance that is the logit itself
    absorbed = torch.zeros((), dtype=torch.double)
    for layer, attention, before, a, normed, m in reversed(trace):
        middle = before + a
        share = relevance / (middle + m)
        relevance = middle * share + mlp(layer.mlp, normed, m * share)
        share = relevance / middle
        read, kept = attention.backward(a * share)
        relevance, absorbed = before * share + read, absorbed + kept
    assert embedded.shape == relevance.shape
    return Relevance(relevance.sum(-1), absorbed, last[row] @ head[target])
