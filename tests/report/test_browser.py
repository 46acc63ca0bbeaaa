"""The page in a real headless browser: nothing fails, nothing is fetched, and what is drawn is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


pytestmark = pytest.mark.slow  # the browser takes half a minute


@pytest.fixture
def opened(browser, report):
    """`opened("phone", "dark")` -> a loaded page, and what went wrong while it loaded."""
    contexts = []

    def open_page(size="desktop", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached", timeout=60_000)
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(opened, size, scheme):
    page, wrong = opened(size, scheme)
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    tables = page.locator(".scroll")
    assert tables.count() >= 6
    for place in range(tables.count()):  # no table has to be scrolled
        assert tables.nth(place).evaluate("(box) => box.scrollWidth - box.clientWidth") <= 0, tables.nth(
            place
        ).inner_text()
    sections = page.locator("section")
    assert sections.count() == 8
    assert page.locator("section .plot svg.main-svg").count() >= sections.count()
    assert page.evaluate("document.documentElement.dataset.theme") == scheme


def test_the_theme_can_be_toggled_and_charts_follow(opened):
    page, wrong = opened()
    color = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light, background = page.evaluate(color), page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button").first.click()
    page.wait_for_function(f"{color} !== '{light}'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    assert wrong == []


def test_a_hover_tells_the_figure_and_a_choice_redraws(opened, studied):
    page, wrong = opened()
    section = page.locator("section").filter(has_text="Perplexity by method")
    section.scroll_into_view_if_needed()
    box = section.locator(".bars path").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = section.locator(".hoverlayer text").first
    told.wait_for()
    measured = [json.loads(path.read_text())["metrics"] for path in studied.rglob("results.json")]
    assert any(f"{metrics['perplexity.python_docs']:.4f}" in told.text_content() for metrics in measured)
    curves = page.locator("section").filter(has_text="Hit rate by budget")
    drawn = curves.locator(".scatterlayer .trace")
    assert drawn.count() == pd.read_csv(next(studied.rglob("hit_rates.csv")))["policy"].nunique()
    curves.locator("select").select_option("measured in runs: tiny_mixtral")
    drawn.nth(1).wait_for(state="detached")
    assert drawn.count() == 1  # offload=haq
    assert wrong == []


def test_a_screenshot_is_not_empty(opened, tmp_path: Path):
    page, _ = opened("phone", "dark")
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
