"""The page, in a real browser that can reach nothing else."""

from __future__ import annotations

import shutil

import httpx
import pytest
from test_serve import quick_compilation, serving  # noqa: F401
from tiny_models import tiny_config, tiny_model

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(("mamba", "moe")))


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A fresh page; anything it asks of another place, and any error in it, fails the test."""
    context = browser.new_context()
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
    page.on("request", lambda request: None if "//127.0.0.1" in request.url else wrong.append(request.url))
    page.set_default_timeout(60_000)
    sync_api.expect.set_options(timeout=60_000)
    yield page
    context.close()
    assert not [entry for entry in wrong if not entry.startswith("data:")]


def test_a_prompt_is_sent_and_its_text_streams_in(model, page):
    with serving(model) as running:
        page.goto(running.url)
        sync_api.expect(page.locator("#model")).to_have_text("tiny")
        (expected,) = model.generate("Once upon", max_tokens=40, temperature=0.5, top_k=60, seed=3)
        for label, value in (("Prompt", "Once upon"), ("Max tokens", "40"), ("Temperature", "0.5"), ("Top-k", "60")):
            page.get_by_label(label).fill(value)
        page.get_by_label("Seed").fill("3")
        page.get_by_role("button", name="Send").click()
        sync_api.expect(page.locator("#speed")).to_contain_text("tokens/s")
        assert page.locator("#written").text_content() == "Once upon" + expected.text
        assert f"{len(expected.tokens)} tokens" in page.locator("#speed").inner_text()

        sync_api.expect(page.get_by_role("button", name="Send")).to_be_enabled()
        page.get_by_label("Prompt").fill("")
        page.keyboard.press("Control+Enter")
        sync_api.expect(page.get_by_role("alert")).to_contain_text("prompt is empty")

        page.get_by_label("Prompt").fill("a")
        page.get_by_label("Max tokens").fill("1000000")
        page.get_by_label("Seed").fill("")
        page.keyboard.press("Control+Enter")
        sync_api.expect(page.locator("#written .new")).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        sync_api.expect(page.get_by_role("status")).to_contain_text("Stopped after")
        running.wait_for("bm_jax_engine_active", 0)
        assert page.get_by_role("button", name="Send").is_enabled()


def test_the_page_asks_for_a_key_where_one_is_needed(model, page):
    with serving(model, keys=("the-key",)) as running:
        page.goto(running.url)
        sync_api.expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        page.get_by_label("API key").fill("the-key")
        page.get_by_label("API key").press("Tab")
        sync_api.expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_label("Prompt").fill("a")
        page.keyboard.press("Control+Enter")
        sync_api.expect(page.locator("#speed")).to_contain_text("tokens/s")


def test_every_field_has_a_label_and_nothing_comes_from_elsewhere(model, page):
    with serving(model) as running:
        policy = httpx.get(running.url).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        page.goto(running.url)
        assert page.locator("textarea, input").count() == 10
        assert page.evaluate("[...document.querySelectorAll('textarea, input')].every((field) => field.labels.length === 1)")
        assert page.evaluate(
            "performance.getEntriesByType('resource').every((entry) => entry.name.startsWith(location.origin))"
        )
        for scheme, light in (("light", True), ("dark", False)):
            page.emulate_media(color_scheme=scheme)
            red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
            assert (int(red) > 128) == light
