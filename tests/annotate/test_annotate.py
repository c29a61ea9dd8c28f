"""The store, the server's refusals, agreement, and the files that come out and go in."""

import itertools
import json
import multiprocessing
import re
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.annotate.agreement import alpha, mean_shares, shares
from selm_jax.annotate.exchange import export_pairs, import_pairs
from selm_jax.annotate.render import markdown, plain
from selm_jax.annotate.server import shown_order
from selm_jax.annotate.store import (
    AnnotationError,
    Annotations,
    Item,
    Judgement,
    _add_comments,
    _has_comments,
    is_ranking,
)

BATCH = "run/iteration_1"
rankings = st.lists(st.integers(0, 3), min_size=2, max_size=5).map(
    lambda scores: tuple(1 + sum(other > mine for other in scores) for mine in scores)
)


class TestStore:
    def test_what_is_noted_is_on_the_disk_and_counts_once(self, store, item):
        question = item(0)
        store.put(BATCH, [question])
        for _ in range(2):  # the page sends an act again when it has heard no reply
            store.judge(question.digest, " Ada ", (2, 1, 2), request="one", seconds=4.0)
        (found,) = Annotations(store.path).judgements(BATCH)
        assert found == Judgement(question.digest, "Ada", (2, 1, 2), 4.0)
        with sqlite3.connect(store.path) as database:
            assert database.execute("pragma journal_mode").fetchone() == ("wal",)
        with store._open() as database:
            assert database.execute("pragma synchronous").fetchone()[0] == 2  # FULL

    def test_undo_goes_back_step_by_step(self, store, item):
        items = [item(i) for i in range(3)]
        store.put(BATCH, items)
        for i, each in enumerate(items):
            store.judge(each.digest, "Ada", (1, 1, 1), request=f"{i}")
        back, before = store.undo(BATCH, "Ada", request="u1")
        assert back == items[2] and before.ranks == (1, 1, 1)
        assert store.undo(BATCH, "Ada", request="u1")[0] == items[2]  # the same act again
        assert store.undo(BATCH, "Ada", request="u2")[0] == items[1]
        assert len(store.judgements(BATCH)) == 1
        store.judge(items[1].digest, "Ada", None, request="again")
        assert store.undo(BATCH, "Ada", request="u3")[0] == items[1]
        assert store.undo(BATCH, "Ada", request="u4")[0] == items[0]
        assert store.undo(BATCH, "Ada", request="u5") is None
        assert store.undo(BATCH, "Bob", request="u6") is None

    def test_a_question_closes_when_enough_people_ranked_or_skipped_it(self, store, item):
        items = [item(i) for i in range(3)]
        store.put(BATCH, items, minimum=2)
        store.judge(items[1].digest, "Ada", (1, 1, 1), request="a")
        assert store.open_questions(BATCH, "Bob")[0] == items[1].digest  # begun: first
        assert items[1].digest not in store.open_questions(BATCH, "Ada")
        store.judge(items[1].digest, "Bob", (1, 1, 1), request="b")
        for name in ("Ada", "Bob"):
            store.judge(items[2].digest, name, None, request=f"skip {name}")
        assert store.open_questions(BATCH, "Cyd") == [items[0].digest]
        progress = store.progress(BATCH, "Ada")
        assert (progress.questions, progress.closed, progress.mine, progress.left) == (3, 2, 2, 1)

    def test_a_batch_that_is_put_again_keeps_its_answers(self, store, item):
        store.put(BATCH, [item(0), item(1)])
        store.judge(item(0).digest, "Ada", (1, 2, 3), request="a", seconds=3)
        store.put(BATCH, [item(2), item(0), item(0)])
        assert store.items(BATCH) == [item(2), item(0)]
        assert [j.ranks for j in store.judgements(BATCH)] == [(1, 2, 3)]
        changed = Item("p0", item(0).messages, ("other", "answers", "now"))
        store.put(BATCH, [changed])
        assert store.judgements(BATCH) == []

    def test_many_at_once_lose_nothing(self, store, item):
        items = [item(i) for i in range(5)]
        store.put(BATCH, items, minimum=99)
        context = multiprocessing.get_context("spawn")
        people = [
            context.Process(target=_judge_all, args=(store.path, items, f"P{n}")) for n in range(3)
        ]
        for each in people:
            each.start()
        for each in people:
            each.join()
        assert len(store.judgements(BATCH)) == 15

    @pytest.mark.parametrize("ranks", [(1, 2), (1, 1, 2), (0, 1, 2), (1, 2, True), (1.0, 2, 3)])
    def test_what_is_no_ranking_is_refused(self, store, item, ranks):
        store.put(BATCH, [item(0)])
        with pytest.raises(AnnotationError, match="p0.*expected one for each of 3"):
            store.judge(item(0).digest, "Ada", ranks, request="a")

    def test_other_refusals(self, store, item, tmp_path):
        store.put(BATCH, [item(0)])
        for name in ("", "  ", "x" * 65, "a\nb", None):
            with pytest.raises(AnnotationError, match="the name is"):
                store.judge(item(0).digest, name, None, request="a")
        with pytest.raises(AnnotationError, match="no question 'abc'"):
            store.judge("abc", "Ada", None, request="a")
        with pytest.raises(AnnotationError, match="distinct: 1; expected at least two"):
            Item("p", (), ("same", "same"))
        with pytest.raises(AnnotationError, match="minimum is 0"):
            store.put(BATCH, [item(0)], 0)
        (tmp_path / "no.sqlite").write_text("This is no database, but a text of some length.")
        with pytest.raises(AnnotationError, match="no.sqlite"):
            Annotations(tmp_path / "no.sqlite")

    @given(rankings)
    def test_rankings_are_known(self, ranks):
        assert is_ranking(ranks)
        assert not is_ranking([r + 1 for r in ranks])


