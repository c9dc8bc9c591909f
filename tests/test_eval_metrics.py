"""The metrics, on texts small enough to compute by hand."""

import math
from types import SimpleNamespace

import pytest

from counsel.errors import UserError
from eval.ask import likelihood_fields
from eval.contamination import Contamination, nearest_rows
from eval.likelihood import Renderer, Span, bits_per_byte, span_nll
from eval.overlap import bleu, chrf, meteor, rouge
from eval.questions import Question
from eval.requests import Outcome
from eval.samples import failed
from eval.scoring import CANNED, answer_scores, human_scores, score_rows
from eval.similarity import Encoder, greedy_match, to_references
from eval.summary import by_topic, paired, summarize_arms
from eval.text_stats import Copying, distinct, distinct_over, reading_grade, words
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """MiniLM, loaded once."""
    return Encoder()


def test_rouge_by_hand() -> None:
    """`the cat sat` on `the cat ran`: two of three words, one of two pairs, a common sequence of two."""
    assert rouge("the cat sat", ["a dog", "the cat ran"]) == {
        "rouge_1": pytest.approx(2 / 3),
        "rouge_2": pytest.approx(1 / 2),
        "rouge_l": pytest.approx(2 / 3),
    }
    assert rouge("...", ["the cat"])["rouge_1"] == 0


def test_bleu_by_hand() -> None:
    """Seven words, six of them right: precisions 6/7, 5/6, 4/5, 3/4, no brevity penalty."""
    expected = (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25

    assert bleu("the cat sat on the mat today", ["the cat sat on the mat"]) == pytest.approx(expected)


def test_chrf_by_hand() -> None:
    """`abc` on `abd`: character 1-, 2-, 3-grams match 2/3, 1/2, 0; the mean is F, as precision equals recall."""
    assert chrf("abc", ["abd"]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_meteor_matches_stems_but_not_synonyms() -> None:
    """All three words match by stem, in one chunk: 1 - 0.5 * (1/3) ** 3. A synonym matches nothing."""
    assert meteor("the cats sat", ["the cat sat"]) == pytest.approx(1 - 0.5 * (1 / 3) ** 3)
    assert meteor("glad", ["happy"]) == 0


def test_words_keep_inner_apostrophes_only() -> None:
    """Straight and curly apostrophes are equal; underscores separate words, digits belong to them."""
    assert words("Don't 'worry'. It’s 2nd_try") == ["don't", "worry", "it's", "2nd", "try"]


def test_distinct_by_hand() -> None:
    """`a b a b` has pairs ab, ba, ab: two of three are distinct. A text that is too short has no value."""
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) is None
    assert distinct_over(["a b", "a b"], 2, budget=4) == pytest.approx(2 / 3)
    assert distinct_over(["a b"], 2, budget=4) is None


def test_one_reply_for_everyone_is_not_diverse() -> None:
    """500 answers `one two`: two of 999 word pairs are distinct, in any order of rows; 499 answers are too few."""
    rows = [{"arm": "a", "question_id": f"{i:03}", "sample": 0, "text": "one two", "scores": {}} for i in range(500)]

    def diversity(scores: list[dict]) -> float | None:
        return summarize_arms(["a"], "a", [], scores, [], seed=0)["a"]["diversity"]

    assert diversity(rows) == pytest.approx(2 / 999)
    assert diversity(rows[1:]) is None
    rows[0]["text"] = "three four"
    assert diversity(rows) == diversity(rows[::-1]) == pytest.approx(4 / 999)
    again = [row | {"sample": 1, "text": f"other {at}"} for at, row in enumerate(rows)]
    assert diversity(rows + again) == diversity(rows)  # --samples changes nothing


def test_reading_grade_by_hand() -> None:
    """Six words of one syllable in one sentence: 0.39 * 6 + 11.8 - 15.59."""
    assert reading_grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 - 15.59)
    assert reading_grade("!") is None


def test_copying_counts_words_in_runs_of_eight() -> None:
    """Training has eight of ten words as one run; a run of seven does not count."""
    copying = Copying(["one two three four five six seven eight nine"])

    assert copying.share("One two three four five six seven eight, x y") == pytest.approx(8 / 10)
    assert copying.share("one two three four five six seven x y z") == 0
    assert copying.share("one two") is None


def test_only_the_answers_tokens_count_in_the_likelihood() -> None:
    """Prompt tokens are ignored, whatever their probability; nats and bits per byte by hand."""
    span = Span([5, 6, 7, 8], 2, "answer")
    returned = [
        None,
        {"6": {"logprob": -50.0}},
        {"7": {"logprob": -1.0}},
        {"8": {"logprob": -2.0}, "9": {"logprob": 0.0}},
    ]

    nll = span_nll(span, returned)

    assert nll == 3.0
    assert bits_per_byte(nll, 6) == pytest.approx(0.5 / math.log(2))


