"""PairRM against the same model in torch, fed by the published recipe; its rules against their
obvious forms; and, where `SELM_PAIRRM` names the real weights, the published numbers."""

from __future__ import annotations

import itertools
import json
import os
import random
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_pairrm import PREFIXES, WORDS, write_tokenizer

from selm_jax.feedback.models import pairrm as module
from selm_jax.feedback.models.pairrm import PairRM, mean_wins, pairrm
from selm_jax.feedback.models.pairrm_inputs import conversation
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker, prompts_together
from selm_jax.models.config import UnsupportedModel
from selm_jax.parallel.mesh import make_mesh
from selm_jax.weights import deberta as weights
from selm_jax.weights.deberta import WeightsError
from selm_jax.weights.sources import SourceError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EIGHT = make_mesh((-1, 1, 1))
PAIRRM = "PairRM, tiny and random"  # heading of the summary's lines


# --- a tiny PairRM in the published layout ----------------------------------------------------


class TorchPairRM(torch.nn.Module):
    """`DebertaV2PairRM` with its parameter names, and the published recipe for its input."""

    def __init__(self, folder):
        super().__init__()
        size = write_tokenizer(folder / "tokenizer.json").get_vocab_size()
        self.config = transformers.DebertaV2Config(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, relative_attention=True, position_buckets=256,
            max_position_embeddings=512, pos_att_type="p2c|c2p", share_att_key=True,
            norm_rel_ebd="layer_norm", position_biased_input=False,
        )  # fmt: skip
        self.pretrained_model = transformers.DebertaV2Model(self.config)
        width = self.config.hidden_size
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(0.05), torch.nn.Linear(2 * width, width), torch.nn.Tanh(),
            torch.nn.Dropout(0.05), torch.nn.Linear(width, 1),
        )  # fmt: skip
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json")
        )
        self.prefix_ids = self.tokenizer.convert_tokens_to_ids(list(PREFIXES))
        torch.manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
        self.eval()

    def ids(self, source, first, second, longest=None, sizes=(1224, 412)) -> list[int]:
        """longest: length of the longest source of the batch, for LLM-Blender's own rule."""
        encode = self.tokenizer.encode
        s = encode(PREFIXES[0] + source, max_length=sizes[0], truncation=True)
        budget = sizes[1] + (sizes[0] - (longest or len(s))) // 2
        a, b = (
            encode(prefix + text, max_length=budget, truncation=True)
            for prefix, text in zip(PREFIXES[1:], (first, second), strict=False)
        )
        return s + a + b

    @torch.no_grad()
    def logit(self, ids: list[int]) -> float:
        hidden = self.pretrained_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        source, first, second = (hidden[ids.index(prefix)] for prefix in self.prefix_ids[:3])
        left, right = (self.head_layer(torch.cat([source, c])) for c in (first, second))
        return float((left - right).mean())

    def logits(self, pairs) -> np.ndarray:
        return np.array([self.logit(self.ids(*pair)) for pair in pairs])

    def save(self, folder):
        tensors = {k: v.numpy() for k, v in self.state_dict().items() if "position_ids" not in k}
        save_file(tensors, folder / "model.safetensors")
        own = {"n_tasks": 1, "drop_out": 0.05, "sep_token_id": 2} | dict(
            zip(
                ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"),
                self.prefix_ids,
                strict=True,
            )
        )
        (folder / "config.json").write_text(json.dumps(self.config.to_dict() | own))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairrm")
    model = TorchPairRM(folder)
    model.save(folder)
    model.folder = folder
    return model


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Uses one device; a separate test uses all eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_mesh", lambda *_: make_mesh((1, 1, 1), jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def ours(theirs) -> PairRM:
    return pairrm(str(theirs.folder), batch=16)


@pytest.fixture
def copy(theirs, tmp_path):
    """A copy of the model's folder, to be damaged."""
    for file in theirs.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def write_ranker_config(folder, **changes):
    ranker = {
        "ranker_type": "pairranker", "model_type": "deberta", "n_tasks": 1, "drop_out": 0.05,
        "model_name": "microsoft/deberta-v3-large", "source_maxlength": 1224,
        "candidate_maxlength": 412, "fp16": True, "cache_dir": None, "loss_type": "instructgpt",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(ranker | changes))


