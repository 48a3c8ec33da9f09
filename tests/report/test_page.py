"""The page, looked at and clicked through in headless Chromium, in both languages, at desktop and phone width."""

import os
import shutil

import pytest

from saigen.cards import catalogue
from saigen.report.page import write_report

WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("page") / "report")


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        if os.environ.get("SAIGEN_REQUIRE") == "all":
            pytest.fail("the browser tests need playwright (extra browser) and chromium")
        pytest.skip("needs playwright and chromium: pip install 'saigen[browser]' and your system's chromium")
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield running
        running.close()


@pytest.fixture(params=WIDTHS)
def page(browser, request):
    tab = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 900}, locale="en-GB")
    tab.problems = []
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("console", lambda message: message.type == "error" and tab.problems.append(message.text))
    tab.on(
        "request",
        lambda wanted: wanted.url.startswith(("file:", "data:")) or tab.problems.append(f"asked for {wanted.url}"),
    )
    yield tab
    assert tab.problems == []
    tab.close()


def no_sideways_scroll(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_paper_is_on_the_index_and_has_a_page(site):
    text = site.read_text(encoding="utf-8")
    for paper in catalogue.list_papers():
        assert f'href="papers/{paper.slug}.html"' in text
        assert (site.parent / "papers" / f"{paper.slug}.html").is_file()


def test_the_index_in_both_languages(site, page):
    page.goto(site.as_uri())
    paper = catalogue.list_papers()[0]
    link = page.locator(f'.paper[data-slug="{paper.slug}"] h2 a')
    assert link.locator('[lang="en"]').is_visible() and not link.locator('[lang="ja"]').is_visible()
    page.click('[data-set-lang="ja"]')
    assert link.locator('[lang="ja"]').is_visible() and not link.locator('[lang="en"]').is_visible()
    assert page.evaluate("document.documentElement.lang") == "ja"
    assert no_sideways_scroll(page)
    link.click()
    assert page.locator("h1").inner_text().strip() == paper.card.title_ja, "the language travels with the link"


def test_the_page_opens_in_the_language_it_was_written_for(browser, tmp_path):
    paper = catalogue.list_papers()[0]
    index = write_report(tmp_path / "r", [paper], lang="ja")
    assert '<html lang="ja"' in index.read_text(encoding="utf-8")
    tab = browser.new_page(locale="en-GB")
    tab.goto(index.as_uri())
    assert tab.locator('h2 a [lang="ja"]').is_visible()
    tab.click('[data-set-lang="en"]')
    tab.click("h2 a")
    assert tab.locator("h1").inner_text().strip() == paper.card.title, "what the reader chose goes before"
    tab.close()


def test_search_and_filters(site, page):
    page.goto(site.as_uri())
    every = len(catalogue.list_papers())
    shown = lambda: page.locator(".paper:visible").count()  # noqa: E731
    assert shown() == every
    page.fill("#search", "sharpness")
    assert 0 < shown() < every
    page.fill("#search", "no paper says this")
    assert shown() == 0 and page.locator("#none").is_visible()
    page.fill("#search", "")
    page.select_option("#domain", "rl")
    assert shown() == len(catalogue.list_papers(domain="rl"))
    page.select_option("#domain", "")
    assert shown() == every
    verdict = page.locator("#verdict option").nth(1).get_attribute("value")
    page.select_option("#verdict", verdict)
    assert shown() == page.locator(f'.paper[data-verdict="{verdict}"]').count() > 0


@pytest.mark.parametrize("slug", [paper.slug for paper in catalogue.list_papers()])
def test_a_papers_page(site, page, slug):
    card = catalogue.paper(slug).card
    page.goto((site.parent / "papers" / f"{slug}.html").as_uri())
    assert no_sideways_scroll(page)
    for claim in card.claim:
        assert page.locator(f"#{claim.id} blockquote").is_visible()
    assert page.locator("#deviations").is_visible()
    page.click('[data-set-lang="ja"]')
    assert page.locator("h1").inner_text().strip() == card.title_ja
    assert no_sideways_scroll(page)
    if page.locator("details").count():
        page.locator("details summary").first.click()
        assert page.locator("details table").first.is_visible()
    page.locator(".copy").first.click()
    page.wait_for_selector(".copy.done")


def test_a_second_report_replaces_the_first_as_a_whole(tmp_path):
    chosen = catalogue.list_papers()[:1]
    write_report(tmp_path / "r", chosen)
    (tmp_path / "r" / "papers" / "left_over.html").write_text("old")
    write_report(tmp_path / "r", chosen)
    assert not (tmp_path / "r" / "papers" / "left_over.html").exists()


def test_ones_own_run_stands_beside_the_published(plugin, store, tmp_path):
    from saigen import runner

    runner.run("mean_of_noise", jobs=1)
    write_report(tmp_path / "r", [plugin])
    text = (tmp_path / "r" / "papers" / "mean_of_noise.html").read_text(encoding="utf-8")
    assert "yours" in text and "reproduced" in text