def test_minus_infinity_is_an_error_not_a_number() -> None:
    """vLLM writes minus infinity as -9999, which would dominate the sum."""
    with pytest.raises(UserError, match="no probability"):
        span_nll(Span([1, 2], 1, "a"), [None, {"2": {"logprob": -9999.0}}])


def test_a_token_without_probability_fails_its_own_row() -> None:
    """Whatever the server sends, the row has an error and is asked again; the evaluation continues."""
    for sent in ([None, {"2": {"logprob": -9999.0}}], [None, {"2": {"logprob": float("nan")}}], [None, None], None):
        choice = SimpleNamespace() if sent is None else SimpleNamespace(prompt_logprobs=sent)
        response = SimpleNamespace(choices=[choice])
        row = likelihood_fields("a", Span([1, 2], 1, "a"), Outcome(response, None, 1, 0.1))

        assert row["nll_nats"] is None
        assert failed(row), sent


def test_the_answers_span_is_the_answer(tmp_path) -> None:
    """The ids from `start` decode to the answer, and exactly one <bos> precedes it."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "i feel lonely"}]

    span = Renderer(tmp_path).span(messages, "talk to a friend")

    assert tokenizer.decode(span.ids[span.start :]) == "talk to a friend"
    assert span.ids.count(tokenizer.bos_token_id) == 1


def test_similarity_is_that_of_sentence_transformers(encoder: Encoder) -> None:
    """For texts that fit the encoder, the cosine is that of the library."""
    from sentence_transformers import SentenceTransformer, util

    texts = ["I feel lonely since we moved.", "Moving away can leave you feeling alone.", "The train leaves at nine."]
    theirs = SentenceTransformer(encoder.folder.as_posix(), device="cpu").encode(texts)
    ours = encoder.encode(texts)

    cosines = [float(util.cos_sim(theirs[0], theirs[i])) for i in (1, 2)]
    assert to_references(ours[0], ours[1:]) == pytest.approx((max(cosines), sum(cosines) / 2), abs=1e-4)


def test_the_end_of_a_long_answer_counts(encoder: Encoder) -> None:
    """Texts that differ only after 300 words have different vectors; with truncation they would be equal."""
    opening = "It is hard to move to a new town and start over. " * 30
    one, other = encoder.encode([opening + "Try to sleep." * 20, opening + "Buy a red tractor." * 20])

    assert float(one.text @ other.text) < 0.999


def test_greedy_match_compares_word_pieces_only(encoder: Encoder) -> None:
    """By hand from BERT's last layer without [CLS] and [SEP]: unrelated texts are far apart."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["You are not alone.", "The train leaves at nine."]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder.folder), AutoModel.from_pretrained(encoder.folder).eval()
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1] for text in texts]
    one, other = (torch.nn.functional.normalize(state, dim=-1) for state in states)
    cosines = one @ other.T
    precision, recall = float(cosines.max(1).values.mean()), float(cosines.max(0).values.mean())
    ours = encoder.encode(texts)

    assert [len(each.tokens) for each in ours] == [len(one), len(other)]
    assert greedy_match(ours[0], ours[1:]) == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-4)


def test_greedy_match_is_one_for_equal_texts(encoder: Encoder) -> None:
    """A text matches itself fully and another text less."""
    same, other = encoder.encode(["You are not alone.", "The train leaves at nine."])

    assert greedy_match(same, [other, same]) == pytest.approx(1.0, abs=1e-5)
    assert greedy_match(same, [other]) < 0.9


LONELY = Question("q1", "I feel lonely since we moved house.", "moving", (
    "Moving can be lonely. Call an old friend and join one club near you this month.",
    "It takes time to feel at home. Say hello to neighbors, and keep in touch with old friends.",
))  # fmt: skip
SLEEP = Question(
    "q2", "I cannot sleep before my exams.", "sleep", ("Keep a fixed bedtime and put the phone away early.",)
)
TRAIN = [{"question": "We moved and I feel alone", "answer": "Join a club near your new house."},
         {"question": "How do I stop smoking?", "answer": "Set a date and tell people."}]  # fmt: skip