def _judge_all(path, items, name):
    store = Annotations(path)
    for each in items:
        store.judge(each.digest, name, (1, 2, 3), request=f"{name} {each.digest}")


class TestServer:
    def test_refusals_and_headers(self, store, serve, item):
        served = serve(store, [item(0)])
        root = served.url.rsplit("/", 2)[0]
        for path in ("/", "/page.js", "/wrong-token/", "/wrong-token/next", "//", "/é/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(root + urllib.parse.quote(path), timeout=5)
            assert refused.value.code == 403
        reply = urllib.request.urlopen(served.url, timeout=5)
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "http" not in reply.read().decode().replace("http-equiv", "")  # nothing from outside

        def post(path, body):
            request = urllib.request.Request(served.url + path, data=body, method="POST")
            try:
                return urllib.request.urlopen(request, timeout=5).status
            except urllib.error.HTTPError as error:
                return error.code

        assert post("next", b'{"annotator": "Ada"}') == 200
        for body in (b"", b"[1]", b"{", b"{}", b"\xff", b'{"annotator": 3}', b"x" * 70_000):
            assert post("next", body) == 400
        good = {"annotator": "Ada", "question": item(0).digest, "ranks": [1, 1, 1], "request": "r"}
        for change in ({"ranks": [2, 1]}, {"ranks": "abc"}, {"ranks": [None]}, {"question": "x"},
                       {"seconds": "NaN"}, {"seconds": -1}, {"request": 5}):  # fmt: skip
            body = json.dumps(good | {"seconds": 1} | change).encode()
            assert post("judge", body) == 400, change
        assert store.judgements(BATCH) == []
        assert post("judge", json.dumps(good | {"seconds": 1}).encode()) == 200

    def test_orders_are_seeded_by_person_and_prompt_and_fair(self):
        assert shown_order("Ada", "q", 4) == shown_order("Ada", "q", 4)
        first = [shown_order("Ada", f"q{i}", 4)[0] for i in range(400)]
        assert all(60 < count < 140 for count in np.bincount(first))  # 100 expected, sd 8.7


class TestRender:
    @given(st.text(alphabet="<>&\"'`*_[]()!#|\n -~ax\x00/:j", max_size=80))
    def test_only_tags_of_markdown_come_out(self, text):
        allowed = {"p", "br", "em", "strong", "code", "pre", "a", "ul", "ol", "li", "hr"}
        allowed |= {"blockquote", "table", "thead", "tbody", "tr", "th", "td"}
        allowed |= {f"h{level}" for level in range(1, 7)}
        for page in (markdown(text), plain(text)):
            assert {tag.lower() for tag in re.findall(r"<\s*/?\s*([^\s>/]+)", page)} <= allowed
            assert not re.search(r"<[^>]*\son\w+\s*=|<[^>]*\sstyle=|href=\"javascript", page)
            assert "\x00" not in page

    def test_direction_marks_are_shown_in_plain_text(self):
        assert "⟨U+202E⟩" in plain("\u202ex")


class TestAgreement:
    @given(rankings)
    def test_shares_count_wins(self, ranks):
        slow = [
            sum(1.0 if mine < other else 0.5 if mine == other else 0.0
                for j, other in enumerate(ranks) if j != i) / (len(ranks) - 1)
            for i, mine in enumerate(ranks)
        ]  # fmt: skip
        np.testing.assert_allclose(shares(ranks), slow)

    def test_alpha_of_the_same_of_opposites_and_of_chance(self):
        def people(*rankings):
            return [
                Judgement(f"q{q}", f"P{n}", ranks, None)
                for n, of_one in enumerate(rankings)
                for q, ranks in enumerate(of_one)
            ]

        same = [(1, 2, 3), (3, 1, 2), (2, 2, 1)]
        assert alpha(people(same, same, same)) == pytest.approx(1)
        assert alpha(people([(1, 2)] * 8, [(2, 1)] * 8)) < -0.8
        rng = np.random.default_rng(0)
        random = [[tuple(map(int, rng.permutation(3) + 1)) for _ in range(300)] for _ in range(3)]
        assert abs(alpha(people(*random))) < 0.05
        assert alpha(people(same)) is None
        assert alpha(people([(1, 1)] * 3, [(1, 1)] * 3)) is None

    def test_alpha_against_the_definition(self):
        """Krippendorff's ordinal metric by its sums, for two people and pairs of answers."""
        ranks = [[(1, 2), (2, 1), (1, 2), (1, 1)], [(1, 2), (1, 2), (1, 1), (1, 1)]]
        of_all = ((n, q, r) for n in (0, 1) for q, r in enumerate(ranks[n]))
        found = [Judgement(f"q{q}", f"P{n}", r, None) for n, q, r in of_all]
        units = [(shares(a)[i], shares(b)[i]) for a, b in zip(*ranks, strict=True) for i in (0, 1)]
        values = [v for unit in units for v in unit]
        count = {v: values.count(v) for v in sorted(set(values))}

        def distance(a, b):
            low, high = sorted((a, b))
            between = sum(n for v, n in count.items() if low <= v <= high)
            return (between - (count[low] + count[high]) / 2) ** 2

        observed = np.mean([distance(a, b) for a, b in units])
        expected = np.mean([distance(a, b) for a, b in itertools.permutations(values, 2)])
        assert alpha(found) == pytest.approx(1 - observed / expected)

    def test_mean_over_people(self):
        both = [Judgement("q", name, r, None) for name, r in (("A", (1, 2, 3)), ("B", (2, 1, 2)))]
        np.testing.assert_allclose(mean_shares(both), [0.625, 0.75, 0.125])


class TestExchange:
    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    @pytest.mark.parametrize("layout", ["trl", "ultrafeedback"])
    def test_there_and_back(self, store, item, tmp_path, layout, suffix):
        hostile = Item("pé", (("system", "S"), ("user", "U\x00\n")), ("a\x00", "é\u202e", "", "d"))
        store.put(BATCH, [item(0), hostile, item(1, 2)])
        store.judge(item(0).digest, "Ada", (2, 1, 2), request="1")
        store.judge(hostile.digest, "Ada", (4, 1, 1, 3), request="2")
        store.judge(hostile.digest, "Bob", (1, 2, 3, 4), request="3")
        store.judge(item(1, 2).digest, "Ada", (1, 1), request="4")
        store.judge(item(1, 2).digest, "Bob", None, request="5")
        file = tmp_path / f"out.{suffix}"
        counts = export_pairs(store, BATCH, file, layout)
        agreement = counts.pop("alpha")  # of Ada and Bob, who ranked one question both
        assert agreement == pytest.approx(alpha(store.judgements(BATCH))) and agreement < 1
        assert counts == {"rows": 2 + 5 + 6, "all_equal": 1, "skips": 1}
        other = Annotations(tmp_path / "other.sqlite")
        other.put(BATCH, store.items(BATCH))
        assert import_pairs(other, BATCH, file) == {"rows": 13, "rankings": 3}
        assert import_pairs(other, BATCH, file) == {"rows": 13, "rankings": 0}

        def ranked(found):
            return {(j.question, j.annotator): j.ranks for j in found.judgements(BATCH)
                    if j.ranks and set(j.ranks) != {1}}  # fmt: skip

        assert ranked(other) == ranked(store)

    def test_the_layouts_are_those_of_trl_and_ultrafeedback(self, store, item, tmp_path):
        store.put(BATCH, [item(0, 2)])
        store.judge(item(0, 2).digest, "Ada", (2, 1), request="1")
        export_pairs(store, BATCH, tmp_path / "a.jsonl")
        row = json.loads((tmp_path / "a.jsonl").read_text())
        assert row == {
            "prompt_id": "p0",
            "prompt": [{"role": "user", "content": "Question 0?"}],
            "chosen": [{"role": "assistant", "content": "Answer y to question 0."}],
            "rejected": [{"role": "assistant", "content": "Answer x to question 0."}],
            "annotator": "Ada",
        }
        export_pairs(store, BATCH, tmp_path / "a.parquet", "ultrafeedback")
        (row,) = pq.read_table(tmp_path / "a.parquet").to_pylist()
        assert row["prompt"] == "Question 0?" and len(row["chosen"]) == 2
        assert (row["score_chosen"], row["score_rejected"]) == (1.0, 0.0)

    def test_our_own_reader_takes_them(self, store, item, tmp_path):
        from selm_jax.text.prompts import load_prompts

        store.put(BATCH, [item(i, 2) for i in range(3)])
        for i in range(3):
            store.judge(item(i, 2).digest, "Ada", (1, 2), request=f"{i}")
        for layout in ("trl", "ultrafeedback"):
            file = tmp_path / f"{layout}.jsonl"
            export_pairs(store, BATCH, file, layout)
            prompts = load_prompts(str(file))
            assert [p.chosen for p in prompts] == [item(i, 2).answers[0] for i in range(3)]

    def test_separators_inside_a_text_end_no_line(self, store, tmp_path):
        asked = Item("p", (("user", "One\u2028two\x85three"),), ("a\u2029b", "c"))
        store.put(BATCH, [asked])
        rows = [
            {"prompt": [{"role": "user", "content": "One\u2028two\x85three"}],
             "chosen": [{"role": "assistant", "content": "a\u2029b"}],
             "rejected": [{"role": "assistant", "content": "c"}]},
        ]  # fmt: skip
        file = tmp_path / "in.jsonl"
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
        assert import_pairs(store, BATCH, file) == {"rows": 1, "rankings": 1}

    def test_what_cannot_be_read_is_refused_whole(self, store, item, tmp_path):
        store.put(BATCH, [item(0)])

        def row(chosen, rejected, prompt="Question 0?"):
            return {"prompt": [{"role": "user", "content": prompt}], "annotator": "Ada",
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}]}  # fmt: skip

        x, y, z = item(0).answers
        cases = {
            "do not rank its 3 answers": [row(x, y)],
            "no cycle": [row(x, y), row(y, z), row(z, x)],
            "line 2: 0 questions": [row(x, y), row(x, "other")],
            "0 questions .* begins with 'Else'": [row(x, y, "Else")],
            "line 1: 'chosen' is missing": [{"prompt": [{"role": "user", "content": "Q"}]}],
            "'chosen': found 'text'": [row(x, y) | {"chosen": "text"}],
            "prompt is text": [row(x, y) | {"prompt": "Question 0?"}],
        }
        for message, rows in cases.items():
            file = tmp_path / "in.jsonl"
            file.write_text("".join(json.dumps(r) + "\n" for r in rows))
            with pytest.raises(AnnotationError, match=message):
                import_pairs(store, BATCH, file)
        file.write_text("{\n")
        with pytest.raises(AnnotationError, match="line 1: not JSON"):
            import_pairs(store, BATCH, file)
        with pytest.raises(AnnotationError, match="ends in .jsonl or .parquet"):
            export_pairs(store, BATCH, tmp_path / "x.csv")
        assert store.judgements(BATCH) == []


