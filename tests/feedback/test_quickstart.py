"""The quickstart with every ranker, changed only by `feedback=` on the command line."""

import contextlib
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_pairrm import make_pairrm

from selm_jax import cli
from selm_jax.annotate.store import Annotations

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache of compiled programs for all runs here, which differ only in their rankers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def selm(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["selm", *arguments])
        cli.main()


def quickstart(folder: Path, feedback: dict) -> tuple[dict, list[dict], dict]:
    """Runs it tiny. Returns of iteration 1: counts of the rank stage, ranked rows, manifest."""
    selm(
        "run", str(QUICKSTART), "--tiny", f"output={folder}/q", f"feedback={json.dumps(feedback)}",
        "iterations=1", "training.learning_rate=2e-5",
    )  # fmt: skip
    return outcome(folder / "q-tiny")


def outcome(run: Path) -> tuple[dict, list[dict], dict]:
    settings = json.loads((run / "iteration_1" / "stage.json").read_text())["rank"]
    rows = pq.read_table(run / "iteration_1" / "ranked.parquet").to_pylist()
    manifest = json.loads((run / "manifest.json").read_text())
    assert (run / "report.html").is_file()
    return settings["counts"], rows, manifest["feedback"]["1"]["rank"]


@contextlib.contextmanager
def judge_server():
    """An OpenAI-compatible server whose judge likes the longer response."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            a = text.split("=== Response A ===")[1].split("=== End of response A ===")[0]
            b = text.split("=== Response B ===")[1].split("=== End of response B ===")[0]
            verdict = "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[tie]]"
            reply = {
                "choices": [{"message": {"content": verdict}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 5},
            }
            raw = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


VOWELS = {"ranker": "regex", "settings": {"pattern": "[aeiou]", "flags": "i"}}
RULES = {
    "sentiment": {"ranker": "sentiment"},  # `length` stands in for it: random letters have no mood
    "length": {"ranker": "length", "settings": {"target": 10}},
    "regex": VOWELS,
    "mixture": {
        "ranker": "mixture",
        "settings": {"parts": [VOWELS, {"ranker": "length", "weight": -1, "normalise": "rank"}]},
    },
    "verifiable": {
        "ranker": "verifiable",
        "settings": {
            "instructions": {
                "punctuation:no_comma": {},
                "length_constraints:number_words": {"num_words": 3, "relation": "less than"},
            }
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_rules(tmp_path, name):
    counts, rows, asked = quickstart(tmp_path, RULES[name])
    assert counts["prompts"] == counts["scored"] == asked["asked"] > 0
    assert counts["pairs"] + counts["drops"] == counts["prompts"]
    assert all(row["score"] is not None for row in rows)
    assert counts["pairs"] > 0


@pytest.mark.slow
def test_pairrm(tmp_path):
    folder = make_pairrm(tmp_path / "pairrm")
    counts, _, asked = quickstart(
        tmp_path, {"ranker": "pairrm", "settings": {"folder": str(folder)}}
    )
    assert counts["pairs"] > 0 and asked["ranker/comparisons"] > counts["prompts"]


@pytest.mark.slow
def test_judge(tmp_path):
    with judge_server() as url:
        settings = {"model": "m", "base_url": url, "price_prompt": 1, "price_completion": 1}
        feedback = {"ranker": "judge", "settings": settings, "budget": 10}
        counts, rows, asked = quickstart(tmp_path, feedback)
    assert counts["drops/not_asked"] == counts["prompts"] - 10 and asked["asked"] == 10
    assert asked["ranker/answers"] > 0
    assert asked["ranker/cost"] == pytest.approx(105e-6 * asked["ranker/answers"])
    heldout = {
        (t, row["kind"], row["prompt_id"]): row
        for t in (0, 1)
        for row in pq.read_table(tmp_path / f"q-tiny/iteration_{t}/heldout.parquet").to_pylist()
    }
    for (_, _, prompt), row in heldout.items():  # beside the start model's greedy answer
        gap = len(row["text"]) - len(heldout[0, "greedy", prompt]["text"])
        assert row["score"] == (1 + (gap > 0) - (gap < 0)) / 2
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for each in by_prompt.values():
        for one in each:
            for other in each:
                if one["score"] is not None and len(one["text"]) > len(other["text"]):
                    assert one["score"] > other["score"]


@pytest.mark.slow
def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_rule_of_mine.py").write_text(
        "def vowels(prompt, response, row):\n    return sum(map(response.count, 'aeiou'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    counts, _, _ = quickstart(tmp_path, {"ranker": "own_rule_of_mine:vowels"})
    assert counts["pairs"] > 0


@pytest.mark.slow
def test_people(tmp_path):
    """The run waits; another command imports rankings; the run continues to its report."""
    run = tmp_path / "q-tiny"
    command = [
        "run", str(QUICKSTART), "--tiny", f"output={tmp_path}/q", "feedback={ranker: human}",
        "iterations=1", "training.learning_rate=2e-5",
    ]  # fmt: skip
    pool = ThreadPoolExecutor(1)
    waiting = pool.submit(cli.app, command, standalone_mode=False)
    file = run / "annotations.sqlite"
    while not (waiting.done() or (file.exists() and Annotations(file).batches())):
        time.sleep(0.05)
    (batch,) = Annotations(file).batches()
    labels = [
        {
            "annotator": "Ada",
            "prompt": [{"role": role, "content": text} for role, text in item.messages],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for item in Annotations(file).items(batch)
        for i, better in enumerate(item.answers)
        for worse in item.answers[i + 1 :]  # as they stand: the greedy answer is the best
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    selm("annotate", str(run), "--import", str(tmp_path / "labels.jsonl"))
    waiting.result(timeout=300)
    pool.shutdown()
    counts, _, asked = outcome(run)
    assert counts["pairs"] > 0 and counts["explore/best"] == counts["pairs"]
    assert asked["ranker/annotators"] == 1
    assert asked["ranker/rankings"] == asked["ranker/questions"] > 0
    heldout = pq.read_table(run / "iteration_1" / "heldout.parquet")
    assert heldout["score"].null_count == heldout.num_rows > 0
    assert "Human annotators compare answers without scores" in (run / "report.html").read_text()
