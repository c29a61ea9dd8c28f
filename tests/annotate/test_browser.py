"""The page in headless Chromium, as people use it. Screenshots: $SELM_ARTIFACTS, else tmp_path."""

import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from selm_jax.annotate.server import shown_order
from selm_jax.annotate.store import Item

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BATCH = "run/iteration_1"
MARKDOWN = """A list, some `code`, and **weight**:

1. First, the *obvious* way.
2. Then a [link](https://example.org/page).

| method | reward |
|--------|-------:|
| DPO    | 0.41   |
| SELM   | 0.57   |

```python
def reward(x):
    return len(x) < 3
```
"""
HOSTILE = (
    '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
    "\n\n[click](javascript:document.title='owned') ![see](http://127.0.0.1:9/pixel.png)"
)
RTL = "\u202eevil\u202c אבגדה is Hebrew.\n\nمرحبا بالعالم، هذا نص."
LONG = "word " * 20_000  # 100 kB
NUL = "before\x00after \x1b[31mred \x07 \ud800."


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()


@pytest.fixture
def person(browser):
    """Opens the page as a person, in a browser profile of their own."""
    contexts = []

    def enter(served, name, **settings):
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.outside = []
        page.on("request", lambda r: page.outside.append(r.url))
        page.goto(served.url)
        page.fill("#given", name)
        page.keyboard.press("Enter")
        return page

    yield enter
    for context in contexts:
        context.close()


@pytest.fixture
def shot(tmp_path):
    """Keeps a screenshot."""
    folder = Path(os.environ.get("SELM_ARTIFACTS", tmp_path)) / "annotate"
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")


def until(condition, what="the condition"):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true in 10 s")


def question_shown(page, number):
    page.wait_for_function(
        "n => document.querySelector('#conversation').textContent.includes(`Question ${n}?`)"
        " && !document.querySelector('#skip').disabled", arg=number,
    )  # fmt: skip


def ranks_as_stored(name, question, shown_ranks):
    """The ranks by stored answer, of ranks by place on the person's page."""
    order = shown_order(name, question.digest, len(question.answers))
    ranks = [0] * len(order)
    for place, index in enumerate(order):
        ranks[index] = shown_ranks[place]
    return tuple(ranks)


def test_keyboard(item, store, serve, person, shot):
    items = [item(i) for i in range(5)]
    page = person(serve(store, items), "Ada")
    question_shown(page, 0)
    shot(page, "1-question")
    page.keyboard.press("b")  # best
    page.keyboard.press("1")  # a digit names an answer too; the third takes the last place
    shot(page, "2-ranked")
    page.keyboard.press("Enter")
    question_shown(page, 1)
    page.keyboard.press("t")  # all equal
    page.keyboard.press("Enter")
    question_shown(page, 2)
    page.keyboard.press("s")
    question_shown(page, 3)
    page.keyboard.press("c")
    page.keyboard.press("=")  # the next shares the first place
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    question_shown(page, 4)
    assert page.locator("#done").inner_text() == "4 of 5"
    assert "left" in page.locator("#left").inner_text()
    page.keyboard.press("u")  # back to the third, with what was said of it
    question_shown(page, 3)
    assert page.locator("#ranking").inner_text() == "A = C › B"
    page.keyboard.press("Backspace")
    page.keyboard.press("c")
    page.keyboard.press("b")
    page.keyboard.press("=")  # all have a place: the last two become one
    page.keyboard.press("Enter")
    question_shown(page, 4)
    page.keyboard.press("Enter")  # nothing is ranked: nothing is saved
    page.keyboard.press("a")
    page.keyboard.press("c")
    page.keyboard.press("Enter")
    page.wait_for_selector("#over:visible")
    shot(page, "3-done")
    said = {j.question: j.ranks for j in store.judgements(BATCH)}
    expected = [(2, 1, 3), (1, 1, 1), None, (2, 2, 1), (1, 3, 2)]
    for question, shown in zip(items, expected, strict=True):
        want = None if shown is None else ranks_as_stored("Ada", question, shown)
        assert said[question.digest] == want
    assert all(url.startswith(page.url.rpartition("/")[0]) for url in page.outside)


