"""An answer ends before the text that stops it, however it is divided into pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.serve.stop_strings import Cut, CutQueue, stop_strings

TEXT = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS)
def test_pieces_give_what_the_whole_text_gives(pieces, stops):
    """`generate` stops at the first token with a stop string, so no text follows the first match that ends."""
    text, cut = "".join(pieces), Cut(stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    text = text[: min(ends, default=len(text))]
    remaining, given_pieces = len(text), []
    for piece in pieces:
        given_pieces.append(piece[:remaining])
        remaining -= len(given_pieces[-1])
    found = "".join(map(cut.feed, given_pieces)) + cut.finish()
    assert found == text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def test_nothing_is_held_back_but_the_beginning_of_a_stop_string():
    cut = Cut(["END", "###"])
    assert [cut.feed(piece) for piece in ("one", " E", "N", "x#", "#")] == ["one", " ", "", "ENx", ""]
    assert cut.finish() == "##"
    assert Cut([]).feed("END") == "END"


def run(coroutine: Coroutine[None, None, list[object]]) -> list[object]:
    """Run a coroutine in a thread of its own, because a browser test may have left an event loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


class Reasoning(str):
    """As transformers marks what is no part of the answer."""


@pytest.mark.parametrize("wait", [True, False])
def test_a_queue_loses_only_the_stop_string(wait):
    async def read() -> list[object]:
        inner: asyncio.Queue = asyncio.Queue()
        for item in (Reasoning("END"), "one E", "ND", "more", Reasoning("x"), None):
            inner.put_nowait(item)
        queue = CutQueue(inner, ["END"])
        items = [await queue.get() if wait else queue.get_nowait()]
        while items[-1] is not None:
            items.append(await queue.get() if wait else queue.get_nowait())
        with pytest.raises(asyncio.QueueEmpty):
            queue.get_nowait()
        return items

    assert run(read()) == ["END", "one ", "x", None]


def test_text_that_is_held_comes_before_the_end():
    async def read() -> list[object]:
        inner: asyncio.Queue = asyncio.Queue()
        for item in ("one E", "N", None):
            inner.put_nowait(item)
        queue = CutQueue(inner, ["END"])
        return [await queue.get() for _ in range(3)]

    assert run(read()) == ["one ", "EN", None]


def test_the_setting_is_one_string_or_several():
    assert [stop_strings(setting) for setting in (None, "a", ["a", "b"], ("a",))] == [[], ["a"], ["a", "b"], ["a"]]
