"""`python -m haq_lab.serve` in a process of its own, and its one-line errors."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from launching import Outcome

from haq_lab.cli.serve import main

server = pytest.importorskip("haq_lab.serve.server", reason="the extra `serve` is not installed")

BODY = {"model": "tiny", "prompt": "Once", "max_tokens": 1900, "stream": True}


class Child:
    """A server in a fork of this process.

    Attributes:
        url: Its address.
        lines: What it has printed before it was ready.
    """

    def __init__(self, number: int, lines: list[str]):
        self.number, self.lines = number, lines
        self.url = next(word for word in lines[0].split() if word.startswith("http")).removesuffix("/v1,")

    def end(self, with_signal: signal.Signals) -> tuple[int, float]:
        """Send a signal. Return the exit code and the seconds until the end."""
        start = time.perf_counter()
        os.kill(self.number, with_signal)
        _, status = os.waitpid(self.number, 0)
        return os.waitstatus_to_exitcode(status), time.perf_counter() - start


@contextmanager
def child(*arguments: str, lines: int = 1) -> Iterator[Child]:
    """Run the command in a fork, which has imported everything already."""
    reader, writer = os.pipe()
    if (number := os.fork()) == 0:
        signal.alarm(60)  # a server that hangs ends, and with it the pipe
        sys.stdout = os.fdopen(writer, "w", buffering=1)
        server.GRACE_SECONDS = 0.3
        warnings.resetwarnings()
        code = 99
        try:
            main([*arguments, "--backend=reference", "--port=0"])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        yield Child(number, [stream.readline() for _ in range(lines)])


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_within_its_grace(checkpoint_of, sent, capfd):
    with child(str(checkpoint_of("llama"))) as started:
        assert started.lines[0].startswith("serving tiny at http://127.0.0.1:")
        with httpx.stream("POST", f"{started.url}/v1/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            next(lines)
            code, seconds = started.end(sent)
            assert '"finish_reason":"stop"' in [line for line in lines if line][-1], "the answer is ended, not cut"
    assert (code, capfd.readouterr().err) == (0, "")
    assert seconds < 5


def test_settings_of_offloading_are_those_of_a_run(checkpoint_of):
    with child(
        str(checkpoint_of("mixtral")), "offload=haq", "--name=moe", "offload.budget=8", "offload.spare=2", lines=2
    ) as started:
        assert started.lines[1] == f"experts at {started.url}/experts\n"
        view = httpx.get(f"{started.url}/experts.json").json()
        assert started.end(signal.SIGTERM)[0] == 0
    assert (view["model"], sum(map(sum, view["resident"]))) == ("moe", 8)


def refused(capsys, *arguments: str) -> Outcome:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    printed = capsys.readouterr()
    return Outcome(end.value.code, printed.out, printed.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=0", "missing"], "there is no folder"),
        (["--port=0", "LLAMA", "offload=haq"], "offload: a 'llama' has no experts to offload"),
        (["--port=0", "LLAMA", "offload.budget=40%"], "offload.budget has no effect because offload=none"),
        (["--port=0", "LLAMA", "offload.bugdet=40%"], "'budget'"),
        (["--port=0", "LLAMA", "--backend=gpu"], "backend: 'gpu'"),
        (["--port=70000", "LLAMA"], ":70000 cannot be used"),
        (["--host=192.0.2.1", "--port=0", "LLAMA"], "--port: 192.0.2.1:0 cannot be used"),
    ],
)
def test_a_mistake_is_one_line(checkpoint_of, capsys, arguments, message):
    folder = str(checkpoint_of("llama"))
    outcome = refused(capsys, *(folder if argument == "LLAMA" else argument for argument in arguments))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert message in outcome.err


def test_a_port_in_use_is_one_line(checkpoint_of, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        outcome = refused(capsys, f"--port={port}", str(checkpoint_of("llama")))
    assert outcome.err == (
        f"haq_lab.serve: --port: 127.0.0.1:{port} cannot be used (Address already in use). "
        "Choose another --port or --host.\n"
    )


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = refused(capsys, "folder")
    assert outcome.err == (
        "haq_lab.serve: the server needs the package 'fastapi', which is not installed. "
        "Run: pip install 'haq-lab[serve]'\n"
    )


@pytest.mark.slow
def test_the_command_ends_well_in_a_process_of_its_own(checkpoint_of):
    command = [sys.executable, "-m", "haq_lab.serve", str(checkpoint_of("llama")), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[3].removesuffix("/v1,")
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.terminate()
            assert len([*lines]) > 1
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
