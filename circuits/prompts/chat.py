"""Prompts that are conversations: the model's own chat template turns them into text.

The text ends where the assistant's answer begins; where the last message is the assistant's, the answer goes on behind
what it says. A beginning-of-text token that the template writes is not doubled (`TokenizerWrapper.prompt_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import TypedDict

from circuits.prompts.formats import Example
from sae.errors import UserError


class Message(TypedDict):
    """A message of one side of a conversation."""

    role: str
    content: str


def with_rendered_chats(examples: Sequence[Example], tokenizer: Any, name: str) -> list[Example]:
    """The examples with the text of their conversations as prompts; those that are text stay as they are.

    Args:
        examples: prompts, any of which may have `messages` and `patch_messages` in place of text.
        tokenizer: that of the model, whose chat template is used.
        name: what the examples are called in errors.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    return [
        example
        if not example.messages
        else replace(
            example,
            clean=_text(example.messages, tokenizer, name),
            patch=_text(example.patch_messages, tokenizer, name) if example.patch_messages else None,
            messages=(),
            patch_messages=(),
        )
        for example in examples
    ]


def _text(messages: Sequence[Message], tokenizer: Any, name: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{name} has messages, and this model's tokenizer has no chat template: write prompts as text, "
            "clean_prefix and patch_prefix, or take the model's instruction-tuned version"
        )
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except Exception as error:  # templates are programs, which raise what they like
        raise UserError(f"{name}: the model's chat template refuses {list(messages)}: {error}") from None
