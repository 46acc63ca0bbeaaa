"""Generate text with a quantised model, or chat with it.

python -m haq_lab.generate DIR "PROMPT"         print the answer to one prompt
python -m haq_lab.generate DIR                  chat in the terminal
python -m haq_lab.generate DIR - < FILE         read the prompt from the standard input
python -m haq_lab.generate DIR "PROMPT" offload=haq offload.budget=40%
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

from haq_lab.hardware.threads import limit_thread_spinning
from haq_lab.utils.errors import UserError, nearest
from haq_lab.utils.paths import bundled, cache_folder

INTERRUPTED = 130  # exit code after Ctrl-C
OFFLOAD = re.compile(r"offload(\.[\w.]+)?=")


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Exit with code 2 if the input is wrong, and 130 if the user has stopped the answer.

    Args:
        arguments: Command line arguments. If None, those of the process.
    """
    given = _parser().parse_intermixed_args(arguments)
    limit_thread_spinning()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt or a terminal may have another encoding
    try:
        from haq_lab.config.explain import report_user_errors

        with report_user_errors("haq_lab.generate"), _quiet_if_reader_ends():
            stopped = _run(given)
    except KeyboardInterrupt:
        stopped = True
    sys.exit(INTERRUPTED if stopped else 0)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m haq_lab.generate", description=__doc__, formatter_class=form)
    parser.add_argument(
        "model", metavar="DIR", help="checkpoint folder, or an option of the group `model`, quantised once by RTN"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="PROMPT",
        help="prompt in quotes, or - to read it from the standard input; also offload=OPTION and offload.SETTING=VALUE",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="temperature of the sampling; 0 always takes the likeliest token"
    )
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto (default), cpu, cuda, reference or fake"
    )
    return parser


def _run(given: argparse.Namespace) -> bool:
    """Answer the prompt, or chat. Return whether the user stopped the answer."""
    _check_numbers(given)
    settings = [word for word in given.words if OFFLOAD.match(word)]
    prompt = _read_prompt([word for word in given.words if word not in settings], sys.stdin)
    folder = _checkpoint(given.model)

    import torch

    from haq_lab.api import load
    from haq_lab.config.offloading import parse_offload
    from haq_lab.generate.conversation import Conversation
    from haq_lab.generate.generator import Generator
    from haq_lab.generate.terminal import answer, chat, note

    option, values = parse_offload(settings)
    model, tokenizer = load(folder, given.backend, option, **values)
    conversation = Conversation(Generator(model, tokenizer, given.temperature, given.max_tokens), given.system)
    if not conversation.has_template:
        note("The model has no chat template, so it continues each prompt as plain text.")
    torch.seed() if given.seed is None else torch.manual_seed(given.seed)
    if prompt is None:
        chat(conversation)
        return False
    return answer(conversation, prompt).stopped


def _check_numbers(given: argparse.Namespace) -> None:
    if given.temperature is not None and not 0 <= given.temperature < float("inf"):
        raise UserError(f"--temperature: {given.temperature} is not valid. Choose 0 or a positive number.")
    if given.max_tokens < 1:
        raise UserError(f"--max-tokens: {given.max_tokens} is too few. Choose 1 or more.")
    if given.seed is not None and not 0 <= given.seed < 2**63:
        raise UserError(f"--seed: {given.seed} is not valid. Choose a number from 0 to 2^63 - 1.")


def _read_prompt(words: list[str], stream: TextIO) -> str | None:
    """Return the prompt: an argument, or the standard input. None if the user wants to chat.

    Args:
        words: The arguments that are not settings.
        stream: The standard input.
    """
    if len(words) > 1:
        raise UserError(f"prompt: '{words[0]}' and '{words[1]}' are two prompts. Put the prompt in quotes.")
    if words and words[0] != "-":
        prompt = os.fsencode(words[0]).decode(errors="replace")
    elif not words and stream.isatty():
        return None
    else:
        prompt = stream.read()
    if not prompt.strip():
        raise UserError("prompt: it is empty. Write a text.")
    return prompt


def _checkpoint(name: str) -> Path:
    """Return the folder of a checkpoint. An option of the group `model` is quantised by RTN at its first use."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    options = {path.stem: path for path in (bundled("conf") / "model").glob("*.yaml")}
    options = {option: path for option, path in options.items() if "???" not in path.read_text(encoding="utf-8")}
    if name not in options:
        hint = nearest(name, options) or f". Choose a checkpoint folder, or one of {', '.join(sorted(options))}."
        raise UserError(f"DIR: '{name}' is not a folder, nor a model that can be quantised here{hint}")
    return _quantize_once(name, options[name])


def _quantize_once(option: str, settings: Path) -> Path:
    """Return the RTN checkpoint of a model option in the cache folder. Write it if it does not exist."""
    from haq_lab.checkpoint.manifest import FILE, VERSION

    digest = hashlib.sha256(f"{VERSION} {settings.read_text(encoding='utf-8')}".encode()).hexdigest()[:8]
    folder = cache_folder() / "quantized" / f"{option}-rtn-{digest}"
    if not (folder / FILE).is_file():
        from haq_lab.api import quantize
        from haq_lab.utils.console import errors, say

        say(f"{option} is quantised by RTN, once: {folder}", on=errors)
        with redirect_stdout(sys.stderr):  # the standard output is for the answer
            quantize(option, "rtn", out=folder)
    return folder


@contextmanager
def _quiet_if_reader_ends() -> Iterator[None]:
    """Exit with code 1 and no message if the reader of the answer ends, such as `head`."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
        sys.exit(1)


if __name__ == "__main__":
    main()