@pytest.fixture
def small_budgets(copy, monkeypatch):
    """The other layout, whose config.json has the budgets: 40 for the source, 16 and more."""
    monkeypatch.setattr(weights, "LARGE", weights.read_config(copy).encoder)
    write_ranker_config(copy, source_maxlength=40, candidate_maxlength=16)
    return copy


def text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices([*WORDS, "zebra", "quick"], k=words))


def close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, atol=atol)


# --- the same logits as in torch ---------------------------------------------------------------


def test_logits_are_those_of_torch(ours, theirs, parity):
    pairs = [
        ("hello!", "hi!", "get out"),
        ("", "", ""),
        (text(30), text(20, 1), text(21, 2)),
        ("a  b", " spaces before", "behind "),
        ("Ｆｕｌｌ width", "日本語 and émigré", "tab\tand\nnewline\x00 and \u202e"),
    ]
    found, expected = ours.logits(pairs), theirs.logits(pairs)
    close(found, expected)
    assert expected.std() > 0.1  # or the comparison would say little
    parity("PairRM", "short", np.abs(found - expected).max())


@pytest.mark.parametrize("total", [128, 129, 512, 513])
def test_logits_at_the_boundaries_of_buckets(ours, theirs, parity, total):
    """Rows of n tokens have distances up to n - 1: 127, 128, 511 and 512 are in here."""
    rest = total - 9  # [CLS] prefix ... [SEP] three times; every word is one token
    pair = (text(rest // 2), text(rest // 4, 1), text(rest - rest // 2 - rest // 4, 2))
    pair = tuple(t.replace("zebra", "the").replace("quick", "of") for t in pair)
    assert len(theirs.ids(*pair)) == total
    found, expected = ours.logits([pair]), theirs.logits([pair])
    close(found, expected)
    parity("PairRM", f"|i-j| {total - 1}", abs(found - expected).max())


@pytest.mark.parametrize("words", [(10, 2000, 30), (2000, 2000, 2000), (1500, 1, 700)])
def test_long_texts_are_cut_as_the_recipe_does(ours, theirs, parity, words):
    pair = tuple(text(n, seed) for seed, n in enumerate(words))
    assert 1000 < len(theirs.ids(*pair)) <= 2048
    found, expected = ours.logits([pair]), theirs.logits([pair])
    close(found, expected)
    parity("PairRM", "long", abs(found - expected).max())


def test_a_prefix_in_a_text_becomes_a_space(ours, theirs):
    clean = ("what is   it", "you   are", "no  ")
    hostile = ("what is<|source|> it", "you <|candidate2|>are", "no <|candidate1|>")
    close(ours.logits([hostile]), ours.logits([("what is  it", "you  are", "no  ")]), atol=0)
    # One that only the tokenizer's normalizer makes a prefix stands behind the real one.
    sly = ("＜|source|＞ what", "you ＜|candidate2|＞", "＜|candidate1|＞")
    assert theirs.ids(*sly).count(theirs.prefix_ids[0]) == 2
    close(ours.logits([clean, sly])[1:], [sly_logit(theirs, sly)])


def sly_logit(theirs, pair) -> float:
    """As `TorchPairRM.logit`, reading at the segments' second tokens."""
    segments = [
        theirs.tokenizer.encode(prefix + text)
        for prefix, text in zip(PREFIXES[:3], pair, strict=True)
    ]
    starts = np.cumsum([0, *map(len, segments)])[:3] + 1
    ids = torch.tensor([[i for segment in segments for i in segment]])
    with torch.no_grad():
        hidden = theirs.pretrained_model(ids).last_hidden_state[0]
        source, first, second = hidden[torch.tensor(starts)]
        left, right = (theirs.head_layer(torch.cat([source, c])) for c in (first, second))
    return float(left - right)


# --- budgets ----------------------------------------------------------------------------------

SOURCES = [text(n, n) for n in (3, 60, 12, 5, 25, 2, 9, 30, 4, 17)]
CANDIDATES = [[text(n + 2 * k, k) for k, n in enumerate((4, 50, 18))] for _ in SOURCES]


def test_per_row_budgets_do_not_depend_on_the_batch(small_budgets, theirs, tell):
    ranker = pairrm(str(small_budgets), batch=16)
    whole = ranker.matrices(SOURCES, CANDIDATES)
    for matrix, source, each in zip(whole, SOURCES, CANDIDATES, strict=True):
        for i, j in itertools.permutations(range(3), 2):
            ids = theirs.ids(source, each[i], each[j], sizes=(40, 16))
            assert matrix[i, j] == pytest.approx(theirs.logit(ids), abs=1e-4)
    worst = 0.0
    for seed in range(2):
        some = random.Random(seed).sample(range(len(SOURCES)), k=len(SOURCES) - seed)
        again = ranker.matrices([SOURCES[r] for r in some], [CANDIDATES[r] for r in some])
        worst = max(worst, *(np.abs(m - whole[r]).max() for m, r in zip(again, some, strict=True)))
    assert worst < 1e-5
    tell(PAIRRM, f"largest change of a logit with the rows beside it: {worst:.1e}")


def test_llm_blender_budgets_depend_on_eight_rows(small_budgets, theirs):
    ranker = pairrm(str(small_budgets), compat="llm_blender", batch=16)
    found = ranker.matrices(SOURCES, CANDIDATES)
    lengths = [min(40, len(theirs.tokenizer.encode(PREFIXES[0] + s))) for s in SOURCES]
    changed = 0
    for r, (source, each) in enumerate(zip(SOURCES, CANDIDATES, strict=True)):
        longest = max(lengths[r - r % 8 :][:8])
        for i, j in itertools.permutations(range(3), 2):
            ids = theirs.ids(source, each[i], each[j], longest, sizes=(40, 16))
            assert found[r][i, j] == pytest.approx(theirs.logit(ids), abs=1e-4)
            changed += ids != theirs.ids(source, each[i], each[j], sizes=(40, 16))
    assert changed  # or this would be the other rule


def test_llm_blender_is_asked_in_parts_of_eight_rows(small_budgets):
    blender = pairrm(str(small_budgets), compat="llm_blender")
    assert prompts_together(blender) == 8 and prompts_together(pairrm(str(small_budgets))) == 1
    whole = blender.matrices(SOURCES, CANDIDATES)

    def worst(size):
        cuts = (slice(i, i + size) for i in range(0, len(SOURCES), size))
        found = [m for cut in cuts for m in blender.matrices(SOURCES[cut], CANDIDATES[cut])]
        return max(np.abs(a - b).max() for a, b in zip(found, whole, strict=True))

    assert worst(8) < 1e-5
    assert worst(5) > 1e-3  # or it would not matter


def test_llm_blender_takes_sep_out_of_texts(small_budgets, theirs):
    pair = ("what [SEP] is", "you[SEP]are", "no")
    clean = tuple(t.replace("[SEP]", " ") for t in pair)
    close(pairrm(str(small_budgets)).logits([pair]), [theirs.logit(theirs.ids(*pair))])
    blender = pairrm(str(small_budgets), compat="llm_blender")
    close(blender.logits([pair]), [theirs.logit(theirs.ids(*clean))])


def test_what_was_cut_is_counted(small_budgets, theirs):
    ranker = pairrm(str(small_budgets))
    lengths = [
        [len(theirs.tokenizer.encode("<|source|>" + t)) for t in each] for each in CANDIDATES
    ]
    sources = [len(theirs.tokenizer.encode("<|source|>" + s)) for s in SOURCES]
    budgets = [16 + (40 - min(40, n)) // 2 for n in sources]
    expected = {
        "sources": 10,
        "sources_cut": sum(n > 40 for n in sources),
        "candidates": 30,
        "candidates_cut": sum(
            n > b for b, each in zip(budgets, lengths, strict=True) for n in each
        ),
        "comparisons": 60,
    }
    assert 0 < expected["sources_cut"] < 10 and 0 < expected["candidates_cut"] < 30
    for _ in range(2):  # the last call counts, not all of them
        ranker.scores([question(s) for s in SOURCES], CANDIDATES)
        assert ranker.report() == expected


# --- scores, ranks, comparisons ---------------------------------------------------------------


def question(prompt, messages=(), id="p0"):
    return Question(prompt=prompt, messages=tuple(messages), row={}, id=id)


def test_scores_are_the_mean_over_both_orders(ours, theirs):
    source, each = "what is it", ["you are", "they were here", "that"]
    found = ours.scores([question(source), question("x")], [each, ["alone"]])
    c = {
        (i, j): theirs.logit(theirs.ids(source, each[i], each[j]))
        for i, j in itertools.permutations(range(3), 2)
    }
    close(found[0], [sum(c[i, j] - c[j, i] for j in range(3) if j != i) / 3 for i in range(3)])
    assert found[1].tolist() == [0.0]
    assert found[0].dtype == np.float64
    assert ours.scores([], []) == []
    assert [s.tolist() for s in ours.scores([question("x")], [[]])] == [[]]


def test_equal_texts_have_equal_scores(ours):
    each = ["you are", "that", "you are", "they", "that"]
    scores = ours.scores([question("what is it")], [each])[0]
    assert scores[0] == scores[2] and scores[1] == scores[4]
    assert ours.report()["comparisons"] == 6 + 2  # three texts in pairs, two beside themselves
    assert ours.ranks(["what is it"], [each])[0].tolist().count(1) in (1, 2)


def test_compare_in_its_three_modes(ours, theirs):
    sources, a, b = ["what", "is it"], ["you", "that was"], ["they", "this"]
    forth = theirs.logits(zip(sources, a, b, strict=True))
    back = theirs.logits(zip(sources, b, a, strict=True))
    close(ours.compare(sources, a, b, mode="[A,B]"), forth)
    close(ours.compare(sources, a, b, mode="[B,A]"), back)
    both = ours.compare(sources, a, b)
    close(both, forth - back)
    np.testing.assert_array_equal(ours.compare(sources, b, a), -both)
    scores = np.array(ours.scores([question(s) for s in sources], list(zip(a, b, strict=True))))
    close(scores[:, 0] - scores[:, 1], both, atol=1e-6)
    assert ours.compare([], [], []).shape == (0,) == ours.logits([]).shape
    with pytest.raises(FeedbackError, match=r"mode is '\[A,B\]\+'; did you mean"):
        ours.compare(sources, a, b, mode="[A,B]+")


MATRICES = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=n, max_size=n
    ).map(lambda rows: np.array(rows, float) * (1 - np.eye(n)))
)


class Table(PairRM):
    """The rules without the model: logits are looked up in a matrix, texts are row numbers."""

    def __init__(self, matrices):
        self._matrices = matrices

    def _encode(self, sources, candidates, beside):
        return [SimpleNamespace(candidates=each) for each in candidates]

    def _logits(self, rows, pairs):
        return np.array([self._matrices[p.row][p.first, p.second] for p in pairs], float)


@settings(deadline=None)
@given(MATRICES)
def test_ranks_are_the_places_in_the_sorted_scores(matrix):
    n = len(matrix)
    scores = [sum(matrix[i, j] - matrix[j, i] for j in range(n)) / n for i in range(n)]
    np.testing.assert_allclose(mean_wins(matrix), scores, atol=1e-12)
    table = Table([matrix])
    (found,) = table.ranks([""], [[str(i) for i in range(n)]])
    order = sorted(mean_wins(matrix), reverse=True)
    assert found.tolist() == [order.index(score) + 1 for score in mean_wins(matrix)]


@settings(deadline=None)
@given(st.lists(MATRICES, min_size=1, max_size=4), st.none() | st.integers(0, 9))
def test_best_of_is_one_bubble_pass(matrices, seed):
    candidates = [[str(i) for i in range(len(m))] for m in matrices]
    found = Table(matrices).best_of([""] * len(matrices), candidates, seed)
    rng = np.random.default_rng(seed)
    for m, best in zip(matrices, found, strict=True):
        order = list(range(len(m))) if seed is None else rng.permutation(len(m)).tolist()
        left = order[0]
        for right in order[1:]:
            left = left if m[left, right] - m[right, left] > 0 else right
        assert best == left
    assert Table(matrices).best_of([""] * len(matrices), candidates, seed) == found


def test_best_of_agrees_with_ranks_where_nothing_goes_in_a_circle():
    strength = np.array([0.3, 2.0, -1.0, 1.2])
    table = Table([strength[:, None] - strength[None]])
    assert [table.best_of([""], ["0123"], seed) for seed in (None, 0, 1, 2)] == [[1]] * 4
    assert table.ranks([""], ["0123"])[0].tolist() == [3, 1, 4, 2]
    with pytest.raises(FeedbackError, match="source 0 has no candidates"):
        table.best_of([""], [[]])


def test_best_of_reads_the_texts(ours):
    sources, each = ["what is it", "for you"], [["that", "this", "they"], ["as", "be"]]
    by_matrix = Table(ours.matrices(sources, each)).best_of(sources, each)
    assert ours.best_of(sources, each) == by_matrix


# --- conversations ----------------------------------------------------------------------------


def turn(role, content):
    return SimpleNamespace(role=role, content=content)


def test_one_turn_is_read_as_it_is():
    assert conversation(question("Q"), ["a"]) == ("Q", ["a"])
    alone = question("Q", [turn("system", "Be kind."), turn("user", "Q")])
    assert conversation(alone, ["a", "b"]) == ("Q", ["a", "b"])


def test_several_turns_are_put_as_llm_blender_puts_them():
    asked = question("Q2", [turn("user", "Q1"), turn("assistant", "A1"), turn("user", "Q2")])
    source, candidates = conversation(asked, ["x", "y"])
    assert source == (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your "
        "response.USER: Q1\nAssistant: <Response 1>\nUSER: Q2\nAssistant: <Response 2>"
    )
    assert candidates == ["<Response 1>: A1\n<Response 2>: x", "<Response 1>: A1\n<Response 2>: y"]


@pytest.mark.parametrize(
    "roles", [["user", "user"], ["user", "assistant"], ["assistant", "user"], ["user", "tool"]]
)
def test_turns_that_do_not_alternate_are_refused(roles):
    with pytest.raises(FeedbackError, match="'p7'.*user and assistant in turn"):
        conversation(question("Q", [turn(role, "x") for role in roles], id="p7"), ["a"])


# --- devices and types ------------------------------------------------------------------------


def test_eight_devices_give_what_one_gives(theirs, ours, monkeypatch):
    monkeypatch.setattr(module, "make_mesh", lambda *_: EIGHT)
    many = pairrm(str(theirs.folder), batch=1)
    pairs = [(text(n), text(n + 1, 1), text(n + 2, 2)) for n in range(3, 14)]
    close(many.logits(pairs), ours.logits(pairs), atol=1e-5)


def test_bfloat16_ranks_as_float32_does(theirs, ours, tell):
    half = pairrm(str(theirs.folder), dtype="bfloat16", batch=32)
    kinds = {str(x.dtype) for x in jax.tree.leaves(half._params)}
    assert kinds == {"bfloat16", "float32"}
    sources = [text(6, seed) for seed in range(48)]
    each = [[text(5, 100 * k + seed) for k in range(4)] for seed in range(48)]
    wide, narrow = ours.matrices(sources, each), half.matrices(sources, each)
    scores = [(mean_wins(a), mean_wins(b)) for a, b in zip(wide, narrow, strict=True)]
    order = [
        (a[i] > a[j]) == (b[i] > b[j])
        for a, b in scores
        for i, j in itertools.combinations(range(4), 2)
    ]
    best = np.mean([np.argmax(a) == np.argmax(b) for a, b in scores])
    error = np.abs(np.array(wide) - np.array(narrow)).max() / np.std(wide)
    tell(
        PAIRRM,
        f"bfloat16 against float32: {np.mean(order):.1%} of {len(order)} pairs ordered alike, "
        f"{best:.1%} of 48 best ones the same, largest error {error:.3f} standard deviations",
    )
    assert np.mean(order) >= 0.9 and best >= 0.8


# --- folders ----------------------------------------------------------------------------------


def test_it_is_a_ranker_by_name(theirs):
    ranker = build_ranker(
        "pairrm", folder=str(theirs.folder), compat="llm_blender", dtype="float32"
    )
    assert ranker.name == "pairrm"
    assert ranker.scores([question("what")], [["a", "b"]])[0].shape == (2,)


def test_both_layouts_are_the_same_model(ours, copy, monkeypatch):
    monkeypatch.setattr(weights, "LARGE", weights.read_config(copy).encoder)
    write_ranker_config(copy)
    pairs = [("what", "you", "they")]
    np.testing.assert_array_equal(pairrm(str(copy)).logits(pairs), ours.logits(pairs))


def test_a_tokenizer_without_the_prefixes_is_given_them(ours, copy):
    write_tokenizer(copy / "tokenizer.json", prefixes=())
    pairs = [("what is it", "you are", "they")]
    np.testing.assert_array_equal(pairrm(str(copy)).logits(pairs), ours.logits(pairs))


def test_the_published_layout_means_deberta_v3_large(copy):
    write_ranker_config(copy)
    config = weights.read_config(copy)
    assert config.encoder == weights.LARGE and config.prefix_ids is None
    assert (config.source_tokens, config.candidate_tokens) == (1224, 412)
    with pytest.raises(WeightsError, match=r"(?s)layer.2.*missing|missing.*layer.2"):
        weights.load(copy, config.encoder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranker_type": "summareranker"}, "ranker_type is 'summareranker'"),
        ({"model_name": "roberta-large"}, "model_name is 'roberta-large'"),
    ],
)
def test_another_ranker_is_refused(copy, change, said):
    write_ranker_config(copy, **change)
    with pytest.raises(UnsupportedModel, match=said):
        pairrm(str(copy))


