"""Answer one prompt, or chat, in a terminal. Ctrl-C stops an answer."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from haq_lab.generate.conversation import Conversation
from haq_lab.generate.generator import Answer, Stop
from haq_lab.utils.console import errors, say
from haq_lab.utils.errors import UserError

GREY = "bright_black"
HELP = "/reset starts a new chat, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def answer(conversation: Conversation, prompt: str) -> Answer:
    """Answer one prompt: the text goes to the standard output, and a line about the speed to the standard error.

    Args:
        conversation: The chat that the prompt belongs to.
        prompt: The user's message, or the text to complete.

    Raises:
        UserError: The prompt is empty or too long, or the chat template fails.
        KeyboardInterrupt: Ctrl-C was pressed again before the answer stopped.
    """
    with stopping_by_interrupt(conversation.generator.stop):
        result = conversation.ask(prompt, _write)
    _write("\n")
    note(result.summary())
    return result


def chat(conversation: Conversation) -> None:
    """Read prompts from the terminal and answer them, until the user ends the chat.

    Args:
        conversation: The chat.
    """
    with suppress(ImportError):  # some builds of Python have no readline
        import readline  # noqa: F401  # gives `input` a history and arrow keys
    note(HELP)
    while (prompt := _read_prompt()) is not None:
        if prompt == "/exit":
            return
        if prompt == "/reset":
            conversation.reset()
            note("new chat")
        elif re.fullmatch(r"/\w*", prompt):
            note(f"{prompt}: there is no such command. {HELP}")
        elif prompt:
            try:
                answer(conversation, prompt)
            except UserError as error:
                say(str(error), on=errors)


def note(line: str) -> None:
    """Print one grey line on the standard error."""
    errors.print(line, style=GREY, soft_wrap=True)


def _read_prompt() -> str | None:
    """Return the user's next message. None at Ctrl-D, or at Ctrl-C twice."""
    interrupted = False
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            if interrupted:
                return None
            interrupted = True
            note("Press Ctrl-C again to end.")


@contextmanager
def stopping_by_interrupt(stop: Stop) -> Iterator[None]:
    """Let Ctrl-C stop the answer after the current token. A second Ctrl-C interrupts the program.

    A generation that is interrupted within a token leaves the KV cache and the offloading engine in an unknown state.
    """

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    stop.requested = False
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
