"""The crisis gate's policy, services and texts: what is refused, and how old a service may be."""

import datetime
from pathlib import Path

import pytest

from counsel.errors import UserError
from counsel.safety.labels import RISKS
from counsel.safety.policy import read_policy
from counsel.safety.resources import read_resources

ROW = (
    "- {country: US, name: a, channel: call, number: '1', hours: 24/7, languages: [en], source: s, "
    "verified_on: 2026-01-01}"
)


def test_a_service_is_too_old_after_180_days(tmp_path):
    """And one from the future was not verified."""
    (tmp_path / "r.yaml").write_text(ROW)
    resources = read_resources(tmp_path / "r.yaml")
    verified = datetime.date(2026, 1, 1)
    for days in (0, 180):
        resources.check_age(verified + datetime.timedelta(days))
    for days in (-1, 181):
        with pytest.raises(UserError, match=r"1 of 1 .* a \(US, 2026-01-01\)"):
            resources.check_age(verified + datetime.timedelta(days))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW.replace("'1'", "1"), "number is 1; it must be text"),
        (ROW.replace("US", "usa"), "country is 'usa'"),
        (ROW.replace("call", "fax"), "channel is 'fax'; allowed: emergency"),
        (ROW.replace("2026-01-01", "soon"), "verified_on is 'soon'"),
        (ROW.replace("hours: 24/7, ", ""), "it must have exactly country, name"),
        ("5", "must be a list of services"),
    ],
)
def test_a_wrong_service_is_refused(tmp_path, row, said):
    (tmp_path / "r.yaml").write_text(row)
    with pytest.raises(UserError, match=said):
        read_resources(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("policy", "texts", "said"),
    [
        ("countri: US", "", "unknown key 'countri'"),
        ("country: usa", "", "two capital letters"),
        ("guard_url: http://g/v1", "", "must be given together"),
        ("webhook_labels: [sad]", "", "webhook_labels has 'sad'"),
        ("guard_safe: '('", "", "not a regular expression"),
        ("threshold_urgent: 1.5", "", "threshold_urgent"),
        ("texts: t.yaml", "imminnent: x", "unknown text 'imminnent'"),
        ("texts: t.yaml", "method: 'see {place}'", "allowed: {emergency} and {resources}"),
        ("texts: t.yaml", "active: Call someone whom you trust.", "lacks {emergency}"),
        ("texts: t.yaml", "imminent: 'You may be in danger. {resources} {emergency}'", "must name {emergency} before"),
        ("texts: t.yaml", "active: 'Hi. {emergency} {resources}'", "begin with a sentence"),
    ],
)
def test_a_wrong_policy_is_refused(tmp_path, policy, texts, said):
    """Before anything starts, in one line."""
    (tmp_path / "p.yaml").write_text(policy)
    (tmp_path / "t.yaml").write_text(texts)
    with pytest.raises(UserError) as error:
        read_policy(str(tmp_path / "p.yaml"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_own_text_replaces_a_shipped_one(tmp_path: Path):
    """Files are found beside the policy, and its digest changes with them."""
    (tmp_path / "p.yaml").write_text("texts: t.yaml\nresources: r.yaml")
    (tmp_path / "t.yaml").write_text("active: 'Please stay with us for a moment. {emergency}, {resources}'")
    (tmp_path / "r.yaml").write_text(ROW)
    policy = read_policy(str(tmp_path / "p.yaml"))
    text = policy.read_texts().render("active", "US")
    assert text.startswith(
        "Please stay with us for a moment. your local emergency number, - a: call 1 (24 hours a day)"
    )
    assert policy.read_texts().shown_before([f"{text} more"]) == {"active"}
    assert policy.digest != read_policy("on").digest
    assert read_policy("off") is None


def test_every_risk_has_a_text_for_every_country():
    """Each names an emergency number, and findahelpline.com."""
    texts = read_policy("on").read_texts()
    for country in {resource.country for resource in texts.resources} | {"FR", "ZZ", ""}:
        for name in (*RISKS, "unchecked"):
            text = texts.render(name, country)
            assert texts.resources.emergency_number(country) in text
            assert "findahelpline.com" in text