def test_a_config_that_is_not_pairrms_is_refused(copy):
    hf = json.loads((copy / "config.json").read_text())
    del hf["source_prefix_id"]
    (copy / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UnsupportedModel, match="source_prefix_id.*missing"):
        pairrm(str(copy))
    (copy / "config.json").write_text(json.dumps(hf | {"n_tasks": 1, "norm_rel_ebd": "none"}))
    with pytest.raises(UnsupportedModel, match="config.json.*norm_rel_ebd"):
        pairrm(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        pairrm(str(copy))


def test_tensors_that_do_not_fit_are_listed(copy):
    tensors = load_file(copy / "model.safetensors")
    gone, wrong = "head_layer.4.bias", "pretrained_model.encoder.layer.1.output.dense.weight"
    del tensors[gone]
    tensors[wrong] = tensors[wrong].T.copy()
    save_file(tensors | {"extra.weight": np.zeros(2, np.float32)}, copy / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        pairrm(str(copy))
    message = str(caught.value)
    assert f"missing: {gone}" in message and "unknown: extra.weight" in message
    assert (
        f"{wrong}: F32 of shape (48, 32), but config.json implies floats of shape (32, 48)"
        in message
    )


def test_a_table_of_positions_from_old_transformers_is_no_parameter(ours, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["pretrained_model.embeddings.position_ids"] = np.arange(512)[None]
    save_file(tensors, copy / "model.safetensors")
    pairs = [("what", "you", "they")]
    np.testing.assert_array_equal(pairrm(str(copy)).logits(pairs), ours.logits(pairs))


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"is there \(pickled weights.*not read"):
        pairrm(str(copy))


def test_a_tokenizer_that_does_not_fit_is_refused(copy):
    hf = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(hf | {"cand1_prefix_id": 5}))
    with pytest.raises(FeedbackError, match=r"tokenizer\.json gives the prefix tokens the ids"):
        pairrm(str(copy))
    (copy / "config.json").write_text(json.dumps(hf))
    write_tokenizer(copy / "tokenizer.json", prefixes=("more", *PREFIXES))
    with pytest.raises(FeedbackError, match="gives the prefix tokens the ids|token ids up to"):
        pairrm(str(copy))
    (copy / "tokenizer.json").rename(copy / "tokenizer_config.json")
    with pytest.raises(FeedbackError, match=r"tokenizer\.json is missing. Take it from"):
        pairrm(str(copy))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"compat": "per_raw"}, "compat is 'per_raw'; did you mean 'per_row'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": True}, "batch is True"),
    ],
)
def test_settings_are_checked_before_anything_is_read(setting, said):
    with pytest.raises(FeedbackError, match=said):
        pairrm("/nowhere", **setting)


# --- the real weights -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> PairRM:
    folder = os.environ.get("SELM_PAIRRM")
    if not folder:
        pytest.skip("SELM_PAIRRM is not set: it names a folder with PairRM's weights")
    return pairrm(folder, dtype="float32")


def test_the_published_logits(real):
    """LLM-Blender's README and the model card, mode [A,B], float32."""
    found = real.logits(
        [
            ("hello!", "hi!", "f**k off!"),
            ("I love you!", "I hate you!", "I love you, too!"),
        ]
    )
    np.testing.assert_allclose(found, [1.9003021717071533, -1.2547134160995483], atol=1e-4)


def test_the_published_ranks(real):
    found = real.ranks(
        ["hello, how are you!", "I love you!"],
        [
            ["get out!", "hi! I am fine, thanks!", "bye!"],
            ["I love you too!", "I hate you!", "Thanks! You're a good guy!"],
        ],
    )
    assert [ranks.tolist() for ranks in found] == [[3, 1, 2], [1, 3, 2]]
