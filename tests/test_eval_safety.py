"""`eval safety` on the project's held-out messages: what the shipped card says is so, and good enough to serve."""

from counsel.cli import MISSED
from counsel.safety.detector import Detector
from eval.config import SafetyConfig
from eval.safety import safety


def test_the_held_out_messages_give_the_cards_figures_and_may_be_served(capsys):
    """CI fails below the bound for serving, and where the card is wrong; a missed target is exit status 3, not a bug."""
    result = safety(SafetyConfig())
    detector = Detector.load()
    fresh = result.document["detector"]
    for name in ("recall", "false_positives"):
        assert fresh[name].keys() == detector.card[name].keys()
        for of, cell in fresh[name].items():
            stated = detector.card[name][of]
            # Another processor rounds otherwise, which may decide a message that is on the edge.
            assert cell["n"] == stated["n"]
            assert abs(cell["hits"] - stated["hits"]) <= 1, (name, of)
    detector.card = fresh
    detector.check()
    assert result.exit_status == (0 if all(result.document["rubric"].values()) else MISSED)
    assert "| recall" in capsys.readouterr().out