def test_mouse(item, store, serve, person, shot):
    items = [item(0), item(1, 2)]
    page = person(serve(store, items), "Grace Hopper")
    question_shown(page, 0)
    page.locator(".answer .text").nth(2).click()
    page.locator(".pick").nth(0).click()
    assert page.locator("#ranking").inner_text() == "C › A › B"
    page.locator(".pick").nth(0).click()  # taken back
    assert page.locator("#ranking").inner_text() == "C › …"
    page.click("#tie")
    page.click("#clear")
    page.locator(".pick").nth(1).click()
    page.click("#join")
    page.locator(".pick").nth(2).click()
    page.click("#save")
    question_shown(page, 1)
    page.click("#skip")
    page.wait_for_selector("#over:visible")
    page.click("#undo")
    question_shown(page, 1)
    page.locator(".answer").nth(1).click()
    shot(page, "4-two-answers")
    page.click("#save")
    page.wait_for_selector("#over:visible")
    said = {j.question: j.ranks for j in store.judgements(BATCH)}
    assert said == {
        items[0].digest: ranks_as_stored("Grace Hopper", items[0], (3, 1, 1)),
        items[1].digest: ranks_as_stored("Grace Hopper", items[1], (2, 1)),
    }


def test_a_reload_in_the_middle_loses_nothing(item, store, serve, person):
    items = [item(i, 4) for i in range(3)]
    page = person(serve(store, items), "Ada")
    question_shown(page, 0)
    page.keyboard.press("t")
    page.keyboard.press("Enter")
    question_shown(page, 1)
    before = page.locator("#answers").inner_text()
    page.keyboard.press("a")
    page.reload()
    question_shown(page, 1)  # the same question, the same order, no name asked again
    assert page.locator("#answers").inner_text() == before
    assert page.locator("#done").inner_text() == "1 of 3"
    assert len(store.judgements(BATCH)) == 1


def test_two_people_at_once(item, store, serve, person):
    items = [item(i, 4) for i in range(4)]
    served = serve(store, items, minimum=1)
    ada, bob = person(served, "Ada"), person(served, "Bob")
    question_shown(ada, 0)
    question_shown(bob, 1)  # not the one that lies before Ada
    for page, following in ((ada, 2), (bob, 3)):
        page.keyboard.press("t")
        page.keyboard.press("Enter")
        question_shown(page, following)
    bob.keyboard.press("s")
    question_shown(bob, 2)  # nothing else is left: what lies before Ada is better than idleness
    ada.keyboard.press("t")
    ada.keyboard.press("Enter")
    ada.wait_for_selector("#over:visible")
    bob.keyboard.press("t")  # came late, and counts too
    bob.keyboard.press("Enter")
    bob.wait_for_selector("#over:visible")
    assert sorted(j.annotator for j in store.judgements(BATCH)) == ["Ada", "Ada"] + ["Bob"] * 3
    orders = [shown_order(name, items[0].digest, 4) for name in ("Ada", "Bob", "Cyd", "Dan")]
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("die", ["before", "after"])
def test_the_server_is_killed_between_click_and_reply(item, store, serve, person, shot, tell, die):
    served = serve(store, [item(0), item(1)], die=die)
    page = person(served, "Ada")
    question_shown(page, 0)
    page.keyboard.press("t")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:visible")
    assert "Not saved yet" in page.locator("#notice").inner_text()
    shot(page, f"5-killed-{die}")
    assert len(store.judgements(BATCH)) == (die == "after")
    served.start()  # the page tries again on its own
    question_shown(page, 1)
    assert page.locator("#notice").is_hidden()
    with sqlite3.connect(store.path) as database:
        (noted,) = database.execute("select count(*) from events").fetchone()
    tell(
        "annotators, server killed between click and reply",
        f"{die} the answer is noted: shown as saved 1, lost {1 - min(noted, 1)}, "
        f"noted twice {noted - 1}",
    )
    assert noted == 1 and [j.ranks for j in store.judgements(BATCH)] == [(1, 1, 1)]


def test_the_page_is_closed_before_the_server_is_back(item, store, serve, person):
    served = serve(store, [item(0), item(1)], die="before")
    page = person(served, "Ada")
    question_shown(page, 0)
    page.keyboard.press("t")
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:visible")
    served.start()
    page.goto(served.url)
    question_shown(page, 1)
    assert len(store.judgements(BATCH)) == 1


