"""Crisis detection: normalisation, what is judged, the shipped model and its card, and `eval safety`."""

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from counsel.errors import UserError
from counsel.minilm import load_minilm
from counsel.safety.augment import varied
from counsel.safety.classifier import read_classifier
from counsel.safety.corpus import DATA, read_messages
from counsel.safety.detector import CARD, MODEL, Detector, discounted, flags
from counsel.safety.labels import LABELS, NONE
from counsel.safety.measure import Judged, detection_figures
from counsel.safety.normalize import normalize
from counsel.safety.policy import Policy
from counsel.safety.units import PASSAGE_WORDS, WINDOW_TURNS, conversation_units
from eval.__main__ import main

PLAIN = "I want to kill myself"


@pytest.fixture(scope="module")
def detector():
    return Detector.load()


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("i wanna KMS", "i want to kill myself"),
        ("s u i c i d e", "suicide"),
        ("k*ll my\u200bself", "kill myself"),
        ("su1c1d3", "suicide"),
        ("thinking of unaliving myself", "thinking of killing myself"),
        ("sewer slide", "suicide"),
        ("I don\u2019t", "i don't"),
        ("wana kil myslef", "want to kill myself"),
        # Numbers, versions and shell scripts stay what they are.
        ("2 kids, 4 cats, v2.5, html5", "2 kids, 4 cats, v2.5, html5"),
        ("run the sh script", "run the sh script"),
        ("a b c d", "a b c d"),
        ("", ""),
    ],
)
def test_hidden_words_become_plain(written, plain):
    assert normalize(written) == plain


def test_the_parts_of_the_corpus_share_no_voice_and_no_message():
    parts = [read_messages(folder.name) for folder in sorted(DATA.iterdir()) if folder.is_dir()]

    assert sum(map(len, parts)) >= 2000
    for one, other in itertools.combinations(parts, 2):
        assert not {row.voice for row in one} & {row.voice for row in other}
        assert not {normalize(row.text) for row in one} & {normalize(row.text) for row in other}
    assert all({row.label for row in rows} == set(LABELS) for rows in parts)


@pytest.mark.parametrize("words", [1, 7, PASSAGE_WORDS, 1000])
def test_a_long_message_is_cut_into_passages_that_lose_no_word(words):
    text = " ".join(["and then she", "left.", *map(str, range(words)), "i stayed!"])
    units = conversation_units([text])

    assert " ".join(unit.text for unit in units) == text
    assert all(len(unit.text.split()) <= PASSAGE_WORDS for unit in units)
    assert {unit.siblings for unit in units} == {len(units)}


@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_one_sentence_of_a_long_message_is_found(detector, at):
    around = ["My boss moved my desk again.", "The printer is broken too.", "We had soup and watched the game."] * 25
    around.insert(int(at * len(around)), "I keep thinking about killing myself.")

    assert detector.assess([" ".join(around)]).label != NONE


@pytest.mark.parametrize("turns", [[], [""], [" \n "], ["?!"], ["\u200b"], ["🙂"], ["x" * 100_000], ["hm. " * 20_000]])
def test_any_text_is_judged(detector, turns):
    assessment = detector.assess(turns)

    assert (assessment.label, assessment.trigger) == (NONE, None)
    assert sum(assessment.scores.values()) == pytest.approx(1)


def test_the_turn_that_decides_is_named_until_it_leaves_the_window(detector):
    said = ["hello", PLAIN, *["I had soup for lunch"] * (WINDOW_TURNS - 1)]

    assert (detector.assess(said[:2]).trigger, detector.assess(said[:-1]).trigger) == (1, 1)
    assert detector.assess(said).trigger == 1
    assert detector.assess([*said, "and tea"]).label == NONE


def test_an_assessment_does_not_depend_on_what_was_judged_before(detector):
    fresh = Detector.load()
    for turns in (["thanks"], [PLAIN], ["thanks", PLAIN], ["my code died"]):
        first, again = detector.assess(turns), fresh.assess(turns)
        assert first.label == again.label
        assert first.scores == pytest.approx(again.scores, abs=1e-4)


def test_the_shipped_detector_may_serve(detector):
    detector.check()


def test_the_shipped_detector_is_small():
    assert MODEL.stat().st_size < 1_500_000


def test_the_wider_the_sum_the_surer_it_must_be():
    thresholds = {"urgent": 0.3, "own": 0.5, "any": 0.7}
    rows = [
        [0.1, 0.1, 0.1, 0.0, 0.0],
        [0.0, 0.0, 0.29, 0.1, 0.1],
        [0.1, 0.0, 0.1, 0.3, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.6],
        [0.0, 0.0, 0.0, 0.0, 0.7],
    ]

    assert flags(np.array(rows), thresholds).tolist() == [True, False, True, False, True]


def test_the_policys_thresholds_replace_the_cards(detector):
    said = ["I'm tired of Mondays"]
    assert detector.assess(said).label == NONE

    for name in ("urgent", "own", "any"):
        policy = Policy(**{f"threshold_{name}": 0.0})
        assert Detector(detector._reader, detector.card, policy.thresholds).assess(said).label != NONE
    strict = Policy(threshold_urgent=1.0, threshold_own=1.0, threshold_any=1.0)
    assert Detector(detector._reader, detector.card, strict.thresholds).assess([PLAIN]).label == NONE