def test_yardsticks_have_the_expected_order(encoder: Encoder) -> None:
    """Human is above the floor, echo is most similar to the question, retrieval finds the similar question."""
    rows = score_rows([], [LONELY, SLEEP], TRAIN, encoder, progress=lambda _: None)
    of = {(row["arm"], row["question_id"]): row for row in rows}

    assert of["human", "q1"]["scores"] == human_scores(LONELY, encoder)
    assert ("human", "q2") not in of  # one answer cannot be scored against others
    assert of["human", "q1"]["scores"]["similarity_max"] > of["shuffled", "q1"]["scores"]["similarity_max"]
    assert of["shuffled", "q1"]["text"] == SLEEP.answers[0]
    assert of["echo", "q1"]["scores"]["question_similarity"] == pytest.approx(1.0)
    assert of["retrieval", "q1"]["text"] == "Join a club near your new house."
    assert of["canned", "q2"]["text"] == CANNED


def test_errors_and_empty_answers_have_no_scores(encoder: Encoder) -> None:
    """Failed and empty rows are kept, with scores null instead of 0."""
    common = {"arm": "base", "question_id": "q1", "finish_reason": None}
    samples = [
        {**common, "sample": 0, "text": "", "error": "APITimeoutError"},
        {**common, "sample": 1, "text": "", "error": None},
    ]

    rows = score_rows(samples, [LONELY, SLEEP], TRAIN, encoder, progress=lambda _: None)

    assert [row["scores"] for row in rows[:2]] == [None, None]


def test_an_answer_identical_to_a_reference_has_full_marks(encoder: Encoder) -> None:
    """Every reference metric reaches 1 (METEOR its own maximum, a little less)."""
    scores = answer_scores(LONELY.answers[0], LONELY.question, LONELY.answers, encoder)

    for name in ("similarity_max", "greedy_match", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf"):
        assert scores[name] == pytest.approx(1.0, abs=1e-5), name
    assert scores["meteor"] > 0.99


def test_contamination_is_found_with_its_reason() -> None:
    """An answer from training, a question that repeats a training question, and a new one."""
    training = Contamination([{"question": "I feel so lonely since we moved to the city", "answer": "Join a club."}])

    assert training.reason("Something else entirely, my friend, today", ["join a CLUB"]) == "answer"
    assert training.reason("Help: I feel so lonely since we moved to the city", ["x"]) == "question"
    assert training.reason("I feel angry at my boss every day at work", ["x"]) is None
    assert nearest_rows(TRAIN, ["smoking"])[0]["answer"] == "Set a date and tell people."


def test_wins_are_on_the_better_side_and_holm_covers_the_whole_family() -> None:
    """Fewer bits per byte on four questions of five are four wins; p is times four, one for each primary metric."""
    rows = [
        {
            "arm": arm,
            "question_id": f"q{n}",
            "answer": 0,
            "nll_nats": 9.0 - gain * (arm == "one"),
            "tokens": 9,
            "bytes": 10,
        }
        for arm in ("base", "one")
        for n, gain in enumerate((1.0, 2.0, 3.0, 4.0, -0.5))
    ]
    found = {row["metric"]: row for row in paired([], rows, [("one", "base")], seed=0)}["bits_per_byte"]

    assert (found["wins"], found["ties"], found["losses"]) == (4, 0, 1)
    assert found["p"] == 4 / 32  # all one way, or the smallest the other way, and both mirrored
    assert found["p_holm"] == pytest.approx(4 * 4 / 32)


def test_arms_are_compared_on_the_answers_that_both_predicted() -> None:
    """Two arms that predict alike; a long answer, cheaper by the byte, was too long for one of them: no difference."""
    rows = [
        {"arm": arm, "question_id": f"q{n}", "answer": answer, "nll_nats": nats, "tokens": 9, "bytes": size}
        for arm in ("base", "few-shot")
        for n in range(5)
        for answer, size, nats in ((0, 10, 7.0 + n), (1, 100, 35.0 if arm == "base" else None))
    ]
    found = {row["metric"]: row for row in paired([], rows, [("few-shot", "base")], seed=0)}

    assert (found["bits_per_byte"]["value"], found["bits_per_byte"]["ties"]) == (0.0, 5)


def test_a_topic_needs_enough_questions_per_arm() -> None:
    """A topic of six questions, of which one arm has five and another one: the first has a value, the second none."""
    topics = {f"q{n}": "work" for n in range(6)}
    rows = [
        {"arm": arm, "question_id": f"q{n}", "sample": 0, "scores": {"similarity_max": 0.5 + n / 10}}
        for arm, n in (*(("one", n) for n in range(5)), ("two", 0))
    ]
    found = by_topic(["one", "two"], topics, rows, [], seed=0)["work"]

    assert (found["one"]["similarity_max"]["n"], found["two"]) == (5, {})
