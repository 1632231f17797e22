"""`suppress`: any forward of an unmodified model, `generate` included, with the attention to some keys changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.hf.attention.layers import checked_layers
from atman_kernels.hf.attention.positional import Factors, Queries
from atman_kernels.hf.attention.recomputation import Recomputations
from atman_kernels.hf.attention.suppressed_runs import Attention, SourceRun, SuppressedRun
from atman_kernels.hf.attention.switch import is_under_a_run
from atman_kernels.hf.models.parts import decoder_of, is_encoder_decoder
from atman_kernels.hf.models.ranks import ranks_of
from atman_kernels.hf.models.sharding import check_sharding
from atman_kernels.hf.models.wrapped import unwrapped
from atman_kernels.hf.replacement import observed, replaced
from atman_kernels.hf.scope import Scope, entering_frame


@contextmanager
def suppress(
    model: nn.Module,
    factor: Factors,
    *,
    mode: str = "log_additive",
    layers: Iterable[int] | None = None,
    queries: Queries = None,
    value_factor: Factors = None,
    attention: Attention = "both",
    backend: str | None = None,
) -> Iterator[None]:
    """Scale the attention to some tokens in every forward of `model` inside the context.

    Args:
        model: a transformers model, compiled by torch or not, with peft's adapters in its layers or not; it is used as
            it is, and is as before when the context ends. Compiled code leaves its graph for the attention meanwhile,
            so `fullgraph=True` fails.
        factor: (B, L) or (B, Hq, L) over key positions, finite and >= 0; 1 leaves a token alone, 0 removes it in
            "log_additive" mode. Positions are those of the (padded) input; later keys, such as those that `generate`
            adds, count as 1. With beams or several returned sequences each row serves all of its copies. A mapping
            {layer: tensor} acts on its layers only, on each with its own factors. None leaves all scores alone.
        mode: see `atman_kernels.suppressed_attention`.
        layers: indices of the layers to act on, the model's own (`layer_idx`) where it counts them; None for all.
        queries: the positions whose attention is changed, counted like those of the keys: (start, end), where end
            may be None for all that follows, or a bool tensor (L,) or (B, L), whose end ends the change. None: all.
        value_factor: what each key's value vector is scaled by after the softmax, which is not normalised again;
            shapes, positions and mappings as for `factor`. 0 is value zeroing.
        attention: of an encoder-decoder model, which attention to the source is changed: the encoder's
            "self"-attention, the decoder's "cross"-attention, or "both". Positions of `factor` are then those of the
            encoder, layers are counted in each stack, and the decoder's attention to its own tokens stays as it is.
            `queries` cannot be chosen there. Other models have "self"-attention alone.
        backend: see `atman_kernels.suppressed_attention`.

    Raises:
        InputError: an argument does not fit, or the model is under another suppression already.
        UnsupportedModelError: the model's attention cannot be reached. If that shows only when a forward did not
            come by, the error is raised by that forward.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                          num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with suppress(model, torch.tensor([[1.0, 0.0, 1.0]])):
        ...     without_token_1 = model(ids).logits[0, -1]
        >>> with suppress(model, {0: torch.tensor([[0.0]])}, queries=(2, None)):
        ...     last_token_does_not_see_token_0 = model(ids).logits[0, -1]
    """
    options: dict[str, Any] = {"mode": mode, "layers": layers, "queries": queries, "value_factor": value_factor}
    with suppressed(model, factor, attention=attention, backend=backend, **options):
        yield


@contextmanager
def suppressed(
    model: nn.Module,
    factor: Factors,
    *,
    mode: str,
    layers: Iterable[int] | None,
    queries: Queries = None,
    value_factor: Factors = None,
    attention: Attention = "both",
    backend: str | None = None,
) -> Iterator[Scope]:
    """`suppress`, which tells whose calls it acts on: those of the block around which this is entered."""
    model = unwrapped(model)
    ranks, options = ranks_of(model), {"mode": mode, "queries": queries, "value_factor": value_factor}
    with ranks.in_step("suppress"):
        part, run = _run_on(model, factor, layers=layers, attention=attention, backend=backend, **options)
        ranks.agree("a suppression", factor=factor, layers=run.layers.wanted, attention=attention, **options)
    run.ranks = ranks

    scope = Scope(entering_frame())
    recomputations = Recomputations(part, scope, partial(run.reinstalled, part))
    run.computing = recomputations.note

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check_reached(module: nn.Module, args: Any, output: Any) -> None:
        run.forget_offsets()
        if not scope.holds():  # another thread's forward, perhaps with a suppression of its own
            if not is_under_a_run(part):
                scope.warn_if_lost(type(model).__name__)
        elif not run.reached:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be suppressed: a forward of it never called the attention function"
                + (f" for attention={attention!r}" if is_encoder_decoder(model) else "")
            )

    with ExitStack() as stack:
        stack.enter_context(run.installed(model, part, scope))
        stack.enter_context(observed(part, check_reached))
        stack.enter_context(recomputations.watched())
        if ranks.stage is not None:
            stack.enter_context(replaced(model, scope, _without_a_cache))
        yield scope


def _without_a_cache(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward of a pipeline, refused on all stages before one of them waits for another.

    transformers asks layer 0's cache where a forward's tokens stand, and later stages have none of that layer.
    """
    if kwargs.get("past_key_values") is not None:
        raise UnsupportedModelError(
            "a model in pipeline stages cannot be suppressed in a forward that goes on from cached keys: their "
            "positions are not known on later stages; call generate with use_cache=False"
        )
    return own(*args, **kwargs)


def _run_on(
    model: PreTrainedModel, factor: Factors, *, layers: Iterable[int] | None, attention: Attention, **options: Any
) -> tuple[PreTrainedModel, SuppressedRun]:
    """The part of a model whose attention is changed, and the run that does so, of checked arguments."""
    part = _part_of(model, attention, options["queries"])
    check_sharding(model, decoder_of(model))
    for name, factors in (("factor", factor), ("value_factor", options["value_factor"])):
        if isinstance(factors, Mapping):
            if layers is not None:
                raise InputError(f"layers must be left out where {name} is a mapping, whose keys are the layers")
            checked_layers(model, list(factors), f"the keys of {name}")
    options |= {"layers": checked_layers(model, layers)}
    if is_encoder_decoder(model):
        return part, SourceRun(part, factor, attention=attention, **options)
    return part, SuppressedRun(factor, **options)


def _part_of(model: nn.Module, attention: Attention, queries: Queries) -> PreTrainedModel:
    """Whose attention is changed: an encoder-decoder's as a whole, otherwise the decoder's."""
    if attention not in get_args(Attention):
        raise InputError(f'attention must be "self", "cross" or "both", got {attention!r}')
    decoder = decoder_of(model)
    assert isinstance(model, PreTrainedModel)
    if not is_encoder_decoder(model):
        if attention == "cross":
            raise InputError(f'attention is "cross", but {type(model).__name__} is no encoder-decoder model')
        return decoder
    if queries is not None:
        raise InputError(f"queries must be None for {type(model).__name__}, which has those of two stacks")
    return model