def test_the_updates_are_added_to_the_encoders_weights(detector):
    """Against the product worked out apart, for a layer of each shape."""
    updates = read_classifier(MODEL).updates
    _, plain = load_minilm()
    for module, number in (("attention.self.value", 0), ("intermediate.dense", 3), ("output.dense", 5)):
        up, down = updates.up[module][number], updates.down[module][number]
        expected = plain.encoder.layer[number].get_submodule(module).weight.detach().numpy().astype(np.float64)
        expected = expected + up.astype(np.float64) @ down.astype(np.float64)
        found = detector._reader._tuned._model.encoder.layer[number].get_submodule(module).weight.detach().numpy()
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_odds_of_a_passage_shrink_with_their_number():
    """Odds of 4 to 1 among 16 passages are 4 / 16 ** 1.25 = 1 to 8; a text alone stays as it is."""
    row = [0.4, 0.2, 0.1, 0.1, 0.0, 0.2]
    alone, among = discounted(np.array([row, row]), [1, 16])

    assert alone == pytest.approx(row)
    assert among == pytest.approx([1 / 18, 1 / 36, 1 / 72, 1 / 72, 0.0, 8 / 9])


def test_a_message_at_risk_is_never_cut_when_it_is_varied():
    """Of digits and one line, nothing is mistyped or left out."""
    seen = {varied("12 34", False, ["56 78", "9"], random.Random(seed)) for seed in range(300)}

    assert all("12 34" in text for text in seen)
    assert any(text.endswith("9") and "56" in text for text in seen)
    assert "12 34" in seen


def test_a_safe_message_is_varied_to_some_of_its_sentences():
    seen = {varied("1 1. 2 2. 3 3.", True, ["0"], random.Random(seed)) for seed in range(300)}

    assert {"1 1.", "2 2. 3 3.", "1 1. 2 2. 3 3."} <= seen
    assert "1 1. 3 3." not in seen


def test_a_card_below_its_bound_refuses(detector):
    for part, name, change in [
        ("recall", "active", {"low": 0.79}),
        ("recall", "imminent", {"low": 0.5}),
        ("false_positives", "all", {"value": 0.2}),
    ]:
        card = json.loads(json.dumps(detector.card))
        card[part][name] |= change
        with pytest.raises(UserError, match=r"python -m counsel\.safety\.build"):
            Detector(detector._reader, card).check()


def test_a_model_that_the_card_was_not_measured_on_is_refused(tmp_path):
    shutil.copy(MODEL, tmp_path)
    with pytest.raises(UserError, match=r"card\.json"):
        Detector.load(tmp_path)

    card = json.loads(CARD.read_text())
    (tmp_path / CARD.name).write_text(json.dumps(card | {"model_sha256": "0" * 64}))
    with pytest.raises(UserError, match="another model"):
        Detector.load(tmp_path)

    (tmp_path / CARD.name).write_text(json.dumps(card | {"encoder_sha256": "0" * 64}))
    with pytest.raises(UserError, match="another MiniLM encoder"):
        Detector.load(tmp_path)

    (tmp_path / MODEL.name).write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a crisis detector"):
        Detector.load(tmp_path)


def test_shares_have_exact_bounds():
    """19 of 20: Clopper-Pearson gives 0.751 to 0.999 (tables of the binomial distribution)."""
    rows = [Judged("active", "a", "passive")] * 19 + [Judged("active", "a", NONE)] + [Judged(NONE, "b", NONE)] * 3

    cell = detection_figures(rows)["recall"]["active"]
    assert (cell["value"], cell["hits"], cell["n"]) == (0.95, 19, 20)
    assert (cell["low"], cell["high"]) == pytest.approx((0.7513, 0.9987), abs=1e-4)
    assert detection_figures(rows)["same_class"]["active"]["hits"] == 0
    assert detection_figures(rows)["false_positives"]["b"]["hits"] == 0


def test_other_peoples_files_are_measured(tmp_path, capsys):
    csv = tmp_path / "prompts.csv"
    csv.write_text(f"prompt,category\n{PLAIN},si\nHow do I kill a process?,safe\nwhatever,odd\n")
    misses = tmp_path / "misses.jsonl"
    words = ["safety", str(csv), "--text", "prompt", "--label", "category", "--labels", "si=active,safe=none"]

    assert main([*words, "--misses", str(misses)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["left_out"] == {"odd": 1}
    assert document["rubric"] == {"recall of active >= 0.95": True, "false positives, all <= 0.05": True}
    assert misses.read_text() == ""

    # The same messages with the labels swapped: everything is wrong, and it says so.
    assert main([*words[:-1], "si=none,safe=active", "--misses", str(misses)]) == 3
    assert len(misses.read_text().splitlines()) == 2

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": ["hi", PLAIN], "label": "passive"}) + "\n")
    assert main(["safety", str(rows)]) == 4


def test_wrong_columns_and_labels_are_named(tmp_path, capsys):
    csv = tmp_path / "prompts.csv"
    csv.write_text("prompt,category\nhello,safe\n")
    for words, said in [
        ([], "no 'label'"),
        (["--label", "category"], "map them with --labels"),
        (["--label", "category", "--labels", "safe=fine"], "safe=fine"),
        (["--label", "category", "--labels", "safe=none"], "no 'text'"),
    ]:
        assert main(["safety", str(csv), *words]) == 1
        assert said in capsys.readouterr().err


def test_the_package_is_light_at_import():
    heavy = "('torch', 'transformers', 'sklearn')"
    probe = f"import sys, counsel.safety.detector; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True
    )
    assert done.stdout.strip() == "[]"


def test_keeping_texts_never_grows_without_end(detector, monkeypatch):
    monkeypatch.setattr("counsel.safety.detector._KEPT_TEXTS", 2)
    fresh = Detector(detector._reader, detector.card)
    for word in ("tea", "soup", "bread"):
        fresh.assess([word])
        assert len(fresh._known) <= 2
    assert np.isfinite(fresh.assess(["tea"]).score)