class TestComments:
    def test_a_comment_is_kept_trimmed_and_exported(self, store, item, tmp_path):
        items = [item(0), item(1)]
        store.put(BATCH, items)
        for n, text in enumerate(("  =1+1, late\ud800 ", "   ")):
            store.judge(items[n].digest, "Ada", (1, 2, 3), request=f"r{n}", comment=text)
        assert [j.comment for j in store.judgements(BATCH)] == ["=1+1, late?", None]
        for name in ("pairs.jsonl", "pairs.parquet"):
            export_pairs(store, BATCH, tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        comments = ["=1+1, late?"] * 3 + [None] * 3
        assert [row.get("comment") for row in rows] == comments
        assert pq.read_table(tmp_path / "pairs.parquet")["comment"].to_pylist() == comments

    @pytest.mark.parametrize("wrong", [7, ["a"], "x" * 4001])
    def test_what_is_no_comment_is_refused(self, store, item, wrong):
        store.put(BATCH, [item(0)])
        with pytest.raises(AnnotationError, match="the comment is .*at most 4000 characters"):
            store.judge(item(0).digest, "Ada", (1, 2, 3), request="r", comment=wrong)
        assert store.judgements(BATCH) == []

    def test_a_file_of_an_earlier_version_is_taken_on(self, store, item):
        store.put(BATCH, [item(0), item(1)])
        store.judge(item(0).digest, "Ada", (1, 2, 3), request="r0")
        with sqlite3.connect(store.path) as database:
            database.execute("drop view judgements")
            database.execute("alter table events drop column comment")
        again = Annotations(store.path)
        again.judge(item(1).digest, "Ada", None, request="r1", comment="unclear")
        assert [j.comment for j in again.judgements(BATCH)] == [None, "unclear"]

    @pytest.mark.parametrize("meanwhile", [True, False])
    def test_a_column_that_cannot_be_added_is_an_error_unless_it_is_there(self, meanwhile):
        """Another process may have added it meanwhile; a locked file is another matter."""

        class Refuses(sqlite3.Connection):
            def execute(self, sql, *arguments):
                if not sql.startswith("alter table"):
                    return super().execute(sql, *arguments)
                if meanwhile:
                    super().execute(sql)
                raise sqlite3.OperationalError("database is locked")

        with sqlite3.connect(":memory:", factory=Refuses) as database:
            database.row_factory = sqlite3.Row
            database.execute("create table events (at text)")
            with (
                nullcontext()
                if meanwhile
                else pytest.raises(sqlite3.OperationalError, match="locked")
            ):
                _add_comments(database)
            assert _has_comments(database) == meanwhile
