"""The experts of a served model: `/experts.json`, the page in a real browser, and the metrics."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

pytest.importorskip("openai", reason="the extra `serve` is not installed")

BODY = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8}


def generate(served) -> None:
    assert httpx.post(f"{served.url}/v1/completions", json=BODY).status_code == 200


def test_the_json_is_what_the_session_counts(sparse):
    generate(sparse)
    view = httpx.get(f"{sparse.url}/experts.json").json()
    offload = sparse.model.offload
    assert view["stats"] == offload.stats()
    np.testing.assert_array_equal(view["resident"], offload.residents())
    for name, values in offload.expert_stats().items():
        np.testing.assert_array_equal(view[name], values)
        assert np.sum(view[name]) == view["stats"][name]
    assert view["tokens_per_second"] > 0
    assert view["model"] == "tiny"


def test_metrics_are_what_the_session_counts(sparse):
    generate(sparse)
    text = httpx.get(f"{sparse.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    stats = sparse.model.offload.expert_stats()
    names = {"hits_total": stats["hits"], "misses_total": stats["misses"], "moved_bytes_total": stats["bytes_moved"]}
    for name, counts in (names | {"resident_experts": sparse.model.offload.residents()}).items():
        for layer, count in enumerate(counts.sum(1)):
            assert float(values[f'haq_lab_offload_{name}{{layer="{layer}"}}']) == count


def test_without_offloading_the_page_says_so(dense):
    for path in ("/experts", "/experts.json"):
        answer = httpx.get(f"{dense.url}{path}")
        assert (answer.status_code, "offload=haq" in answer.json()["error"]["message"]) == (404, True)


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_the_page_follows_the_model(sparse, browser, size):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page, problems, requests = context.new_page(), [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{sparse.url}/experts")
    page.wait_for_selector("html[data-ready=true]", state="attached")
    hits = page.evaluate("view.stats.hits")
    generate(sparse)
    page.wait_for_function(f"view.stats.hits > {hits}")
    view = httpx.get(f"{sparse.url}/experts.json").json()
    cells = page.locator("td[data-resident]")
    assert cells.count() == np.size(view["resident"])
    assert page.locator('td[data-resident="1"]').count() == np.sum(view["resident"])
    cells.nth(3).hover()
    detail = page.locator("#detail").text_content()
    assert f"Layer 0, expert 3: {'resident' if view['resident'][0][3] else 'not resident'}" in detail
    assert f"{view['hits'][0][3]} hits, {view['misses'][0][3]} misses" in detail
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert {url.removeprefix(sparse.url) for url in requests} <= {"/experts", "/experts.json", "data:,"}
    assert problems == []
    context.close()
