"""Cleaning text: markup, scripts without spaces, contact details, helplines."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counsel.contacts import contacts, mask
from counsel.errors import UserError
from train.cleaning import clean, count_words, drop_reason
from train.data import DataConfig, clean_rows, prepare

QUESTION = "What helps when I cannot sleep?"
PARTS = st.sampled_from(
    [
        *(
            "<p>",
            "</p>",
            "<b>",
            "</b>",
            "<br>",
            "<sigh>",
            "<title>",
            "</title>",
            "<NAME>",
            "<a href='x'>",
            "</a>",
            "<",
            ">",
        ),
        *(
            "<!--",
            "-->",
            "<o:p/>",
            "&amp;",
            "&lt;",
            "&gt;",
            "amp;",
            "&#39;",
            "&#128546;",
            "&nbsp;",
            "&copy",
            "&",
            "#39;",
        ),
        *("so sad.", "Otherwise, ", "word", "no.Org", " ", "\n", "\n\n", "\t", "\u200b", "e\u0301", "\u2028", "\x85"),
        *(
            "<li>",
            "<ul>",
            "</ul>",
            "<script>",
            "</script>",
            "<td>",
            "<3",
            "a<b",
            "\r\n",
            "\u0915\u093f",
            "\u1fd3",
            "I.",
        ),
        *("- ", "\ud83d"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(PARTS | st.characters(), max_size=14).map("".join))
def test_clean_text_does_not_change(text):
    """Cleaning clean text changes nothing, and the result can be written to a file."""
    once = clean(text)

    assert clean(once) == once
    assert once.encode("utf-8").decode("utf-8") == once
    assert "\n\n\n" not in once
    assert once == once.strip()


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        # Unknown names are not markup; known names are not markup if nobody would write markup like that.
        ("One.\n\n<sigh> Two.\n\n- three\n- four", "One.\n\n<sigh> Two.\n\n- three\n- four"),
        ("My <NAME> left.\n\nI am <PERSON>.", "My <NAME> left.\n\nI am <PERSON>."),
        ("less <title> than <ADDRESS>, see <LINK> or <b> it", "less <title> than <ADDRESS>, see <LINK> or <b> it"),
        ("<rant>so tired</rant>", "<rant>so tired</rant>"),
        ("if a<b and c>d, x<y>z", "if a<b and c>d, x<y>z"),
        ("I <3 you >:( <- here -> <3", "I <3 you >:( <- here -> <3"),
        ("never closed <!-- so it stays", "never closed <!-- so it stays"),
        # Inline markup is removed without changing line ends; a blank line stays a paragraph break, even with blocks.
        ("One.\n\nTwo <b>bold</b> and\n<a href='x'>three</a>.", "One.\n\nTwo bold and\nthree."),
        ("One.\n\nTwo.<br>Three.", "One.\n\nTwo.\nThree."),
        ("<p>One\nline.</p>\n\n<p>Two.</p>", "One line.\n\nTwo."),
        ("<title>Page</title><p>Text</p>", "Text"),
        ('<span style="font-family:" helvetica","sans-serif""="">Clearly</span>', "Clearly"),
        ("<o:p></o:p>Word<o:p/>", "Word"),
        ("cut off</span></div>", "cut off"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\n\nc"),
        # Escaped twice, and text that only starts like a reference.
        ("I &amp;amp; you &amp;lt;p&amp;gt;there", "I & you\n\nthere"),
        ("Q&A&copy; R&D &notit; &copy", "Q&A\u00a9 R&D &notit; &copy"),
    ],
)
def test_only_markup_is_removed(raw, plain):
    """Placeholders, sighs, hearts and comparisons are text that people wrote."""
    assert clean(raw) == plain


@pytest.mark.parametrize(
    "text",
    ["<!--" * 50_000, "<p>-->" + "<!--" * 50_000, "&" + "amp;" * 50_000, "&#38;" + "#38;" * 50_000, "<a " * 50_000,
     "a." * 50_000, "www." * 50_000, "+1 " * 50_000, "a" * 200_000, " \n" * 50_000],
    ids=lambda text: text[:9].strip(),
)  # fmt: skip
def test_a_long_page_is_cleaned_quickly_enough(text):
    """Each took minutes to hours when the work was quadratic in the length."""
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    contacts(cleaned)


@pytest.mark.parametrize(
    ("text", "words", "by_hand"),
    [
        ("Talk to your own doctor please.", 6, 6),
        ("- Rest, now -", 2, 2),
        # qing/qu/kankan/ni/de/yisheng, hao/ma
        ("\u8bf7\u53bb\u770b\u770b\u4f60\u7684\u533b\u751f\uff0c\u597d\u5417\uff1f", 7, 8),
        # sore/wa/tsurai/desu/ne
        ("\u305d\u308c\u306f\u3064\u3089\u3044\u3067\u3059\u306d\u3002", 6, 5),
        ("\ub9ce\uc774 \ud798\ub4dc\uc168\uaca0\uc5b4\uc694", 4, 2),
        # long/phakphon/bang/na/kha
        (
            "\u0e25\u0e2d\u0e07\u0e1e\u0e31\u0e01\u0e1c\u0e48\u0e2d\u0e19\u0e1a\u0e49\u0e32\u0e07\u0e19\u0e30\u0e04\u0e30",
            5,
            5,
        ),
        ("\u0906\u092a \u0906\u0930\u093e\u092e \u0915\u0930\u0947\u0902", 3, 3),
        ("\u043f\u043e\u043f\u0440\u043e\u0431\u0443\u0439 \u043e\u0442\u0434\u043e\u0445\u043d\u0438", 2, 2),
        ("\u8bd5\u8bd5 breathing \u7ec3\u4e60 2 \u6b21", 5, 5),
    ],
)
def test_words_are_counted_in_every_script(text, words, by_hand):
    """Without spaces between words, letters are counted: within two of what a reader of the language counts."""
    assert count_words(text) == words
    assert abs(words - by_hand) <= 2


@pytest.mark.parametrize(
    "answer",
    [
        "\u662f\u7684\u3002",
        "\u306f\u3044\u3002",
        "\ub124.",
        "\u0e43\u0e0a\u0e48\u0e04\u0e48\u0e30",
        "Ja.",
        "\u0939\u093e\u0901\u0964",
    ],
)
def test_yes_is_too_short_in_any_language(answer):
    """Counting letters must not accept a one-word answer."""
    assert drop_reason(QUESTION, answer) == "answer under 6 words"


HELPLINES = [
    "Please call the lifeline at 1-800-273-8255 right now, people there listen.",
    "Please call the lifeline at +1 800 273 8255, or 8002738255, or 1.833.456.4566.",
    "In the UK you can call Samaritans on 116 123, +44 116 123, or Mind on 0300 123 3393.",
    "In Australia you can call Lifeline on 13 11 14, +61 13 11 14 or 1300 659 467.",
    "In Germany you can call 0800 111 0 111 or 0800 1110111 or +49 800 1110222, at any hour.",
    "You can text HOME to 741741 or call 988, and findahelpline.com lists others near you.",
    "In Ireland you can call Pieta on 1800 247 247 or +353 1800 247 247, at any time.",
    "In Singapore you can call 1800-221-4444, in Hong Kong the Samaritans at +852 2896 0000.",
    "In India the helpline iCall is at 9152987821; in Japan there is 0120-783-556.",
    "See https://988lifeline.org/chat, www.samaritans.org or mail jo@samaritans.org any time.",
    "In France there is SOS Amiti\u00e9, 09 72 39 40 50, in the Netherlands www.113.nl and elsewhere suicide.org.",
    "Lists for every country: https://www.opencounseling.com/suicide-hotlines and https://findahelpline.com/countries/de.",
    "For the years 2010 2019-2020 the same pattern held, on 01.02.2020 10:30 and 2021-08-12 15:30.",
]


@pytest.mark.parametrize(
    "number",
    [
        # Area codes and mobile numbers that start like a toll-free number.
        "01202 555123", "01204 123456", "+44 116 234 5678", "+44 1300 123456", "8886543210",
        "0300 1234567", "0300-1234567", "+91 80012 34567", "+91 800 123 4567", "+918001234567", "+65 8001 2345",
        "+66800123456", "+447800123456", "+447 800 123 456", "+234 808 123 4567", "+8613001234567", "+86 180 0123 4567",
        "+86 13112345678", "+818081234567",
    ],
)  # fmt: skip
def test_a_personal_number_is_not_a_helpline(number):
    """Whatever its first digits are."""
    assert mask(f"You can ring me on {number} tonight.") == "You can ring me on [phone number] tonight."


@pytest.mark.parametrize(
    "number",
    [
        "0300 123 3393", "0845 790 9090", "0120-783-556", "0508 828 865", "0808 808 1677", "+44 808 808 1677",
        "+44 (0)800 123 4567", "+49 800 1110111", "+353 116 123", "+353 1800 247 247", "+61 1300 659 467",
        "1-888-654-3210", "+1 800 273 8255", "(888) 654-3210", "888-654-3210", "+7 800 200 01 22", "+91 1800 599 0019",
    ],
)  # fmt: skip
def test_a_toll_free_number_is_kept(number):
    """In the format of its country."""
    text = f"You can ring them on {number} tonight."
    assert mask(text) == text


@pytest.mark.parametrize("answer", HELPLINES)
def test_helplines_are_kept(answer):
    """With drop and with mask: removing a crisis line may remove the sentence that mattered."""
    assert drop_reason(QUESTION, answer) is None
    assert mask(answer) == answer


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        ("See https://help.example.com/reset?x=1#top.", "See [link].", "link"),
        ("See [here](https://example.org/a_(b)), ok", "See [here]([link]), ok", "link"),
        ("Lewiswww.Example.Com", "Lewis[link]", "link"),
        ("my own site, suicidetherapy.com", "my own site, [link]", "link"),
        ("visit mypractice.com, EXAMPLE.ORG or bit.ly/x1", "visit [link], [link] or [link]", "link"),
        ("\u8bf7\u770bexample.com\u5427", "\u8bf7\u770b[link]\u5427", "link"),
        ("Write to Anna.B+x@mail.example.co.uk!", "Write to [e-mail address]!", "e-mail address"),
        ("I am at (202) 555-0143 until five.", "I am at [phone number] until five.", "phone number"),
        ("Call 2025550143 or +44 20 7946 0018.", "Call [phone number] or [phone number].", "phone number"),
        ("Mobile 07700 900123 or 06 12 34 56 78", "Mobile [phone number] or [phone number]", "phone number"),
        ("\u62e8\u62532025550143", "\u62e8\u6253[phone number]", "phone number"),
        ("Call the lifeline, 988, or me at (202) 555-0143", "Call the lifeline, 988, or me at [phone number]",
         "phone number"),
        ("Join t.me/anna, youtu.be/dQw4w9WgXcQ, amzn.in/d/x or example.de/me", "Join [link], [link], [link] or [link]",
         "link"),
        ("I saw him.he/she did it, so.we/they left.so/that is.it/is. Tell her.me/us.in/out, ok.or/and", None, None),
        ("I just say no.Org is short. Rest.Net and e.g. he/she or 24/7", None, None),
    ],
)  # fmt: skip
def test_contact_details_are_masked_whole(text, masked, kind):
    """The whole address is masked, and nothing of its sentence; masking again changes nothing."""
    assert mask(text) == (masked or text)
    assert mask(mask(text)) == mask(text)
    assert {contact.kind for contact in contacts(text)} == ({kind} if kind else set())


def contact_rows() -> list[dict[str, str]]:
    """Forty rows: every second has a link, every fifth an address, of every seventh a phone number."""
    return [
        {
            "Context": f"I could not log in {n} times and I am so upset about it",
            "Response": f"I am sorry that this was so stressful, day {n}."
            + " See https://help.example.com/reset for more." * (n % 2)
            + " Or write to care@example.com." * (n % 5 == 0)
            + " My colleague is at (202) 555-0143." * (n % 7 == 3),
        }
        for n in range(40)
    ]


def test_rows_with_contacts_are_dropped_or_masked(tmp_path):
    """Each dropped row counts once; with mask, all rows stay and the report counts the masked kinds."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in contact_rows()))
    config = DataConfig(data=str(path))

    _, dropped = prepare(config)
    splits, masked = prepare(replace(config, contacts="mask"))

    # Rows 0, 5, 10, ... have an address, which counts first; other odd rows have a link; two more have only a number.
    assert (dropped.rows_out, dropped.dropped) == (14, {"link": 16, "e-mail address": 8, "phone number": 2})
    assert (masked.rows_out, masked.dropped) == (40, {})
    assert masked.masked == {"link": 20, "e-mail address": 8, "phone number": 6}
    assert "masked          20  link" in str(masked)
    answers = [row["answer"] for rows in splits.values() for row in rows]
    assert sum(answer.count("[link]") for answer in answers) == 20
    assert not any(secret in answer for answer in answers for secret in ("http", "@", "555"))
    with pytest.raises(UserError, match="contacts is 'keep'; it must be drop or mask"):
        prepare(replace(config, contacts="keep"))


def test_examples_show_why_a_row_was_dropped():
    """At most three per reason, with the row number and the text around the detail, even deep in a long answer."""
    rows = contact_rows()
    rows[1]["Response"] = "Breathe slowly. " * 30 + rows[1]["Response"]
    examples = clean_rows(rows, DataConfig()).examples

    assert {reason: len(found) for reason, found in examples.items()} == {
        "link": 3,
        "e-mail address": 3,
        "phone number": 2,
    }
    assert examples["link"][0].startswith("row 2: ")
    assert "https://help.example.com/reset" in examples["link"][0]
    assert all(len(example) < 120 for found in examples.values() for example in found)
