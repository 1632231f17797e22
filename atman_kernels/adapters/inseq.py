"""The attribution method "atman" for inseq: importing this module is all it takes to register it.

>>> import inseq                                                                     # doctest: +SKIP
>>> import atman_kernels.adapters.inseq                                              # doctest: +SKIP
>>> model = inseq.load_model("HuggingFaceTB/SmolLM2-135M", "atman")                  # doctest: +SKIP
>>> model.attribute("The capital of France is", "The capital of France is Paris").show()  # doctest: +SKIP
"""

from typing import Any

import torch
from inseq.attr.feat.perturbation_attribution import PerturbationAttributionRegistry  # type: ignore[import-untyped, unused-ignore]
from inseq.attr.step_functions import probability_fn  # type: ignore[import-untyped, unused-ignore]
from inseq.data import CoarseFeatureAttributionStepOutput  # type: ignore[import-untyped, unused-ignore]

from atman_kernels.adapters.token_question import run_rows, token_question, unit_factors
from atman_kernels.arguments import count_or_none, text_or_empty
from atman_kernels.errors import InputError, UnsupportedModelError
from atman_kernels.explain.explainer import Explainer
from atman_kernels.planning.units import Unit

SETTINGS = ("mode", "factor", "similarity_threshold", "layers", "token_budget", "recompute")
MEASURE = "log_probability"  # what `info["attributed_fn"]` says


class AtManAttribution(PerturbationAttributionRegistry):
    """Attention suppression (AtMan) as an inseq attribution method, `method_name` "atman".

    A score is the log-probability of a generated token minus what is left of it when the attention to one earlier
    token is suppressed in every layer, in nats: positive means that the token rests on the earlier one. Prompt tokens
    and earlier generated tokens are scored alike. One packed run serves all generated tokens of all texts of a batch.

    Args:
        attribution_model: inseq's model, of the decoder-only kind.
        **settings: mode, factor, similarity_threshold, layers, token_budget, as in `atman_kernels.Explainer`, and
            recompute, as in its `explain`. Given to `inseq.load_model` they are defaults, given to `attribute` they
            hold for that call.

    Raises:
        UnsupportedModelError: an encoder-decoder or distributed model, or one whose attention cannot be reached.
        InputError: an unknown setting or one that does not fit; another `attributed_fn` than the default; step scores.

    Example:
        >>> import inseq                                                                    # doctest: +SKIP
        >>> model = inseq.load_model("HuggingFaceTB/SmolLM2-135M", "atman")                 # doctest: +SKIP
        >>> model.attribute("The capital of France is").show()                              # doctest: +SKIP
    """

    method_name = "atman"

    def __init__(self, attribution_model: Any, **settings: Any) -> None:
        super().__init__(attribution_model)
        if attribution_model.is_encoder_decoder:
            name = type(attribution_model.model).__name__
            raise UnsupportedModelError(f"{name} is an encoder-decoder model; method 'atman' takes decoder-only models")
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise InputError(f"method 'atman' has no setting {unknown[0]!r}; it has {', '.join(SETTINGS)}")
        self.settings = settings
        self._explaining(settings)  # refuses what does not fit before anything is attributed
        self.is_final_step_method = True  # one step for all generated tokens
        self._first_generated = 1

    def get_attribution_args(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Our settings among the arguments of `attribute`, and the other arguments."""
        own = {name: value for name, value in kwargs.items() if name in SETTINGS}
        return own, {name: value for name, value in kwargs.items() if name not in own}

    def prepare_and_attribute(self, sources: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
        """inseq's, once its texts are checked; says what the scores are of.

        Raises:
            InputError: a text is empty or holds no valid Unicode.
        """
        for name, given in (("input_texts", sources), ("generated_texts", targets)):
            for text in [given] if isinstance(given, str) else given if isinstance(given, list) else ():
                text_or_empty(text, name)
        outputs = super().prepare_and_attribute(sources, targets, *args, **kwargs)
        for output in outputs:
            output.info["attributed_fn"] = MEASURE
        return outputs

    def attribute(self, batch: Any, attributed_fn: Any, attr_pos_start: int | None = None, **kwargs: Any) -> Any:
        """inseq's, for log-probabilities alone.

        Raises:
            InputError: another `attributed_fn`.
        """
        arguments = kwargs.get("attributed_fn_args") or {}
        if attributed_fn is not probability_fn or not set(arguments) <= {"logprob"} or not arguments.get("logprob", 1):
            name = getattr(attributed_fn, "__name__", attributed_fn)
            came = f"{name} with {arguments}" if arguments else name
            raise InputError(f"attributed_fn: method 'atman' measures log-probabilities and takes no other, got {came}")
        self._first_generated = 1 if attr_pos_start is None else attr_pos_start
        return super().attribute(batch, attributed_fn, attr_pos_start=attr_pos_start, **kwargs)

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> CoarseFeatureAttributionStepOutput:
        """Scores of all tokens for all generated ones.

        Returns:
            target_attributions (B, S, S) over the S input positions: [b, k, q] is what token k is worth to the
            token that position q predicts. inseq keeps what precedes the predicted token; padding is 0.
        """
        input_ids, next_ids, _, attention_mask = attribute_fn_main_args["additional_forward_args"][:4]
        explainer, recompute = self._explaining(self.settings | (attribution_args or {}))
        paddings = [int((row == 0).sum()) for row in attention_mask]  # on the left, of every text
        questions = []
        for ids, next_id, padding in zip(input_ids, next_ids.reshape(-1, 1), paddings, strict=True):
            whole = torch.cat([ids[padding:], next_id])
            units = [Unit("", 0, 0, (position,)) for position in range(len(whole) - 1)]
            questions.append(token_question(explainer, whole, max(1, self._first_generated - padding), units))
        factors = [unit_factors(explainer, question) for question in questions]
        outcome = run_rows(explainer, questions, factors, recompute)
        length = input_ids.shape[1]
        scores = torch.zeros(len(questions), length, length, dtype=torch.float32, device="cpu")
        for row, padding, before, after in zip(scores, paddings, outcome.unperturbed, outcome.perturbed, strict=True):
            row[padding:, length - len(before) :] = before - after  # rows predict the token after them
        return CoarseFeatureAttributionStepOutput(target_attributions=scores)

    def _explaining(self, settings: dict[str, Any]) -> tuple[Explainer, int | None]:
        """Who explains, and `recompute`."""
        own = dict(settings)
        recompute = count_or_none(own.pop("recompute", None), "recompute")
        model, tokenizer = self.attribution_model.model, self.attribution_model.tokenizer
        return Explainer(model, tokenizer, progress=False, **own), recompute