def test_hostile_text_is_text(store, serve, person, shot):
    texts = (HOSTILE, RTL, LONG, NUL, MARKDOWN, " \n")
    hostile = Item("p<b>", (("system", "Be\x00kind."), ("user", HOSTILE)), texts)
    page = person(serve(store, [hostile]), "Ada")
    page.wait_for_selector(".answer")
    shot(page, "6-hostile")
    page.screenshot(full_page=True)
    order = shown_order("Ada", store.items(BATCH)[0].digest, len(texts))
    shown = [page.locator(".answer .text").nth(order.index(i)).inner_text() for i in range(6)]
    assert "<script>document.title" in shown[0] and "onerror=" in shown[0]
    assert "javascript:document.title" in shown[0]
    assert "אבגדה" in shown[1] and "مرحبا" in shown[1]
    assert shown[2].strip() == LONG.strip()
    assert "before⟨U+0000⟩after ⟨U+001B⟩[31mred ⟨U+0007⟩ \ufffd." in shown[3]
    assert "reward" in shown[4] and page.locator(".answer table").count() == 1
    assert shown[5] == "(nothing)"
    assert page.locator(".answer script, .answer img, #conversation script").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    assert page.title().startswith("Rank answers")
    own = served_prefix = page.url.rpartition("/")[0]
    assert all(url.startswith(own) for url in page.outside), served_prefix
    page.keyboard.press("m")
    page.wait_for_function("() => document.body.textContent.includes('**weight**')")
    page.locator(".answer", has_text="**weight**").scroll_into_view_if_needed()
    shot(page, "7-as-text")


def test_markdown_looks_right(store, serve, person, shot):
    other = "Short and plain: **0.57** is more.\n\n> As the authors say.\n\n- one\n- two"
    question = Item("p", (("user", "Compare the two methods, with code."),), (MARKDOWN, other))
    served = serve(store, [question])
    page = person(served, "Ada")
    page.wait_for_selector(".answer")
    page.keyboard.press("a")
    shot(page, "8-markdown")
    dark = person(served, "Bob", color_scheme="dark")
    dark.wait_for_selector(".answer")
    dark.keyboard.press("b")
    shot(dark, "9-dark")
    small = person(served, "Cyd", device_scale_factor=2)
    small.set_viewport_size({"width": 390, "height": 800})
    small.wait_for_selector(".answer")
    shot(small, "10-telephone")


def test_four_answers_stand_two_and_two(store, serve, browser, person, shot):
    answers = tuple(
        f"Tea is {taste}, warm, and best shared with a friend on a quiet afternoon by the window."
        for taste in ("bitter", "sweet", "green", "black")
    )
    served = serve(store, [Item("p", (("user", "Describe tea in one line."),), answers)])
    stranger = browser.new_page(viewport={"width": 1280, "height": 800})
    stranger.goto(served.url)
    stranger.wait_for_selector("#hello:visible")
    shot(stranger, "0-hello")
    stranger.close()
    page = person(served, "Dan")
    page.wait_for_selector(".answer")
    page.keyboard.press("d")
    page.keyboard.press("=")
    shot(page, "11-four")
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in range(4)]
    assert len({box["x"] for box in boxes}) == len({box["y"] for box in boxes}) == 2


def test_instructions_a_comment_and_undo_on_a_phone(store, item, serve, person, shot, browser):
    """Instructions are shown as text, a comment is kept and comes back with Undo, and every button
    is large enough for a finger."""
    told = "Prefer **kind** answers.\n\n<script>document.title = 'owned'</script>"
    served = serve(store, [item(0), item(1)], instructions=told)
    page = person(served, "Ada")
    page.set_viewport_size({"width": 400, "height": 800})
    question_shown(page, 0)
    assert page.locator("#instructions strong").inner_text() == "kind"
    assert page.title() != "owned" and page.locator("#instructions script").count() == 0
    page.fill("#comment", "A is as good, but late = T")  # no letter of it is a key of the page
    assert page.locator(".answer.placed").count() == 0
    for button in page.locator("footer button:visible, .pick, #rename").all():
        box = button.bounding_box()
        assert box["width"] >= 44 and box["height"] >= 44, button.inner_text()
    shot(page, "phone")
    page.click(".pick >> nth=0")
    page.click(".pick >> nth=1")
    page.click("#save")
    question_shown(page, 1)
    assert page.input_value("#comment") == ""
    (judged,) = store.judgements(BATCH)
    assert judged.comment == "A is as good, but late = T"
    assert page.locator("#undo").inner_text().startswith("Undo")
    page.click("#undo")
    question_shown(page, 0)
    assert page.input_value("#comment") == "A is as good, but late = T"
    assert store.judgements(BATCH) == []
