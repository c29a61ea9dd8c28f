"""The page: complete, self-contained, safe with hostile text, the same bytes every time."""

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from selm_jax.report import cards
from selm_jax.report.cards import answer_cards
from selm_jax.report.data import report_data
from selm_jax.report.length_plots import length_plots
from selm_jax.report.page import render, unique_labels, write
from selm_jax.report.plots import Series, lines, run_style
from selm_jax.shell import mirror
from selm_jax.shell.storage import Store

VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Tags, attributes, ids and text; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


@pytest.fixture(scope="module")
def several(make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    return [
        make_run(folder / "a", name="selm"),
        make_run(folder / "b", name="dpo", seed=1, settings="ranker: vader\n"),
        make_run(folder / "c", name="part", iterations=2, last_stages=("generate", "rank")),
    ]


@pytest.fixture(scope="module")
def comparison(several):
    """The page of several runs, drawn once for all tests that read it."""
    return render([report_data(folder) for folder in several])


@pytest.fixture(scope="module")
def page(make_run, tmp_path_factory):
    """The page of a finished run, drawn once for all tests that read it."""
    return render([report_data(make_run(tmp_path_factory.mktemp("page") / "run"))])


def test_one_run(run, tmp_path):
    out = tmp_path / "report.html"
    write([run], out)
    parsed = Page(out.read_text(encoding="utf-8"))
    text = " ".join(" ".join(parsed.text).split())
    assert "Held-out reward rose from 0.30 to 0.60" in text
    assert "This run is not finished" not in text
    assert "Nothing to draw" not in text
    for word in ("equal text", "kept as pairs", "alpha: 0.001", "134515008", "Distinct-2"):
        assert word in text
    assert len([1 for tag, a in parsed.tags if a.get("class") == "card"]) == 12
    assert list(tmp_path.glob(".*")) == []  # nothing half written stays behind


def test_every_plot_has_words_for_it(page):
    parsed = Page(page)
    plots = [a for tag, a in parsed.tags if tag == "svg" and a.get("class") == "plot"]
    captions = [tag for tag, _ in parsed.tags if tag == "figcaption"]
    assert len(plots) == len(captions) == 25
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in plots)


def test_lengths_are_drawn_from_their_quantiles(run):
    plots = {plot.title: plot for plot in length_plots([report_data(run)], ["run"])}
    assert list(plots) == [
        "Length of chosen answers, tokens",
        "Length of held-out greedy answers, tokens",
        "Reward by length, candidates",
    ]
    chosen, _, slope = (plot.drawing.csv.splitlines() for plot in plots.values())
    assert chosen[0].endswith("iteration,value,value_low,value_high")
    assert chosen[1].endswith("1,40,12,77")
    assert slope[1].endswith("0.1,0.5")


def test_ids_are_unique_and_references_hold(comparison):
    ids = Page(comparison).ids
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', comparison)
    assert references and {a or b for a, b in references} <= set(ids)


def test_nothing_is_fetched(comparison):
    text = comparison
    parsed = Page(text)
    policies = [a["content"] for _, a in parsed.tags if a.get("http-equiv")]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:")
    for _, attributes in parsed.tags:
        assert "src" not in attributes
        assert all(a is None or a.startswith(("#", "data:")) for a in [attributes.get("href", "#")])
    assert "http://" not in text and "https://" not in text and "@import" not in text


def test_colours_follow_the_page(comparison):
    plots = re.findall(r'<svg class="plot".*?</svg>', comparison, re.DOTALL)
    assert plots and not any(re.search(r"#[0-9a-f]{6}\b", plot) for plot in plots)
    assert all("var(--" in plot for plot in plots)


def test_a_curve_that_stands_still_is_drawn_flat():
    noise = Series(run_style(0), [1, 2, 3], [math.log(2), math.log(2) + 1e-7, math.log(2)])
    svg = lines([noise], key="k", alt="flat", xlabel="update").svg
    ticks = re.findall(r">(0\.\d+)<", svg)
    assert len(ticks) == len(set(ticks)) > 1


def test_tiny_values_share_one_power_of_ten():
    svg = lines([Series(run_style(0), [1, 2], [-2e-5, -3e-5])], key="k", alt="a", xlabel="x").svg
    assert "× 10⁻⁵" in svg and "e−05" not in svg


def test_the_first_styles_differ_in_more_than_colour():
    styles = [run_style(index) for index in range(12)]
    assert len(set(styles)) == 12
    assert len({(style.dashes, style.marker) for style in styles[:6]}) == 6


def test_same_folder_same_bytes(several, comparison, tmp_path):
    write(several, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == comparison


def test_several_runs(comparison):
    text = html.unescape(comparison)
    assert "Comparison of 3 runs" in text
    assert "Against <bdi>selm</bdi>, prompt by prompt" in text and "12 shared prompts" in text
    assert "ranker" in text and "not set" in text and "Settings that differ" in text
    assert "Iteration 2: score, train, export, evaluate not finished yet." in text
    assert text.count('<ul class="legend">') > 8


def test_unfinished_run(make_run, tmp_path):
    folder = make_run(tmp_path / "u", iterations=1, last_stages=("generate",))
    text = render([report_data(folder)])
    assert "This run is not finished" in text
    assert "Nothing to draw: no run has logged this yet." in text
    assert "No iteration has finished ranking yet" in text
    Page(text)


@pytest.mark.parametrize("stages", [(), ("generate", "rank", "score", "train")])
def test_every_point_a_run_can_stop_at(make_run, tmp_path, stages):
    for iterations in (0, 1):
        folder = make_run(tmp_path / f"{iterations}", iterations=iterations, last_stages=stages)
        assert "This run is not finished" in render([report_data(folder)])


def test_a_run_without_any_iteration(make_run, tmp_path):
    folder = make_run(tmp_path / "u", iterations=0)
    shutil.rmtree(folder / "iteration_0")
    (folder / "metrics.jsonl").unlink()
    text = render([report_data(folder)])
    assert "No held-out answers are written yet." in text
    Page(text)


HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=http://x onerror=alert(1)> --> "
    "\u202eRTL \u05d0\u05d1 \x00 \x1b[31m $x^2$ {{ 7*7 }} \ufffe &lt; end"
)


