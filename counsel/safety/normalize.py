"""Brings what people write to plain words: case, spacing, look-alikes, typos, and words that dodge filters."""

import difflib
import functools
import re
import unicodedata

# Look-alikes, read as letters only in a word that also has letters.
_LEET = str.maketrans("013457@$", "oieastas")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00a0", "''\"\"-- ")
# One letter, then two or more times a separator and a letter: "s u i c i d e", "k.i.l.l", "d-i-e".
_SPACED = re.compile(r"(?<![^\W_])[^\W\d_](?:([ .\-_*])[^\W\d_])(?:\1[^\W\d_])+(?![^\W_])")
_REPEATED = re.compile(r"([a-z])\1{2,}")
_WORD = re.compile(r"[@$]?[^\W_]+(?:[@$*'!]+[^\W_]+)*")

# Whole words of chat language and what they stand for.
_CHAT = {
    "2day": "today", "2moro": "tomorrow", "2morrow": "tomorrow", "tmrw": "tomorrow", "tmr": "tomorrow",
    "2nite": "tonight",
    "2night": "tonight", "tonite": "tonight", "tn": "tonight", "nite": "night", "rn": "right now", "b4": "before",
    "4ever": "forever", "u": "you", "ur": "your", "r": "are", "n": "and",
    "no1": "no one", "any1": "anyone", "every1": "everyone", "sum1": "someone", "some1": "someone", "som1": "someone",
    "ppl": "people", "bc": "because", "cuz": "because", "coz": "because", "cos": "because", "w": "with", "w/": "with",
    "gonna": "going to", "gunna": "going to", "gna": "going to", "gon": "going to", "finna": "going to",
    "boutta": "about to", "bouta": "about to", "bout": "about", "tryna": "trying to", "wanna": "want to",
    "wana": "want to", "gotta": "got to", "imma": "i am going to", "ima": "i am going to", "im": "i'm", "ive": "i've",
    "dont": "don't", "cant": "can't", "wont": "won't", "didnt": "didn't",
    "doesnt": "doesn't", "wasnt": "wasn't", "isnt": "isn't", "wouldnt": "wouldn't", "couldnt": "couldn't",
    "shouldnt": "shouldn't", "aint": "ain't", "thats": "that's", "whats": "what's", "wats": "what's", "wat": "what",
    "idk": "i don't know", "tbh": "honestly", "ngl": "honestly", "fr": "for real", "rly": "really", "srsly":
    "seriously",
    "legit": "really", "lowkey": "kind of", "shud": "should", "cud": "could", "wud": "would", "hav": "have",
    "h8": "hate", "gr8": "great", "l8r": "later", "m8": "mate", "abt": "about", "smth": "something", "thx": "thanks",
    "plz": "please", "pls": "please", "ily": "i love you", "omw": "on my way", "wnt": "want", "wnat": "want",
    "watn": "want", "wen": "when",
    "alredy": "already", "od": "overdose", "oding": "overdosing", "od'd": "overdosed", "nemore": "anymore",
    "bff": "best friend", "gf": "girlfriend", "bf": "boyfriend", "irl": "in real life", "af": "very", "wknd": "weekend",
}  # fmt: skip
_DIGIT_WORDS = [
    (re.compile(r"\b2 (?=(?:be|die|kill|live|hurt|cut|stop|end|go|unalive|disappear|not|do|tell|sleep)\b)"), "to "),
    (re.compile(r"\b4 (?=(?:me|my|you|him|her|them|real|life|help|ever|this|that|being|listening)\b)"), "for "),
    (re.compile(r"\bb (?=(?:here|alive|dead|gone|better|happy|happier|ok|okay|born|around|mad|so)\b)"), "be "),
]  # fmt: skip
# Words and phrases that dodge filters. Only those with hardly any other meaning; the classifier judges the rest.
_DODGES = [
    (re.compile(rf"\b(?:{pattern})\b"), plain)
    for pattern, plain in {
        r"kms": "kill myself",
        r"kys": "kill yourself",
        r"ctb|catch(?:ing)? the bus to (?:the other side|heaven)": "commit suicide",
        r"(?:un ?-?alive|self[ -]?delete) ?(?:my ?self|me)": "kill myself",
        r"un-?aliving|un aliving": "killing",
        r"un-?alived": "killed",
        r"un-?alive|un alive": "kill",
        r"sewer ?-?sli?de|soo+er ?side|sui ?slide|suey ?side|sue ?i ?side": "suicide",
        r"(?:commit )?toaster bath|commit (?:sudoku|die|unlive|not alive)": "commit suicide",
        r"end(?:ing)? my ?self|off(?:ing)? my ?self|delet(?:e|ing) my ?self|game ?end(?:ing)? (?:my ?self|my life)": (
            "kill myself"
        ),
        r"(?:self ?-?h[ae]rm|slf ?h[ae]rm|selfharm)": "self-harm",
        r"grippy ?-?socks?(?: vacation| holiday)?": "psychiatric ward",
    }.items()
]
# "sh" is self-harm after these words, and a shell elsewhere.
_SH = re.compile(
    r"\b(i|do|did|doing|to|from|want|need|with|my|about|urge|urges) sh(?:'?d)?\b(?!\s*(?:script|file|shell|-))"
)
_CORE = (
    "suicide", "suicidal", "killing", "myself", "overdose", "overdosed", "overdosing", "cutting", "depressed",
    "goodbye",
    "tonight", "harming", "hurting", "himself", "herself", "hanging", "anymore", "swallowed", "forever", "selfharm",
)  # fmt: skip
_MASKED = (
    "suicide", "suicidal", "kill", "killing", "killed", "die", "died", "dying", "dead", "death", "cut",
    "cutting", "harm",
    "hang", "hanging", "overdose", "hurt", "blood", "jump", "shoot",
)  # fmt: skip
# Words that are close to one of _CORE and are words of their own.
_OTHER_WORDS = frozenset({
    "milling", "filling", "billing", "willing", "killings", "cuttings", "putting", "setting", "butting",
    "gutting", "hutting",
    "rutting", "itself", "thyself", "yourself", "farming", "charming", "warming", "arming", "changing",
    "banging", "ranging",
    "handing", "hangings", "homicide", "spelling", "calling", "falling", "pulling", "selling", "telling", "tilling",
    "chilling", "skilling", "grilling", "drilling", "shilling", "thrilling", "oneself", "shutting",
    "depresses", "turning",
    "burning", "hunting", "hurling", "suicides", "curtain", "courting", "counting", "shaming", "framing", "knights",
})  # fmt: skip


