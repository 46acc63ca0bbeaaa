"""Turn prompts into tokens: with the chat template and the earlier messages, or as plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from haq_lab.generate.generator import Answer, Generator
from haq_lab.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """The messages of a chat. A model without a chat template completes each prompt on its own.

    Args:
        generator: Generates the answers.
        system: The system message, or None.

    Raises:
        UserError: There is a system message, but the model has no chat template.

    Example:
        >>> Conversation(generator, system="You are a pirate.").ask("Hello!", print).text
    """

    def __init__(self, generator: Generator, system: str | None = None):
        self.generator = generator
        self._system = system
        if system is not None and not self.has_template:
            raise UserError("--system has no effect because the model has no chat template. Remove it.")
        self.reset()

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.generator.tokenizer.chat_template)

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, prompt: str, write: Callable[[str], object]) -> Answer:
        """Answer a prompt. The prompt and the answer become part of the chat.

        Args:
            prompt: The user's message, or the text to complete.
            write: Called with each piece of the answer's text, when the piece is complete.

        Raises:
            UserError: The prompt is empty or too long, or the chat template fails. The chat is then unchanged.
        """
        if not prompt.strip():
            raise UserError("prompt: it is empty. Write a text.")
        tokenizer = self.generator.tokenizer
        if not self.has_template:
            encoded: Any = tokenizer(prompt)
            return self.generator.generate(encoded["input_ids"], write)
        messages = [*self._messages, {"role": "user", "content": prompt}]
        answer = self.generator.generate(apply_template(tokenizer, messages), write)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a chat, up to where the model's answer begins.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The messages, each with `role` and `content`.

    Raises:
        UserError: The chat template fails, for example because it does not allow a system message.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    except Exception as error:  # a template is a program, so it can raise anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"chat template: it fails for these messages ({type(error).__name__}: {reason}). "
            "Correct chat_template.jinja in the checkpoint, or leave --system out."
        ) from error