def test_hostile_text_stays_text(make_run, tmp_path):
    folder = make_run(
        tmp_path / "h",
        name='<b onclick="x">$\\frac{1}</b>',
        texts={"prompt": HOSTILE, "answer": HOSTILE},
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"]["jax"] = "\ud800 lone <script>"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "report.html"
    other = make_run(tmp_path / "o", name='"><script>')
    write([folder, other], out)
    text = out.read_text(encoding="utf-8")
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not {"img", "b onclick"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)
    assert "\x00" not in text and "\x1b" not in text and "\ufffe" not in text
    shown = "".join(parsed.text)
    assert "</script><script>alert(1)</script>" in shown and "␀ ␛[31m $x^2$ {{ 7*7 }}" in shown
    blocks = [a for _, a in parsed.tags if (a.get("class") or "").split()[:1] == ["text"]]
    assert blocks and all(a["dir"] == "auto" for a in blocks)


def test_the_script_is_the_one_the_policy_allows(page):
    import base64
    import hashlib

    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.escape(f"script-src 'sha256-{digest}'") in page.replace("&#39;", "&#x27;")


def test_answers_stand_side_by_side(several):
    runs = [report_data(folder) for folder in several]
    found, left_out = answer_cards(runs, unique_labels(runs))
    assert left_out == 0 and len(found) == 12
    groups = found[0]["groups"]
    assert [g["kind"] for g in groups][:4] == [f"greedy, iteration {t}" for t in (3, 2, 1, 0)]
    assert [a["label"] for a in groups[0]["answers"]] == ["selm", "dpo"]  # the third got no further
    assert [a["label"] for a in groups[2]["answers"]] == ["selm", "dpo", "part"]
    last, first = groups[0]["answers"][0], groups[3]["answers"][0]
    assert last["change"] == pytest.approx(last["score"] - first["score"])
    assert found[0]["gain"] == pytest.approx(last["change"])


def test_iterations_of_one_run_stand_side_by_side(run):
    (card, *_), _ = answer_cards([report_data(run)], ["quickstart"])
    assert [g["kind"] for g in card["groups"]] == ["greedy", "sample"]
    assert [a["iteration"] for a in card["groups"][0]["answers"]] == [0, 1, 2, 3]


def test_left_out_prompts_are_counted(run, monkeypatch):
    monkeypatch.setattr(cards, "MAX_PROMPTS", 5)
    text = render([report_data(run)])
    assert "7 more prompts are in the run folders" in text
    assert text.count('class="card"') == 5


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    runs = [report_data(make_run(tmp_path / name, prompts=2)) for name in "xy"]
    assert len(set(unique_labels(runs))) == 2


def test_a_run_in_a_bucket_is_called_by_its_url(make_run, tmp_path, monkeypatch):
    url = "gs://bucket/run"
    runs = [report_data(make_run(tmp_path / name, prompts=2)) for name in "xy"]
    there = mirror.Mirror(url, Store(url, None), tmp_path / "x")
    monkeypatch.setattr(mirror, "_mirrors", {url: there})
    assert f"({url})" in unique_labels(runs)[0] and f"({tmp_path / 'y'})" in unique_labels(runs)[1]


def test_wrong_calls(run, tmp_path):
    with pytest.raises(ValueError, match="no run to report on"):
        write([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="same run folder is given twice"):
        write([run, run / ".." / "run"], tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write([tmp_path / "no"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_size_for_64_prompts_of_long_answers(make_run, tmp_path):
    folder = make_run(tmp_path / "big", prompts=64, words=300, updates=400)
    assert len(render([report_data(folder)]).encode()) < 3_000_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_in_a_browser(run, tmp_path):
    """The script runs under the page's own policy, and paging and searching work."""
    out = tmp_path / "report.html"
    write([run], out)
    assert re.search(r'<button[^>]*class="previous"[^>]*disabled', _browse(out, tmp_path / "p1"))

    driver = """
      const press = (key) => document.body.dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true}));
      const log = [], place = document.querySelector(".place");
      const search = document.querySelector(".search");
      const visible = () => [...document.querySelectorAll(".card")]
        .filter((c) => !c.hidden).map((c) => c.querySelector("h3").textContent).join();
      press("ArrowRight"); press("ArrowRight"); log.push(place.textContent, visible());
      press("ArrowLeft"); log.push(visible());
      search.value = "about NUMBER 7."; search.dispatchEvent(new Event("input"));
      log.push(place.textContent, visible());
      search.value = "nowhere to be found"; search.dispatchEvent(new Event("input"));
      log.push(place.textContent, visible(), document.querySelector(".none").hidden);
      document.title = log.join("|");
    """
    text = out.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    out.write_text(text.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", _browse(out, tmp_path / "p2"))[1]
    assert title == "3 of 12|Prompt p002|Prompt p001|1 of 1|Prompt p007|no match||false"


def _browse(path, profile):
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={profile}", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
