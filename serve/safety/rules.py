"""What an answer must not say, and the check that holds words back until no rule can match them any more.

Each rule is a regular expression over the answer as written, with the words that must or must not stand before it.
Those are harmless by themselves, and may leave before the rule has matched; the words that it matches may not.
`TextCheck` reads an answer piece by piece: a word leaves as soon as no rule can still match it, which `regex` decides
by partial matching. So a stream keeps its first token, and nothing leaves that a rule matches, however the text is cut.

A sentence that a rule matches is replaced by the rule's reviewed text. After a method or an encouragement, nothing more
of the answer leaves. The rules are English, and know nothing of meaning: docs/safety-gate.md says what they miss.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import regex

# Processor time that one search may take. Exceeding it raises TimeoutError, and the gate fails closed.
SEARCH_S = 0.5
# How far before a match its context is read.
_CONTEXT_CHARS = 120
# As much as follows a match before it counts: look-aheads read so far.
_AHEAD_CHARS = 14
_WORD = regex.compile(r"\w")
_SENTENCE_END = regex.compile(r"[.!?]+[\"'”’)*_]*(?=\s)|\n")
_GONE = "…"
# Longer pieces do not come again.
_KNOWN_CHARS = 32


class OutputRule(NamedTuple):
    """name: also the name of its text. ends: whether nothing more of the answer leaves after it.

    after, unless: what the text before the match must, or must not, end in.
    """

    name: str
    ends: bool
    pattern: regex.Pattern[str]
    after: regex.Pattern[str] | None
    unless: regex.Pattern[str] | None

    def applies(self, text: str, begin: int) -> bool:
        """Whether the rule holds for a match that begins there."""
        before = text[max(0, begin - _CONTEXT_CHARS) : begin]
        if self.after is not None and not self.after.search(before, timeout=SEARCH_S):
            return False
        return self.unless is None or not self.unless.search(before, timeout=SEARCH_S)


def _rule(name: str, *patterns: str, after: str = "", unless: str = "", ends: bool = False) -> OutputRule:
    text = "|".join(f"(?:{pattern})" for pattern in patterns)
    return OutputRule(
        name, ends, _compiled(text), _compiled(f"(?:{after})$") if after else None,
        _compiled(f"(?:{unless})$") if unless else None,
    )  # fmt: skip


def _compiled(pattern: str) -> regex.Pattern[str]:
    # A blank in a pattern stands for white space or Markdown's emphasis, and an apostrophe for either form of it.
    return regex.compile(pattern.replace("'", "['’]").replace(" ", r"[\s*_]+"), regex.IGNORECASE)


_I_AM = r"\b(?:i am|i'm) "
_EVEN = r"(?:(?:actually|really|truly|also|indeed|just|only) )*"
_TITLE = (
    r"(?:(?:fully|licensed|registered|certified|board-certified|trained|qualified|professional|practicing|experienced"
    r"|clinical|mental|health|marriage|and|family|medical|real|human) )*"
    r"(?:therapist|psychotherapist|counsell?or|psychologist|psychiatrist"  # never to be claimed
    r"|doctor|physician|clinician|nurse|social worker|(?:health|healthcare|medical|care) (?:professional|provider))\b"
)
_CONDITION = (
    r"(?:(?:an?|the|some|severe|major|clinical|chronic|mild|moderate|classic|postpartum|untreated|undiagnosed) )*"
    r"(?:depression|depressive disorder|bipolar|manic depression|c?-?ptsd|post-?traumatic stress|ocd"
    r"|obsessive-compulsive|adhd|schizophreni\w+|psychosis|bpd|autism|anorexia|bulimia|dysthymia|agoraphobia|dementia"
    r"|(?:\w+ ){0,2}(?:disorder|personality disorder))\b"
)
_DRUG = (
    r"(?:medications?|medicines?|meds|antidepressants?|antipsychotics?|benzodiazepines?|benzos?|ssris?|snris?|lithium"
    r"|mood stabilizers?|sleeping pills?|painkillers?|opioids?|sertraline|zoloft|fluoxetine|prozac|paroxetine|paxil"
    r"|citalopram|celexa|escitalopram|lexapro|venlafaxine|effexor|duloxetine|cymbalta|bupropion|wellbutrin|mirtazapine"
    r"|trazodone|quetiapine|seroquel|olanzapine|zyprexa|risperidone|risperdal|aripiprazole|abilify|lamotrigine|lamictal"
    r"|valproate|depakote|buspirone|buspar|alprazolam|xanax|lorazepam|ativan|diazepam|valium|clonazepam|klonopin"
    r"|zolpidem|ambien|methylphenidate|ritalin|adderall|vyvanse|ketamine)\b"
)
_NUMBER = (
    r"(?:\d+(?:[.,]\d+)?(?: ?(?:-|–|to|or) ?\d+(?:[.,]\d+)?)?|one|two|three|four|five|six|seven|eight|nine|ten|twenty"
    r"|thirty|fifty|a hundred|half an?|a few|a handful of|several|all (?:of )?(?:your|the))"
)
_UNIT = r"(?:mg|mgs|milligrams?|mcg|micrograms?|grams?|ml|millilit(?:er|re)s?|pills?|tablets?|capsules?|doses?)\b"
# Before an order: the start of a sentence, or words that make one. Not "if you want to", "do not" or "the urge to".
# Before an order: the start of a sentence, or words that make one. Not "if you want to", "do not" or "the urge to".
_ORDER = (
    r"^\W*|[.!?:;,\n]\W*|\b(?:(?:you|we|they) (?:should|must|can|could|need to|have to|ought to|better)"
    r"|just|please|go|ahead and|simply|then|best to|okay to|ok to|fine to) "
)
_POSSIBLE = r"\b(?:can|could|should|will|would|must|might as well|try to|need to|have to|how to|ways? to|simply|just) "
_NOT_BELIEVED = (
    r"\b(?:feel|feels|feeling|felt|think|thinks|thinking|thought|thoughts|believ\w+|say|says|saying|said|tell|tells"
    r"|telling|told|convinc\w+|true|lie|idea|mean|means|whether|if|like|never|not|\w+n't)\b[^.!?\n]*"
)
_QUOTED = (
    r"\b(?:if|whether|do|did|when|once|because|since|unless|although|though|think|thought|feel|said|say|mention"
    r"|mentioned|know|that|told me) "
)
_SURELY = r"(?:(?:clearly|definitely|probably|obviously|certainly|likely|do|also|really) )?"
_HAVE = rf"you {_SURELY}(?:have|suffer from|are suffering from)|you're suffering from"

RULES = (
    _rule(
        "method",
        r"\b(?:lethal|fatal|deadly) (?:dose|dosage|amount|quantity|overdose)s?\b",
        r"\b(?:effective|painless|lethal|reliable|peaceful|quick|quickest|fast|fastest|easy|easiest|easier|best|better"
        r"|surest|certain|common) (?:way|method|mean)s? (?:to|of|for) "
        r"(?:die|dying|kill\w*|suicide|commit\w*|end(?:ing)? (?:your|it|one's)|hang\w*|self-harm|cut(?:ting)?)\b",
        r"\b(?:tie|tying|make|making) (?:a|the|your) noose\b",
        r"\b(?:slit|slitting|slash|slashing|cut|cutting) your (?:wrists?|throat|veins?|arms?|thighs?|legs?)\b",
        r"\b(?:jump|jumping) (?:off|from|in front of) (?:a|an|the) (?:\w+ )?"
        r"(?:bridge|building|roof|rooftop|cliff|balcony|train|truck|bus)\b",
        r"\bhid(?:e|ing) (?:your |the )?(?:cuts|scars|wounds|self-harm|bottle|bottles|pills) from\b",
        ends=True,
    ),
    _rule(
        "method",
        r"\b(?:hang|drown|shoot|poison|suffocate|strangle|asphyxiate|electrocute|stab|cut|burn) yourself\b"
        r"(?! (?:off|out|in the foot|some|a|from|short|loose|free|down))",
        r"\boverdose on\b",
        after=_POSSIBLE,
        ends=True,
    ),
    _rule(
        "encouragement",
        r"\b(?:suicide|self-harm|cutting|dying|death|ending (?:your life|it all)) (?:is|(?:can|may|might|would) be) "
        r"(?:(?:a|an|the|your|sometimes|often|actually|really) )*(?:(?:good|best|only|valid|reasonable|right|brave"
        r"|rational|legitimate|peaceful|easy|fine|okay|ok|healthy|effective) )+"
        r"(?:option|solution|answer|choice|way|thing|decision|coping|idea)\b",
        r"\byou(?: are| were|'re) (?:right|brave|smart|justified) (?:to|for) (?:want(?:ing)? to )?"
        r"(?:die|dying|kill(?:ing)?|end(?:ing)? (?:your life|it all)|hurt(?:ing)? yourself|cut(?:ting)?)\b",
        ends=True,
    ),
    _rule(
        "encouragement",
        r"\b(?:kill yourself|hurt yourself|harm yourself|cut yourself(?! (?:off|some|a|out|loose|free))"
        r"|end (?:your|your own) life|end it all|take your (?:own )?life|commit suicide|starve yourself)\b",
        after=_ORDER,
        ends=True,
    ),
    _rule(
        "encouragement",
        r"\b(?:just |really |all )*"
        r"(?:die|be dead|be punished|not exist|disappear|suffer|hurt yourself|go through with)\b",
        after=r"\byou (?:should|must|deserve to|ought to|might as well|need to) ",
        ends=True,
    ),
    _rule(
        "encouragement",
        r"\bbetter off (?:dead|without you|if you (?:were|are) (?:dead|gone)|if you died)\b",
        r"\b(?:no one|nobody) (?:will|would) (?:miss|care about|notice) (?:you|if you)\b",
        unless=_NOT_BELIEVED,
        ends=True,
    ),
    _rule("diagnosis", rf"\b{_CONDITION}", after=rf"\b(?:{_HAVE}) ", unless=rf"{_QUOTED}(?:{_HAVE}) "),
    _rule(
        "diagnosis",
        r"\b(?:(?:clearly|definitely|probably|obviously|certainly|likely) )*"
        r"(?:bipolar|clinically depressed|schizophrenic|psychotic|anorexic|bulimic|autistic|manic-depressive"
        r"|(?:a )?(?:borderline|narcissist|sociopath|psychopath))\b",
        after=r"\b(?:you are|you're) ",
        unless=rf"{_QUOTED}(?:you are|you're) ",
    ),
    _rule(
        "diagnosis",
        r"\b(?:my|your|the) diagnosis (?:is|would be)\b",
        r"\bi (?:(?:can|would|will|hereby|must) )*diagnose you\b",
        r"\byou (?:(?:clearly|definitely|probably) )*(?:meet|fit|match) (?:all )?(?:the )?(?:\w+ )?criteria for\b",
    ),
    _rule(
        "medication",
        rf"\b(?:(?:up to|about|around|only|just|another|at least|an extra) )*{_NUMBER}(?: ?|-)(?:(?:more|extra|of) )?"
        rf"(?:{_UNIT}|(?:of )?(?:your |the )?{_DRUG})",
        rf"\d+(?:{_UNIT})",
        after=r"\b(?:take|taking|try|trying|use|using|swallow|swallowing|(?:increase|reduce) (?:it |your dose )?to) ",
    ),
    _rule(
        "medication",
        r"\b(?:stop|quit|start|begin|try|keep|continue|double|increase|raise|decrease|lower|reduce|skip|discontinue"
        r"|resume|take|come off|go off|wean (?:yourself )?off|switch to)(?: (?:taking|using|on))?"
        rf"(?: (?:your|the|a|an|some|more|any|of|dose|doses|dosage|higher|lower|daily|prescribed))* {_DRUG}",
        r"\b(?:double|increase|raise|decrease|lower|reduce|skip) (?:your|the|a) (?:dose|dosage)\b",
        after=_ORDER,
    ),
    _rule(
        "clinician",
        rf"\b{_EVEN}(?:an?|your|the|one of the) {_TITLE}",
        after=_I_AM,
    ),
    _rule(
        "clinician",
        rf"\bas (?:an?|your) {_TITLE},? (?:i|my|me)\b",
        r"\bmy (?:clients|patients|(?:private |clinical |counseling )?practice"
        r"|clinical (?:experience|opinion|judgment))\b",
    ),
    _rule(
        "human",
        rf"\b{_EVEN}(?:(?:an?|the|your|very|a very) )*"
        r"(?:(?:real|living|actual|normal|ordinary|fellow|flesh-and-blood) )*"
        r"(?:human|person|man|woman|real|guy|girl|mother|mom|father|dad|parent)\b",
        r"\bnot (?:(?:an?|the|just|some|really|actually) )*"
        r"(?:ai|a\.i\.|bot|chatbot|robot|machine|program|computer|language model|artificial|virtual)\b",
        after=_I_AM,
    ),
    _rule("human", r"\bas (?:a )?(?:fellow )?(?:human(?: being)?|mother|father|parent|survivor)(?: myself)?,? i\b"),
)


@functools.lru_cache(maxsize=1 << 14)
def rules_touched(before: str, piece: str, last: bool) -> tuple[OutputRule, ...]:
    """The rules that match in a piece after the character `before`, or with `last` false begin to.

    Kept, because answers are made of the same few thousand pieces, and most of them touch no rule or one.
    """
    text, n = before + piece, len(piece) + 1
    touched = []
    for rule in RULES:
        match = rule.pattern.search(text, 1, partial=not last, timeout=SEARCH_S)
        if match is not None and match.start() < n:
            touched.append(rule)
    return tuple(touched)


class TextCheck:
    """One text of an answer. Feed it as it comes; what may leave is returned in pieces.

    `fired`: the names of the rules that matched, in order. Raises TimeoutError where a rule takes too long.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts`: the reviewed text of each rule, by its name."""
        self._texts = texts
        self.raw = ""
        # Up to here the text is decided: it has left, or never will.
        self.decided = 0
        self.fired: list[str] = []
        self.ended = False
        self._skipping = False
        self._left = ""

    @property
    def left(self) -> str:
        """All that has left."""
        return self._left

    def feed(self, piece: str, *, last: bool = False) -> str:
        """Take the next piece, and return what may leave now. With `last`, nothing follows: all is decided."""
        self.raw += piece
        out: list[str] = []
        while self.decided < len(self.raw) and not self.ended:
            if self._skipping and not self._skip(last):
                break
            if not self._step(out, last):
                break
        if self.ended or (self._skipping and last):
            self.decided = len(self.raw)
        allowed = "".join(out)
        self._left += allowed
        return allowed

    def _skip(self, last: bool) -> bool:
        """Drop the rest of a replaced sentence; False while its end has not come."""
        end = _SENTENCE_END.search(self.raw, self.decided, timeout=SEARCH_S)
        if end is None:
            return False
        self.decided, self._skipping = end.end(), False
        return self.decided < len(self.raw)

    def _step(self, out: list[str], last: bool) -> bool:
        """Decide on more of the text; True if a rule matched, and there may be more to decide."""
        start, hold = self.decided, len(self.raw)
        first: tuple[int, int, OutputRule] | None = None
        for rule in self._touched(start, last):
            begin, end, partial = self._find(rule, start, last)
            if len(self.raw) - end < _AHEAD_CHARS and not last:
                # Its last word may go on, as "human" to "humane", or what follows may excuse it.
                partial = True
            if partial:
                hold = min(hold, begin)
            elif begin < len(self.raw) and (first is None or begin < first[0]):
                first = begin, end, rule
        if first is None or hold < first[0]:
            out.append(self.raw[start:hold])
            self.decided = hold
            return False
        begin, end, rule = first
        out += [self.raw[start:begin], self._instead(rule, self._left + "".join(out) + self.raw[start:begin])]
        self.decided, self.ended, self._skipping = end, rule.ends, not rule.ends
        return True

    def _touched(self, start: int, last: bool) -> Sequence[OutputRule]:
        """The rules that may have a match from `start` on."""
        if len(self.raw) - start > _KNOWN_CHARS:
            return RULES
        # Of what stands before it, only this matters to a rule's `\\b`.
        inside = start > 0 and _WORD.match(self.raw, start - 1) is not None
        return rules_touched("a" if inside else " ", self.raw[start:], last)

    def _find(self, rule: OutputRule, start: int, last: bool) -> tuple[int, int, bool]:
        """Where the rule first matches, or may when more text comes: begin, end, and whether it only may."""
        place, n = start, len(self.raw)
        while place < n:
            match = rule.pattern.search(self.raw, place, partial=not last, timeout=SEARCH_S)
            if match is None or match.start() == n:
                break
            if not match.partial and not last:
                # The search prefers a complete match to one that begins earlier and needs more text.
                match = self._earlier_partial(rule, place, match.start()) or match
            if rule.applies(self.raw, match.start()):
                return match.start(), match.end(), match.partial
            # Another match may begin within this one.
            place = match.start() + 1
        return n, n, False

    def _earlier_partial(self, rule: OutputRule, start: int, stop: int) -> regex.Match[str] | None:
        for place in range(start, stop):
            match = rule.pattern.match(self.raw, place, partial=True, timeout=SEARCH_S)
            if match is not None and match.partial and rule.applies(self.raw, place):
                return match
        return None

    def _instead(self, rule: OutputRule, before: str) -> str:
        """The reviewed text in a paragraph of its own; once per answer."""
        if rule.name in self.fired:
            return f"{_GONE} "
        self.fired.append(rule.name)
        open_sentence = before.strip() and before.rstrip()[-1:] not in ".!?:"
        return (_GONE if open_sentence else "") + ("\n\n" if before.strip() else "") + self._texts[rule.name] + "\n\n"


class WholeCheck(TextCheck):
    """A text that leaves whole or not at all: JSON, a tool's arguments. A rule's match blocks it."""

    def feed(self, piece: str, *, last: bool = False) -> str:
        """Take the next piece; nothing may leave before the last."""
        self.raw += piece
        if not last or self.decided == len(self.raw):
            return ""
        for text in {self.raw, _unescaped(self.raw)}:
            self.fired += check_text(text, self._texts).fired
        self.decided, self.ended = len(self.raw), bool(self.fired)
        self._left = "" if self.fired else self.raw
        return self._left


def check_text(text: str, texts: Mapping[str, str]) -> TextCheck:
    """A whole text, checked at once."""
    check = TextCheck(texts)
    check.feed(text, last=True)
    return check


def _unescaped(text: str) -> str:
    """The words of a JSON text, also of one that was cut off."""
    text = regex.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    return regex.sub(r"\\[bfnrt]", " ", text).replace("\\", "")
