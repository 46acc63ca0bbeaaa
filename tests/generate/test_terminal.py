"""A chat in a pseudo-terminal: answers are streamed, and Ctrl-C stops an answer but not the program."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from haq_lab.generate.generator import Stop
from haq_lab.generate.terminal import stopping_by_interrupt

SECONDS = 60  # longest wait for an output
ENDLESS = 30_000  # tokens; an answer that ended before its Ctrl-C would end the test by chance
PROMPT = "\n> "
ROOT = Path(__file__).parents[2]


class Terminal:
    """The command in its own process, on its own pseudo-terminal."""

    def __init__(self, *arguments: str):
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in its background jobs
            environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
            command = [sys.executable, "-m", "haq_lab.generate", "--backend=reference", "--temperature=0", *arguments]
            os.execve(sys.executable, command, environment)  # a fork of a process with threads could hang
        self.code: int | None = None

    def expect(self, pattern: str) -> str:
        """Read until the output matches a pattern. Return the output since the last call."""
        output, deadline = "", time.monotonic() + SECONDS
        while not re.search(pattern, output):
            assert select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))[0], output
            try:
                output += os.read(self._terminal, 1).decode(errors="replace").replace("\r", "")
            except OSError as error:  # the terminal of an ended process
                raise AssertionError(output) from error
        return output

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def wait(self) -> int:
        """Read to the end and return the exit code."""
        while select.select([self._terminal], [], [], SECONDS)[0]:
            try:
                os.read(self._terminal, 1024)
            except OSError:  # the terminal of an ended process
                break
        else:
            raise AssertionError("the program did not end")
        _, status = os.waitpid(self.process, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def close(self) -> None:
        if self.code is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self._terminal)


@pytest.fixture
def terminal(endless_model: Path) -> Iterator[Terminal]:
    """A chat whose answers last until they are stopped."""
    opened = Terminal(str(endless_model), f"--max-tokens={ENDLESS}")
    yield opened
    opened.close()


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(terminal):
    terminal.expect(r"/reset starts a new chat.*\n> ")
    terminal.type("Hello\n")
    terminal.expect("Hello\n\n")
    terminal.type("\x03")
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s, first token after [\d.]+ s, stopped\n", terminal.expect(PROMPT))
    terminal.type("/reset\n")
    terminal.expect(PROMPT)
    terminal.type("Hello again\n")
    terminal.expect("again\n\n")
    terminal.type("\x03")
    assert ", stopped" in terminal.expect(PROMPT)
    terminal.type("/exit\n")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_commands_and_mistakes(terminal):
    terminal.expect(PROMPT)
    terminal.type("/rest\n")
    assert "/rest: there is no such command. /reset starts" in terminal.expect(PROMPT)
    terminal.type("/reset\n")
    assert "new chat" in terminal.expect(PROMPT)
    terminal.type("\n")
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_ctrl_c_twice_at_the_prompt_ends(terminal):
    terminal.expect(PROMPT)
    terminal.type("half a line")
    terminal.expect("half a line")
    time.sleep(1)  # readline waits for the next key; between two waits it would miss the signal
    terminal.type("\x03")
    terminal.expect(r"Press Ctrl-C again to end\.\n> ")
    time.sleep(1)
    terminal.type("\x03")
    assert terminal.wait() == 0


def test_a_second_ctrl_c_during_an_answer_interrupts_the_program():
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopping_by_interrupt(stop):  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with stopping_by_interrupt(stop):
        assert not stop.requested


def test_ctrl_c_ends_a_single_answer(endless_model):
    opened = Terminal(str(endless_model), "Hello", f"--max-tokens={ENDLESS}")
    try:
        opened.expect("\n")
        opened.type("\x03")
        opened.expect(", stopped\n")
        assert opened.wait() == 130
    finally:
        opened.close()
