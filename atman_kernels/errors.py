"""The errors this package raises on purpose; each message says what came and what was expected."""


class InputError(ValueError):
    """An argument is wrong: the message names it, what came and what was expected.

    Example:
        >>> import torch, atman_kernels as ak
        >>> q = torch.zeros(1, 2, 3, 8)
        >>> try:
        ...     ak.suppressed_attention(q, q, q, mode="off")
        ... except ak.InputError as error:
        ...     print(error)
        mode must be one of 'log_additive', 'multiplicative', 'shifted', got 'off'
    """


class UnsupportedModelError(RuntimeError):
    """A model cannot be suppressed or explained; the message names the model and the reason.

    Example:
        >>> import torch, transformers, atman_kernels as ak
        >>> config = transformers.RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)
        >>> try:
        ...     with ak.suppress(transformers.RwkvForCausalLM(config), torch.ones(1, 3)):
        ...         pass
        ... except ak.UnsupportedModelError as error:
        ...     print("RwkvForCausalLM" in str(error))
        True
    """


class Cancelled(Exception):  # as asyncio's and concurrent.futures' are called
    """Raised by a caller's own function, such as `Explainer(progress=…)`, to stop what it was told about.

    Example:
        >>> import atman_kernels as ak
        >>> def stop_after_a_million(done, total):
        ...     if done > 1_000_000:
        ...         raise ak.Cancelled(f"after {done:,} of {total:,} tokens")
        >>> explainer = ak.Explainer(model, tokenizer, progress=stop_after_a_million)   # doctest: +SKIP
    """


class RankError(RuntimeError):
    """Another process that has a part of the same model ended, failed, or did not answer; the message says which.

    Where it was in the middle of a forward, all of them have to be started anew.

    Example:
        >>> import atman_kernels as ak
        >>> try:                                                                        # doctest: +SKIP
        ...     explainer.explain("The capital of France is", " Paris")
        ... except ak.RankError as error:
        ...     print(error)
        another process that has a part of this model ended or did not answer, as rank 1 of 2 sees it; …
    """


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here; nothing falls back in silence.

    Example:
        >>> import torch, atman_kernels as ak
        >>> q = torch.zeros(1, 2, 3, 8)
        >>> try:
        ...     ak.suppressed_attention(q, q, q, backend="cuda")
        ... except ak.BackendUnavailableError as error:
        ...     print("backend 'cuda' cannot run on 'cpu' tensors" in str(error))
        True
    """
