"""From scores to pairs: the slow obvious form as oracle, properties, the paper's cases."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from selm_jax.config import ExploreName, RuleName
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.preferences import selection as pairs
from selm_jax.preferences.candidates import SOURCES, Candidate, Dropped, Pair
from selm_jax.preferences.labels import label
from selm_jax.preferences.selection import EXPLORES, RULES, place, ranks
from selm_jax.preferences.selection_report import Report


def select(candidates, scores, rule="best_worst", explore="greedy", seed=0, **rest):
    """Calls `select` with built-in rules given by name."""
    rule, explore = pairs.rule_named(rule), pairs.explore_named(explore)
    return pairs.select(candidates, scores, rule=rule, explore=explore, seed=seed, **rest)


def candidate(source="greedy", text="text", ids=None, finish=None, sample=0):
    own = source in ("greedy", "sample")
    return Candidate(source, text, ids, finish or ("stop" if own else "dataset"), sample)


def trio(own="own", chosen="chosen", rejected="rejected"):
    """The authors' candidates in the authors' order."""
    return [
        candidate("greedy", own),
        candidate("chosen", chosen),
        candidate("rejected", rejected),
    ]


# Small whole numbers: ties are common, and sums and differences are exact.
whole = st.integers(-4, 4).map(float)


@st.composite
def prompts(draw, scores=whole, most=6):
    """Candidates (a greedy one, a sample and a dataset chosen among them) and their scores."""
    sources = ["greedy", "sample", "chosen"]
    sources += draw(st.lists(st.sampled_from(SOURCES), max_size=most - len(sources)))
    made = []
    for number, source in enumerate(draw(st.permutations(sources))):
        ids = draw(st.none() | st.lists(st.integers(0, 2), max_size=2).map(tuple))
        cut = source in ("greedy", "sample") and draw(st.booleans())
        text = draw(st.sampled_from(["", " ", "a", "b", "c"]))
        made.append(candidate(source, text, ids, "length" if cut else None, number))
    size = len(made)
    return made, draw(st.lists(scores, min_size=size, max_size=size))


options = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(list(RULES)),
        "explore": st.sampled_from(list(EXPLORES)),
        "ties": st.sampled_from(pairs.TIES),
        "cut_off": st.sampled_from(pairs.CUT_OFFS),
        "min_margin": st.sampled_from([0.0, 1.0, 3.0]),
        "seed": st.integers(0, 50),
    }
)


class TestRanks:
    @given(st.lists(whole | st.floats(allow_nan=False, allow_infinity=False), max_size=8))
    def test_one_plus_how_many_are_strictly_higher(self, scores):
        slow = [1 + sum(other > score for other in scores) for score in scores]
        assert ranks(scores).tolist() == slow

    def test_equal_scores_share_the_better_rank(self):
        assert ranks([2.0, 5.0, 2.0, 5.0, 0.0]).tolist() == [3, 1, 3, 1, 5]
        assert ranks(np.array([0.0, -0.0])).tolist() == [1, 1]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_has_no_rank_is_refused(self, bad):
        with pytest.raises(FeedbackError, match="finite"):
            ranks([0.0, bad])
        with pytest.raises((FeedbackError, TypeCheckError)):
            ranks(np.zeros((2, 2)))


class TestPlace:
    def test_each_place(self):
        assert [place([3.0, 1.0, 2.0], i) for i in range(3)] == ["best", "worst", "middle"]

    def test_a_shared_end_is_still_that_end(self):
        assert [place([3.0, 3.0, 1.0, 1.0], i) for i in range(4)] == ["best"] * 2 + ["worst"] * 2

    def test_all_equal_is_tied(self):
        assert place([2.0, 2.0, 2.0], 1) == place([7.0], 0) == "tied"


class TestBestWorst:
    @pytest.mark.parametrize(
        ("scores", "expected"),
        [
            ([3.0, 2.0, 1.0], Pair(0, 2, 0)),
            ([2.0, 3.0, 1.0], Pair(1, 2, 0)),
            ([1.0, 2.0, 3.0], Pair(2, 0, 0)),
            ([2.0, 2.0, 1.0], Pair(0, 2, 0)),  # two share the best: the first is chosen
            ([2.0, 1.0, 1.0], Pair(0, 1, 0)),  # two share the worst: the first is rejected
            ([1.0, 2.0, 1.0], Pair(1, 0, 0)),
        ],
    )
    def test_of_three(self, scores, expected):
        assert select(trio(), scores) == expected

    @given(prompts(), options)
    def test_against_the_slow_form(self, prompt, asked):
        """Loops and comparisons only: no ranks, no argmin."""
        candidates, scores = prompt
        asked |= {"rule": "best_worst", "cut_off": "keep", "min_margin": 0.0}
        result = select(candidates, scores, **asked)
        best = worst = 0
        for i, score in enumerate(scores):
            best = i if score > scores[best] else best
            worst = i if score < scores[worst] else worst
        if isinstance(result, Pair):
            assert (result.chosen, result.rejected) == (best, worst)
            return
        texts = [candidates[i].text for i in (best, worst)]
        ids = [candidates[i].token_ids for i in (best, worst)]
        if scores[best] == scores[worst] and asked["ties"] == "drop":
            expected = "tie"
        elif best != worst and (texts[0] == texts[1] or (ids[0] == ids[1] and ids[0] is not None)):
            expected = "equal_text"
        else:
            assert not texts[0].strip() or not texts[1].strip()
            expected = "empty"
        assert result == Dropped(expected)

    def test_a_lone_candidate_ties_with_itself(self):
        assert select([candidate()], [1.0]) == Dropped("tie")


class TestSwap:
    def test_own_response_against_the_datasets_chosen(self):
        # The rejected one neither wins nor loses, whatever its score.
        assert select(trio(), [2.0, 1.0, 9.0], rule="swap") == Pair(0, 1, 0)
        assert select(trio(), [1.0, 2.0, -9.0], rule="swap") == Pair(1, 0, 0)

    def test_ties_keep_to_the_order_of_the_candidates(self):
        scores = [1.0, 1.0, 0.0]
        assert select(trio(), scores, rule="swap") == Dropped("tie")
        assert select(trio(), scores, rule="swap", ties="first") == Pair(0, 0, 0)
        dataset_first = [trio()[1], trio()[0]]
        assert select(dataset_first, [1.0, 1.0], rule="swap", ties="first") == Pair(0, 0, 1)

    @given(prompts(), options)
    def test_only_the_two_take_part(self, prompt, asked):
        candidates, scores = prompt
        result = select(candidates, scores, **(asked | {"rule": "swap"}))
        if isinstance(result, Pair):
            first_chosen = [each.source for each in candidates].index("chosen")
            assert {result.chosen, result.rejected} <= {first_chosen, result.explore}

    def test_needs_the_datasets_chosen(self):
        with pytest.raises(FeedbackError, match="rule: swap needs .* chosen.*greedy, sample"):
            select([candidate(), candidate("sample")], [1.0, 2.0], rule="swap")


class TestTopRandom:
    @given(prompts(), options)
    def test_the_best_against_one_that_is_lower(self, prompt, asked):
        candidates, scores = prompt
        result = select(candidates, scores, **(asked | {"rule": "top_random", "ties": "drop"}))
        if isinstance(result, Pair):
            assert scores[result.chosen] == max(scores) > scores[result.rejected]
        else:
            assert (result.reason == "tie") == (len(set(scores)) == 1)

    def test_draws_evenly_and_by_the_seed(self):
        made = [*trio(), candidate("sample", "more", sample=1)]
        scores = [2.0, 9.0, 1.0, 0.0]
        drawn = [select(made, scores, rule="top_random", seed=(1, i)) for i in range(300)]
        counts = np.bincount([pair.rejected for pair in drawn], minlength=4)
        assert counts[1] == 0 and all(70 < n < 130 for n in counts[[0, 2, 3]])  # 100, sd 8.2
        assert drawn == [select(made, scores, rule="top_random", seed=(1, i)) for i in range(300)]

    def test_needs_a_seed(self):
        with pytest.raises((FeedbackError, TypeCheckError)):
            select(trio(), [1.0, 2.0, 3.0], rule="top_random", seed=None)


class TestAllTie:
    """Three equal texts: the authors train on chosen = rejected = their own response."""

    same = trio("same", "same", "same")

    def test_is_dropped_by_default(self):
        assert select(self.same, [0.5] * 3) == Dropped("tie")

    def test_is_kept_by_the_authors_rule_and_counted(self):
        result = select(self.same, [0.5] * 3, ties="first")
        assert result == Pair(0, 0, 0)
        report = Report()
        report.add(self.same, [0.5] * 3, result)
        counts = report.as_dict()
        for key in ("pairs", "ties", "tie_kept", "explore/tied", "explore_is/both"):
            assert counts[key] == 1, key
        assert counts["drops"] == 0 and counts["duplicates"] == 2


class TestDrops:
    def test_equal_text_in_spite_of_different_scores(self):
        assert select(trio("same", "same", "x"), [2.0, 1.0, 1.5]) == Dropped("equal_text")

    def test_equal_ids_in_spite_of_different_text(self):
        made = [candidate(text="a", ids=(1, 2)), candidate("chosen", "a ", ids=(1, 2))]
        assert select(made, [2.0, 1.0]) == Dropped("equal_text")

    @pytest.mark.parametrize("blank", ["", " \n\t"])
    def test_empty_chosen_or_rejected(self, blank):
        assert select(trio(own=blank), [3.0, 2.0, 1.0]) == Dropped("empty")
        assert select(trio(own=blank), [1.0, 2.0, 3.0]) == Dropped("empty")
        assert select(trio(own=blank), [2.0, 3.0, 1.0]) == Pair(1, 2, 0)

    @pytest.mark.parametrize("scores", [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    def test_cut_off_in_any_of_the_three_roles(self, scores):
        made = trio()
        made[0] = replace(made[0], finish="length")
        assert select(made, scores, cut_off="drop") == Dropped("cut_off")
        assert isinstance(select(made, scores, cut_off="keep"), Pair)

    def test_a_cut_off_bystander_does_no_harm(self):
        made = [*trio(), candidate("sample", "more", finish="length", sample=1)]
        assert select(made, [4.0, 1.0, 2.0, 3.0], cut_off="drop") == Pair(0, 1, 0)

    def test_the_margin_itself_is_enough(self):
        assert select(trio(), [3.0, 2.0, 1.0], min_margin=2.0) == Pair(0, 2, 0)
        assert select(trio(), [3.0, 2.0, 1.0], min_margin=2.5) == Dropped("margin")

    def test_a_kept_tie_still_has_to_pass_the_other_tests(self):
        assert select(trio(), [1.0] * 3, ties="first", min_margin=0.1) == Dropped("margin")
        assert select(trio(own=""), [1.0] * 3, ties="first") == Dropped("empty")

    def test_the_first_reason_wins(self):
        made = [candidate(text="", finish="length"), candidate("chosen", "")]
        harsh = {"cut_off": "drop", "min_margin": 9.0}
        assert select(made, [1.0, 1.0], **harsh) == Dropped("tie")
        assert select(made, [2.0, 1.0], **harsh) == Dropped("equal_text")
        made[1] = replace(made[1], text="x")
        assert select(made, [2.0, 1.0], **harsh) == Dropped("empty")
        made[0] = replace(made[0], text="y")
        assert select(made, [2.0, 1.0], **harsh) == Dropped("cut_off")
        made[0] = replace(made[0], finish="stop")
        assert select(made, [2.0, 1.0], **harsh) == Dropped("margin")


class TestExplore:
    made = (
        candidate("chosen", "c"),
        candidate("sample", "s0", sample=0),
        candidate("greedy", "g0"),
        candidate("sample", "s1", sample=1),
        candidate("greedy", "g1"),
        candidate("rejected", "r"),
    )

    @given(st.lists(whole, min_size=6, max_size=6))
    def test_whatever_the_scores_the_first_of_its_source(self, scores):
        for explore, index in (("greedy", 2), ("sample", 1)):
            result = select(self.made, scores, explore=explore, ties="first")
            assert isinstance(result, Pair) and result.explore == index

    @given(st.lists(whole, min_size=6, max_size=6))
    def test_all_are_the_models_own_whatever_the_scores(self, scores):
        own = tuple(i for i, c in enumerate(self.made) if c.source in ("greedy", "sample"))
        result = select(self.made, scores, explore="all", ties="first")
        assert isinstance(result, Pair)
        assert (result.explore, result.explored) == (own[0], own)
        flipped, _ = label(result, scores, flip=0.5, seed=0)
        assert flipped.explored == own
        alone = select(trio(), [3.0, 2.0, 1.0], explore="all")
        assert alone == Pair(0, 2, 0)  # one answer of its own: as greedy

    @given(st.lists(whole, min_size=6, max_size=6))
    def test_best_and_worst_of_the_models_own(self, scores):
        own = [scores[i] for i in (1, 2, 3, 4)]
        best = select(self.made, scores, explore="best", ties="first")
        worst = select(self.made, scores, explore="worst", ties="first")
        assert isinstance(best, Pair) and best.explore == 1 + own.index(max(own))
        assert isinstance(worst, Pair) and worst.explore == 1 + own.index(min(own))

    def test_random_draws_each_of_the_models_own_and_no_other(self):
        scores = [float(i) for i in range(6)]
        drawn = [
            select(self.made, scores, explore="random", seed=(7, 1, i)).explore for i in range(400)
        ]
        counts = np.bincount(drawn, minlength=6)
        assert counts[[0, 5]].tolist() == [0, 0]
        # 100 expected each, standard deviation 8.7; the seeds are fixed.
        assert all(60 < count < 140 for count in counts[[1, 2, 3, 4]])

    def test_random_is_a_function_of_the_seed(self):
        scores = [float(i) for i in range(6)]
        for seed in (0, 3, [1, 2, 3]):
            first, again = (
                select(self.made, scores, explore="random", seed=seed) for _ in range(2)
            )
            assert first == again

    def test_errors(self):
        with pytest.raises((FeedbackError, TypeCheckError)):
            select(self.made, [0.0] * 6, explore="random", seed=None)
        with pytest.raises(FeedbackError, match="explore: sample needs .*greedy, chosen, rejected"):
            select(trio(), [0.0] * 3, explore="sample")
        with pytest.raises(FeedbackError, match="greedy or sample.*this prompt has: chosen"):
            select([candidate("chosen")], [0.0], explore="random", seed=1)
        with pytest.raises(FeedbackError, match="0 candidates"):
            select([], [])


class TestSelectProperties:
    @given(prompts(), options)
    def test_a_pair_keeps_every_promise(self, prompt, asked):
        candidates, scores = prompt
        result = select(candidates, scores, **asked)
        if isinstance(result, Dropped):
            return
        chosen, rejected, explore = (
            candidates[i] for i in (result.chosen, result.rejected, result.explore)
        )
        margin = scores[result.chosen] - scores[result.rejected]
        assert margin >= asked["min_margin"]
        assert margin > 0 or asked["ties"] == "first"
        assert chosen.text.strip() and rejected.text.strip()
        assert margin == 0 or chosen.text != rejected.text
        assert explore.source in ("greedy", "sample")
        if asked["cut_off"] == "drop":
            assert "length" not in {chosen.finish, rejected.finish, explore.finish}

    @given(prompts(), options, st.integers(-1000, 1000))
    def test_a_constant_added_to_the_scores_changes_nothing(self, prompt, asked, constant):
        candidates, scores = prompt
        moved = [score + constant for score in scores]
        assert select(candidates, scores, **asked) == select(candidates, moved, **asked)
        assert ranks(scores).tolist() == ranks(moved).tolist()

    @given(prompts(), options, st.sampled_from([0.5, 2.0, 64.0]))
    def test_the_unit_of_the_scores_matters_to_the_margin_alone(self, prompt, asked, scale):
        candidates, scores = prompt
        asked["min_margin"] = 0.0
        scaled = [score * scale for score in scores]
        assert select(candidates, scores, **asked) == select(candidates, scaled, **asked)

    @given(prompts(), options, st.randoms(use_true_random=False))
    def test_without_ties_the_order_of_the_candidates_is_nothing(self, prompt, asked, shuffler):
        """One greedy candidate and one dataset chosen: then no role depends on the order."""
        candidates, _ = prompt
        asked["explore"] = "greedy"
        once: list[Candidate] = []
        for each in candidates:
            if each.source in ("sample", "rejected") or each.source not in [o.source for o in once]:
                once.append(each)
        scores = shuffler.sample(range(-20, 20), len(once))
        order = shuffler.sample(range(len(once)), len(once))
        before = select(once, [float(score) for score in scores], **asked)
        after = select([once[i] for i in order], [float(scores[i]) for i in order], **asked)
        if isinstance(before, Dropped):
            assert after == before
        else:
            assert isinstance(after, Pair)
            assert before == Pair(order[after.chosen], order[after.rejected], order[after.explore])

    @given(prompts(), options)
    def test_arrays_are_as_good_as_lists(self, prompt, asked):
        candidates, scores = prompt
        for dtype in (np.float64, np.float32, np.int64):
            array = np.array(scores, dtype=dtype)
            assert select(candidates, array, **asked) == select(candidates, scores, **asked)

    @pytest.mark.parametrize(
        ("option", "value", "what"),
        [
            ("rule", "bestworst", "rule is 'bestworst'; did you mean 'best_worst'"),
            ("explore", "gredy", "did you mean 'greedy'"),
            ("ties", "frist", "did you mean 'first'"),
            ("cut_off", "dorp", "did you mean 'drop'"),
            ("min_margin", -1.0, "min_margin is -1.0"),
            ("min_margin", float("nan"), "min_margin is nan"),
            ("min_margin", float("inf"), "min_margin is inf"),
        ],
    )
    def test_bad_options(self, option, value, what):
        with pytest.raises(FeedbackError, match=what):
            select(trio(), [3.0, 2.0, 1.0], **{option: value})

    def test_scores_that_do_not_fit(self):
        with pytest.raises(FeedbackError, match="3 candidates and 2 scores"):
            select(trio(), [1.0, 2.0])
        with pytest.raises(FeedbackError, match="finite"):
            select(trio(), [1.0, float("inf"), 2.0])

    def test_a_score_that_could_not_be_read_is_no_tie(self):
        scores = [1.0, float("nan"), 2.0]
        result = select(trio(), scores, ties="first")
        assert result == Dropped("malformed")
        report = Report()
        report.add(trio(), scores, result)
        counts = report.as_dict()
        assert counts["drops"] == counts["drops/malformed"] == counts["scored"] == 1
        assert counts["drops/tie"] == counts["ties"] == counts["ties_partial"] == 0
        means = {k: v for k, v in counts.items() if k.startswith("score_mean/")}
        assert sorted(means.values()) == [1.0, 2.0]


class TestCandidate:
    def test_bad_fields(self):
        with pytest.raises(FeedbackError, match="source is 'greddy'; did you mean 'greedy'"):
            candidate("greddy")
        with pytest.raises(FeedbackError, match="finish is 'stopped'; did you mean 'stop'"):
            candidate(finish="stopped")
        with pytest.raises((FeedbackError, TypeCheckError)):
            candidate(ids=[1, 2])  # a list has no hash, an array no single ==
        with pytest.raises(FeedbackError, match="reason of a drop is 'ties'"):
            Dropped("ties")


class TestIdentity:
    @given(prompts())
    def test_it_is_equal_exactly_for_the_same_response(self, prompt):
        candidates, _ = prompt
        for a in candidates:
            for b in candidates:
                if a.token_ids is None or b.token_ids is None:
                    same = a.token_ids is b.token_ids and a.text == b.text
                else:
                    same = a.token_ids == b.token_ids
                assert (a.identity == b.identity) == same

    def test_ids_decide_where_there_are_ids(self):
        one, other = candidate(text="a", ids=(1,)), candidate("chosen", "a", ids=(2,))
        assert one.identity != other.identity
        assert one.identity == candidate("sample", "b", ids=(1,)).identity

    def test_ids_and_bare_text_are_never_the_same(self):
        with_ids, bare = candidate(text="a", ids=(1,)), candidate("chosen", "a")
        assert with_ids.identity != bare.identity == candidate("sample", "a").identity


class TestReport:
    @given(st.lists(prompts(), max_size=8), options)
    def test_conservation(self, batch, asked):
        report, kept, dropped = Report(), 0, 0
        for candidates, scores in batch:
            result = select(candidates, scores, **asked)
            kept, dropped = kept + isinstance(result, Pair), dropped + isinstance(result, Dropped)
            report.add(candidates, scores, result)
        counts = report.as_dict()

        def total(prefix):
            return sum(value for key, value in counts.items() if key.startswith(prefix + "/"))

        assert counts["prompts"] == len(batch) == counts["pairs"] + counts["drops"]
        assert (counts["pairs"], counts["drops"]) == (kept, dropped)
        assert total("drops") == counts["drops"]
        for each in ("explore", "explore_is", "winner"):
            assert total(each) == counts["pairs"], each
        everyone = [each for candidates, _ in batch for each in candidates]
        assert total("candidates") == counts["candidates"] == len(everyone)
        assert counts["cut_off"] == sum(each.finish == "length" for each in everyone)
        assert counts["empty"] == sum(not each.text.strip() for each in everyone)
        assert counts["ties"] + counts["ties_partial"] <= counts["prompts"] == counts["scored"]
        assert counts["label_against_scores"] == 0
        # A mean times its count is a sum: nothing scored is left out.
        scored = sum(
            counts[f"score_mean/{source}"] * counts[f"candidates/{source}"]
            for source in SOURCES
            if f"score_mean/{source}" in counts
        )
        assert scored == pytest.approx(sum(sum(scores) for _, scores in batch))

    def test_prompts_that_nobody_scored_are_drops_and_no_ties(self):
        report = Report()
        report.add(trio(), None, Dropped("not_asked"))
        report.add(trio(), [4.0, 2.0, 3.0], Pair(1, 0, 0))  # a drawn label
        counts = report.as_dict()
        expected = {"prompts": 2, "pairs": 1, "drops": 1, "drops/not_asked": 1, "scored": 1}
        expected |= {"candidates": 6, "ties": 0, "label_against_scores": 1}
        assert {key: counts[key] for key in expected} == expected
        assert counts["score_mean/greedy"] == 4.0
        with pytest.raises(FeedbackError, match="without scores became a pair"):
            report.add(trio(), None, Pair(0, 1, 0))

    @given(st.lists(prompts(), max_size=6), options)
    def test_the_order_of_the_prompts_is_nothing(self, batch, asked):
        forward, backward = Report(), Report()
        for report, order in ((forward, batch), (backward, batch[::-1])):
            for candidates, scores in order:
                report.add(candidates, scores, select(candidates, scores, **asked))
        assert forward.as_dict() == backward.as_dict()  # whole scores: exact sums

    def test_a_small_run_by_hand(self):
        report = Report()
        made = [
            (trio("o1", "c1", "r1"), [3.0, 2.0, 1.0]),  # own wins
            (trio("o2", "c2", "r2"), [1.0, 2.0, 3.0]),  # own loses, the dataset's rejected wins
            (trio("o3", "c3", "r3"), [2.0, 3.0, 1.0]),  # own in the middle
            (trio("c4", "c4", "r4"), [2.0, 2.0, 1.0]),  # own is the dataset's chosen
            (trio("x", "x", "x"), [5.0, 5.0, 5.0]),  # tie
            (trio("", "c6", "r6"), [0.0, 2.0, 1.0]),  # empty
        ]
        made[1][0][0] = replace(made[1][0][0], finish="length")
        for candidates, scores in made:
            report.add(candidates, scores, select(candidates, scores))
        expected = {
            "prompts": 6,
            "pairs": 4,
            "drops": 2,
            "drops/tie": 1,
            "drops/empty": 1,
            "scored": 6,
            "ties": 1,
            "ties_partial": 1,
            "candidates": 18,
            "candidates/greedy": 6,
            "candidates/chosen": 6,
            "candidates/rejected": 6,
            "cut_off": 1,
            "empty": 1,
            "duplicates": 3,
            "explore/best": 2,
            "explore/middle": 1,
            "explore/worst": 1,
            "explore_is/chosen": 2,
            "explore_is/rejected": 1,
            "explore_is/neither": 1,
            "winner/greedy": 2,
            "winner/chosen": 1,
            "winner/rejected": 1,
            "score_mean/greedy": 13 / 6,
            "score_mean/chosen": 16 / 6,
            "score_mean/rejected": 12 / 6,
        }
        found = report.as_dict()
        assert {key: value for key, value in found.items() if value} == expected

    def test_an_empty_report_is_all_zeros_and_json(self):
        found = Report().as_dict()
        assert set(found.values()) == {0}
        assert json.loads(json.dumps(found)) == found

    def test_a_filled_report_is_json(self):
        report = Report()
        report.add(trio(), np.array([3.0, 2.0, 1.0], np.float32), Pair(0, 2, 0))
        found = report.as_dict()
        assert json.loads(json.dumps(found)) == found

    def test_a_drop_counts_no_winner_and_no_place(self):
        report = Report()
        report.add(trio(), [1.0, 1.0, 1.0], Dropped("tie"))
        found = report.as_dict()
        assert not any(
            value for key, value in found.items() if key.startswith(("winner/", "explore"))
        )

    def test_a_tie_of_the_swapped_two_is_a_kept_tie_though_not_all_tie(self):
        report, scores = Report(), [1.0, 1.0, 0.0]
        report.add(trio(), scores, select(trio(), scores, rule="swap", ties="first"))
        found = report.as_dict()
        assert (found["tie_kept"], found["ties"], found["ties_partial"]) == (1, 0, 1)

    def test_scores_that_do_not_fit(self):
        with pytest.raises(FeedbackError, match="3 candidates and 1 scores"):
            Report().add(trio(), [1.0], Dropped("tie"))


class TestYours:
    """A user can write a rule; `select` does everything around it."""

    scores = (3.0, 1.0, 2.0)

    @staticmethod
    def by(returned, **rest):
        rest = {"seed": 0} | rest
        return pairs.select(trio(), TestYours.scores, rule=lambda *_: returned, **rest)

    def test_it_is_given_candidates_scores_and_draws_of_its_own(self):
        seen = []

        def rule(candidates, scores, rng):
            seen.append((candidates, scores, rng.random()))
            return Pair(np.int64(2), 1)

        def explore(candidates, scores, rng):
            seen.append((candidates, scores, rng.random()))
            return [2, 0]

        result = pairs.select(trio(), self.scores, rule=rule, explore=explore, seed=(4, 1, 2))
        assert result == Pair(2, 1, 0, (0, 2)) and type(result.chosen) is int
        again = pairs.select(trio(), self.scores, rule=rule, explore=explore, seed=(4, 1, 2))
        assert again == result
        (of_explore, of_rule, *same), other = seen, np.random.default_rng((4, 1, 2)).random()
        assert list(of_explore[0]) == trio() and list(of_explore[1]) == list(self.scores)
        assert [each.explored for each in of_rule[0]] == [True, False, True]
        assert of_explore[2] == other != of_rule[2]
        assert [each[2] for each in same] == [of_explore[2], of_rule[2]]

    @pytest.mark.parametrize(
        ("returned", "expected"),
        [
            (Pair(0, 7), "from 0 to 2"),
            (Pair(-1, 0), "from 0 to 2"),
            (Pair(0.0, 1), "whole numbers"),
            (Pair(True, 0), "whole numbers"),
            (Pair(None, 0), "whole numbers"),
            (Pair(1, 1), "two different indices"),
            (Pair(0, 1, 2), "feedback.explore picks"),
            ((0, 1), "a Pair or a Dropped"),
            (None, "a Pair or a Dropped"),
        ],
    )
    @pytest.mark.parametrize("ties", pairs.TIES)
    def test_what_is_no_pair_is_refused(self, returned, expected, ties):
        with pytest.raises(FeedbackError, match="returned .*expected") as error:
            self.by(returned, ties=ties)
        assert expected in str(error.value) and __file__ in str(error.value)

    @pytest.mark.parametrize("returned", [3, -1, 1.0, True, None, "0", [], [0, 0], [0, 9], [[0]]])
    def test_an_invalid_explore_result_is_refused(self, returned):
        with pytest.raises(FeedbackError, match="returned .*expected .*ind(ex|ices)") as error:
            pairs.select(trio(), self.scores, explore=lambda *_: returned, seed=0)
        assert __file__ in str(error.value)

    def test_what_it_raises_names_it(self):
        def greedy_of_mine(candidates, scores, rng):
            return {}[0]

        with pytest.raises(FeedbackError, match="greedy_of_mine .*raised KeyError: 0"):
            pairs.select(trio(), self.scores, explore=greedy_of_mine, seed=0)

    def test_it_cannot_change_what_the_next_one_sees(self):
        def rule(candidates, scores, rng):
            scores[0] = 9.0

        with pytest.raises(FeedbackError, match="read-only"):
            pairs.select(trio(), self.scores, rule=rule, seed=0)

    def test_it_drops_for_reasons_of_its_own(self):
        assert self.by(Dropped("rule")) == Dropped("rule")

    def test_every_other_test_is_asked_of_its_pair(self):
        def chosen(made, scores=self.scores, **rest):
            return pairs.select(made, scores, rule=lambda *_: Pair(1, 2), seed=0, **rest)

        cut = [*trio()[:2], candidate("sample", "cut", finish="length")]
        assert chosen(trio("a", "b", "b")) == Dropped("equal_text")
        assert chosen(trio("a", "b", " ")) == Dropped("empty")
        assert chosen(cut, cut_off="drop") == Dropped("cut_off")
        assert chosen(trio(), min_margin=1.5) == Dropped("margin")
        assert chosen(trio(), [1.0, float("nan"), 2.0]) == Dropped("malformed")
        assert chosen(trio(), [1.0, 2.0, 2.0]) == Dropped("tie")
        assert chosen(trio(), [1.0, 2.0, 2.0], ties="first") == Pair(1, 1, 0)
        # The lower score may be preferred: how far apart the two are is what the margin asks.
        assert chosen(trio(), min_margin=1.0) == Pair(1, 2, 0)

    def test_nothing_to_choose_from_is_a_tie(self):
        made = [candidate(), candidate("sample")]
        both = {"rule": lambda *_: Pair(1, 1), "seed": 0}
        assert pairs.select(made, [2.0, 2.0], **both) == Dropped("tie")
        assert pairs.select(made, [2.0, 2.0], ties="first", **both) == Pair(1, 1, 0)


def test_the_tables_have_every_name_that_an_experiment_may_give():
    assert tuple(RULES) == get_args(RuleName) and tuple(EXPLORES) == get_args(ExploreName)


def test_the_draws_of_a_seed_stay_as_they_are():
    """The draws of earlier versions: a resumed run has to draw the same."""
    made = [candidate("greedy", "g"), *(candidate("sample", f"s{i}") for i in range(1, 6))]
    scores = [3.0, 1.0, 4.0, 1.5, 5.0, 0.0]
    drawn = [select(made, scores, "top_random", "random", (42, 1, i)) for i in range(12)]
    assert [(pair.chosen, pair.rejected, pair.explore) for pair in drawn] == [
        (4, 5, 3), (4, 2, 1), (4, 3, 5), (4, 5, 4), (4, 1, 4), (4, 5, 0),
        (4, 0, 3), (4, 0, 5), (4, 5, 0), (4, 1, 1), (4, 3, 3), (4, 3, 3),
    ]  # fmt: skip
