"""`Request`: what is asked about one prompt, as it came, checked as far as no model is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atman_kernels.arguments import entries, flag, integer, of_entry, text, text_or_empty
from atman_kernels.errors import InputError
from atman_kernels.inputs.image_text import checked_images
from atman_kernels.inputs.image_units import ImageUnitChoice, Unsaid, checked_image_units
from atman_kernels.inputs.tokenization import checked_prompt
from atman_kernels.planning.levels import Levels, checked_units
from atman_kernels.planning.units import check_language


@dataclass(frozen=True)
class Common:
    """What all prompts of a call have in common; see `Explainer.explain`."""

    image_units: ImageUnitChoice | None
    include_target: bool
    chat: bool
    max_new_tokens: int
    language: str
    vision: bool = False

    @classmethod
    def checked(
        cls,
        *,
        image_units: Any = "patch",
        include_target: Any,
        chat: Any,
        max_new_tokens: Any,
        language: Any,
        vision: bool = False,
    ) -> "Common":
        """Raises InputError if one of them does not fit."""
        check_language(language)
        include_target, chat = flag(include_target, "include_target"), flag(chat, "chat")
        most = integer(max_new_tokens, "max_new_tokens", least=1)
        return cls(checked_image_units(image_units), include_target, chat, most, language, vision)


@dataclass(frozen=True)
class Request:
    """What is asked about one prompt: the arguments of `Explainer.explain`.

    Attributes:
        common: what belongs to all prompts of a call.
        others: see `Explainer.explain`.
    """

    common: Common
    prompt: Any
    target: Any = None
    units: Any = "token"
    versus: str | None = None
    images: Any = None
    audio: Any = None
    labels: Sequence[str] | None = None
    pooling: Any = "mean"

    @property
    def has_images(self) -> bool:
        """Whether images came, by themselves or within a processor's output."""
        return self.images is not None or isinstance(self.prompt, Mapping)

    @property
    def is_nested(self) -> bool:
        """Whether its units are of several levels, once it is `checked`."""
        return isinstance(self.units, Levels)

    @property
    def only_image_units(self) -> Any:
        """Units of an image that is all a model reads, for which either name will do.

        Raises:
            InputError: both names were used, for different things.
        """
        wanted = self.common.image_units
        if isinstance(wanted, Unsaid):
            return self.units
        if self.units not in ("token", wanted):
            raise InputError(
                f"units and image_units both say how the image is cut, got {self.units!r} and {wanted!r}; give one"
            )
        return wanted

    def of_versus(self) -> "Request":
        """The same about the other answer."""
        return replace(self, target=self.versus, versus=None)

    def checked(self) -> "Request":
        """As a causal language model takes it.

        Raises:
            InputError: prompt, target, units, versus or images are of another form.
        """
        images, prompt = checked_images(self.images), self.prompt
        is_made = isinstance(prompt, Mapping) and "input_ids" in prompt  # by a processor
        if not is_made:
            prompt = text_or_empty(prompt, "prompt") if images and isinstance(prompt, str) else checked_prompt(prompt)
        target, versus = self.target, self.versus
        return replace(
            self,
            prompt=prompt,
            images=images,
            target=None if target is None else text_or_empty(target, "target", expected="a text or None"),
            units=None if self.units is None else checked_units(self.units),
            versus=None
            if versus is None
            else text(versus, "versus", expected="a text with at least one character, or None"),
        )


def batch_of(common: Common, prompts: Any, targets: Any, units: Any, versus: Any, images: Any) -> list[Request]:
    """One request per prompt, checked.

    Raises:
        InputError: an argument is no list, has more or fewer entries than there are prompts, or one that does not fit.
    """
    listed = entries(prompts, "prompts", "at least one prompt")
    if not listed:
        raise InputError("prompts must be a list with at least one prompt, got none")
    count = len(listed)
    given = {
        "targets": [None] * count if targets is None else entries(targets, "targets", "texts and None"),
        "units": [units] * count if units is None or isinstance(units, str) else entries(units, "units", "choices"),
        "versus": [None] * count if versus is None else entries(versus, "versus", "texts and None"),
        "images": [None] * count if images is None else entries(images, "images", "one entry per prompt"),
    }
    for name, values in given.items():
        if len(values) != count:
            raise InputError(f"{name} has {len(values)} entries for {count} prompts")
    found = []
    for number, parts in enumerate(zip(listed, *given.values(), strict=True)):
        with of_entry(f"prompt {number}"):
            found.append(Request(common, *parts).checked())
    return found


def contents(requests: Sequence[Request]) -> dict[str, Any]:
    """What processes that share a model must be given alike, by the names that an error gives it."""
    return {
        "prompts": [(each.prompt, each.images, each.audio, each.labels, each.pooling) for each in requests],
        "targets": [(each.target, each.versus) for each in requests],
        "units": [each.units for each in requests],
        "options": [each.common for each in requests],
    }