def normalize(text: str) -> str:
    """Plain lower-case words with what hides them undone; sentence marks and line ends stay."""
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    plain = _INVISIBLE.sub("", plain).lower()
    plain = _SPACED.sub(lambda match: re.sub(r"[ .\-_*]", "", match[0]) if _is_core(match[0]) else match[0], plain)
    plain = _WORD.sub(lambda match: _word(match[0]), plain)
    for pattern, replacement in (*_DIGIT_WORDS, *_DODGES):
        plain = pattern.sub(replacement, plain)
    plain = _SH.sub(r"\1 self-harm", plain)
    return re.sub(r"[^\S\n]+", " ", plain).strip()


def _is_core(spaced: str) -> bool:
    """Whether letters with separators spell words that matter here: "a b c d" stays as it is."""
    joined = re.sub(r"[^a-z]", "", spaced)
    return any(word in joined for word in (*_MASKED, "kms", "myself", "unalive", "selfharm"))


@functools.lru_cache(maxsize=1 << 14)
def _word(word: str) -> str:
    """One word, spelled plainly."""
    if word in _CHAT:
        return _CHAT[word]
    if "!" in word:
        as_letter = word.replace("!", "i")
        return as_letter if as_letter in (*_MASKED, *_CORE) else word
    if "*" in word:
        hidden = re.compile("".join("[a-z]?[a-z]" if letter == "*" else re.escape(letter) for letter in word))
        return next((core for core in _MASKED if hidden.fullmatch(core)), word)
    letters = sum(letter.isalpha() for letter in word)
    if letters < len(word) and letters >= 1 and not word.isdigit() and "'" not in word:
        as_letters = word.translate(_LEET)
        # The one that 1 stands for, i or l, shows in the result.
        for candidate in (as_letters, word.replace("1", "l").translate(_LEET)):
            candidate = _REPEATED.sub(r"\1", candidate)
            if candidate in _MASKED or candidate in _CORE or candidate in ("kms", "unalive", "life", "live"):
                return candidate
        if letters >= 3 and as_letters.isalpha() and word[-1].isalpha() and len(word) - letters <= 2:
            word = as_letters
    word = _REPEATED.sub(r"\1", word)
    if word in ("kil", "kll", "kiil", "klil"):
        return "kill"
    if len(word) < 5 or not word.isascii() or word in _OTHER_WORDS:
        return word
    near = [core for core in _CORE if core[0] == word[0] and abs(len(core) - len(word)) <= 2]
    return next(iter(difflib.get_close_matches(word, near, n=1, cutoff=0.82)), word)
