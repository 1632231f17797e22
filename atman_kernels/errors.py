"""The errors this package raises on purpose; each message says what came and what was expected."""


class InputError(ValueError):
    """An argument is wrong: the message names it, what came and what was expected."""


class UnsupportedModelError(RuntimeError):
    """A model cannot be suppressed or explained; the message names the model and the reason."""


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here; nothing falls back in silence."""
