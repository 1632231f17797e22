"""Chat messages as the text that the tokenizer's template makes of them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import jinja2

from atman_kernels import arguments
from atman_kernels.arguments import described
from atman_kernels.errors import InputError

# what a template raises: its own refusals, and whatever Python makes of what the messages lack
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def checked_messages(messages: Any, name: str = "prompt") -> list[dict[str, Any]]:
    """Chat messages, each with a role and a content that is a text or a list of parts; other keys stay as they are.

    Raises:
        InputError: there is none, or one is of another form; the message names it and its key.
    """
    listed = arguments.entries(messages, name, "chat messages")
    if not listed:
        raise InputError(f"{name} is empty; expected at least one chat message")
    return [_checked_message(message, f"{name}[{index}]") for index, message in enumerate(listed)]


def _checked_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{name} must be a chat message {{'role': …, 'content': …}}, got {described(message)}")
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            raise InputError(f"{name} has no {key!r}; a chat message has 'role' and 'content'")
    checked = {**message, "role": arguments.text(message["role"], f"{name}['role']")}
    content = checked.get("content")
    if content is None and checked.get("tool_calls"):
        return checked  # an assistant that calls tools need not say anything
    if isinstance(content, str):
        return checked | {"content": arguments.text_or_empty(content, f"{name}['content']")}
    parts = arguments.entries(content, f"{name}['content']", "parts, or a text")
    return checked | {"content": [_checked_part(part, f"{name}['content'][{i}]") for i, part in enumerate(parts)]}


def _checked_part(part: Any, name: str) -> dict[str, Any]:
    """A part of a content: {"type": "text", "text": …}, for which a text alone will do, or another type."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"{name} must be a part {{'type': 'text', 'text': …}}, got {described(part)}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind is None:
        raise InputError(f"{name} has no 'type'; a part of text is {{'type': 'text', 'text': …}}")
    if kind != "text":
        return dict(part)
    if "text" not in part:
        raise InputError(f"{name} has no 'text', and its type is 'text'")
    return {**part, "type": "text", "text": arguments.text_or_empty(part["text"], f"{name}['text']")}


def as_texts(messages: list[dict[str, Any]], name: str = "prompt") -> list[dict[str, Any]]:
    """The messages with the parts of each content joined, as templates for texts take them.

    Raises:
        InputError: a part is no text.
    """
    for index, message in enumerate(messages):
        for i, part in enumerate(message["content"] if _has_parts(message) else ()):
            if part["type"] != "text":
                raise InputError(
                    f"{name}[{index}]['content'][{i}] is of type {part['type']!r}, which is no text; images are given "
                    "beside the prompt, to an explainer with the model's processor"
                )
    return [
        message | {"content": "".join(part["text"] for part in message["content"])} if _has_parts(message) else message
        for message in messages
    ]


def templated(tokenizer: Any, messages: Any, name: str = "prompt") -> str:
    """What the chat template of a tokenizer or processor makes of checked messages, up to where the answer begins.

    Some templates go through the parts of a content and would leave a plain text out: they get a part instead.

    Raises:
        InputError: there is no template, or it refuses the messages; the message names the first that it refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: this tokenizer has no chat template; pass the prompt as one text, without chat")
    try:
        text = _rendered(tokenizer, messages)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat: the tokenizer's chat template is broken in line {error.lineno}: {error}") from error
    except _REFUSALS as error:
        first = _first_refused(tokenizer, messages)
        role, said = messages[first]["role"], str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{name}[{first}]['role'] is {role!r}: the tokenizer's chat template does not take this message: {said[0]}"
        ) from error
    last = messages[-1].get("content")
    if isinstance(last, str) and last.strip() not in text:
        with suppress(*_REFUSALS):
            of_parts = _rendered(tokenizer, [_in_parts(message) for message in messages])
            return of_parts if last.strip() in of_parts else text
    return text


def _has_parts(message: dict[str, Any]) -> bool:
    return isinstance(message.get("content"), list)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _first_refused(tokenizer: Any, messages: list[dict[str, Any]]) -> int:
    """The message with which the template begins to fail."""
    for count in range(1, len(messages)):
        try:
            _rendered(tokenizer, messages[:count])
        except _REFUSALS:
            return count - 1
    return len(messages) - 1
