"""What the wording of a message says that a sentence embedding blurs: who, when, negated or not, figurative or not.

Each pattern is one feature, 1 or 0. The classifier weighs them together with the embedding; none decides alone.
Patterns read normalized text.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SELF = r"(?:my ?self|me self|me)"
_BODY = r"(?:arms?|wrists?|legs?|thighs?|skin|body|hands?|veins?|stomach|face|hips?|ankles?|laps?)"
_GONE = r"(?:dead|gone|never born|not born|not alive|not here|no more)"
_BE = r"(?:live|living|be alive|being alive|be here|exist|existing|wake up|wake|go on|be around|stay alive|breathe)"
_KIN = (
    r"(?:friend|bestie|sister|sis|brother|bro|mom|mum|mother|dad|father|son|daughter|wife|husband|girlfriend|boyfriend|"
    r"partner|ex|cousin|uncle|aunt|niece|nephew|grandson|granddaughter|grandma|grandmother|grandfather|roommate|flatmate|"
    r"classmate|batchmate|course mate|coworker|colleague|neighbou?r|student|child|kid|teacher|homie|girl|buddy|mate)s?"
)
_FATAL = (
    r"(?:suicid\w*|kill\w* (?:himself|herself|themsel\w+|him|her|them)|(?:wants?|going|wish\w*|tried|ready|threat\w+) to "
    r"(?:die|be dead|kill|end|hurt|not be)|end (?:it|his|her|their)|overdos\w+|cut(?:s|ting)?\b|self-harm\w*|"
    r"hurt\w* (?:himself|herself|themsel\w+)|(?:not|don't|doesn't) want to (?:live|be here|be alive))"
)
_RISK = (
    rf"(?:suicid\w*|kill\w* {_SELF}|end\w* (?:my|it|this) ?(?:life|all)?|(?:harm|hurt|cut|injur)\w* {_SELF}|self-harm\w*|"
    r"take my (?:own )?life|want to die|wanted to die|dying|die|death|self-injur\w*)"
)

PATTERNS: dict[str, str] = {
    # The wish, the act and the look for a way, in the first person.
    "kill_self": rf"\bkill(?:ing|ed|in)?'? {_SELF}\b(?! (?:of|for|if|when|softly))|\b(?:kill|murder)in' myself",
    "suicide": r"\bsuicid\w*|\bsuicid",
    "end_life": r"\bend(?:ing|ed)? (?:my|this|to my|of my) (?:own )?(?:life|days|existence|suffering)\b|\bfinish(?:ing)? (?:with )?my(?: ?self| life)|"
    r"\b(?:take|taking|took) my (?:own )?life\b|\bmy (?:own )?life (?:will |to )?(?:end|over)\b|\bown hand\b",
    "end_it": r"\b(?:end(?:ing|s)?|finish) (?:it|everything|am|things)(?: all| now| tonight| today| for good| soon|\W|$)|\bit ends (?:here|tonight)",
    "want_die": r"\b(?:want|wan|wanted|wish|ready|going|need|like|about|decided?|prefer|rather|plan\w*|deserve|waiting|hop\w+|prepared?|trying|try)"
    r"(?: to| be to)? (?:die|be dead|kill|death)\b|\bi (?:will|shall|go|want) die\b|\bmake i (?:just )?die",
    "hang_shoot": rf"\b(?:hang(?:ing)?|shoot(?:ing)?|drown(?:ing)?|stab(?:bing)?|top(?:ping)?|finish|starve|do(?:ing)? away with|off|gas|poison) {_SELF}\b",
    "jump": r"\bjump(?:ing|ed)? (?:off|from|in front|out|into|in)|\b(?:going to|to|want to|and|i'll|will) jump\b",
    "overdose": r"\boverdos\w*|\b(?:took|taken|take|taking|swallow\w*|drank|drunk|consumed|drink) (?:\w+ ){0,4}(?:pills?|tablets?|meds|medication|poison|bottle|medicines?|everything)",
    "brains": r"\b(?:blow|put)\w* (?:my|a bullet)|\bslit(?:ting)? my|\bgun to my|\beat(?:ing)? my gun|\bpull(?:ing)? (?:this|the) trigger",
    "method_search": r"\b(?:way|ways|how|method|methods|quick\w*|pain\w*|easiest|fastest)\b[^.?!]{0,40}\b(?:to die|to (?:kill|end)|suicide|of dying|overdose|end (?:my|it))",
    "note": r"\b(?:suicide|goodbye|farewell|last) (?:note|letter|message|post)s?\b|\b(?:wrote|written|writ\w+) (?:the |my |a |letters?|note)+(?:note|letters?|to)?",
    "plan": r"\b(?:have|got|had) (?:a|my|the) (?:plan|date)|\b(?:set|picked|chose|chosen) (?:a|the) (?:date|place|day|time)|\bplan(?:ning|ned) (?:my|to die|to end|to kill|it)",
    "attempt": r"\battempt(?:ed|ing|s)?\b|\btried to (?:end|die|kill|take my)",
    # The wish to be gone.
    "not_live": rf"\b(?:don't|do not|not|no longer|never|ain't|no|without|tired of|sick of|done|hate|point of|point in|reason to|will to|use of|force to|desire to|desire of)(?: \w+){{0,3}} {_BE}\b",
    "wish_gone": rf"\bwish\w*(?: \w+){{0,4}} (?:{_GONE}|born|die|died|disappear|not wake|wouldn't wake|stop existing|over)\b",
    "not_wake": r"\b(?:not|never|won't|don't|without|no|shan't|wouldn't|didn't)(?: ever)? wak(?:e|ing)(?: up)?\b|\bsleep (?:forever|and never)|\bdie in my sleep",
    "better_off": r"\b(?:better|happier|easier|better off|relieved|peaceful|lighter)\b[^.?!]{0,50}\b(?:without me|if i|i die|i was|i were|me gone|i wasn't|i'm gone|i am not)|\bwithout me in it",
    "burden": r"\bburden\b|\bin the way\b|\bno use to\b|\buseless\b|\bwaste of (?:space|air)",
    "no_reason": r"\b(?:no|any|see the|what's the|what is the|a) (?:reason|point|purpose|use|meaning|sense)\b[^.?!]{0,25}\b(?:liv\w+|life|going on|alive|exist\w*|stay|continue)",
    "worth_living": r"\bworth living\b|\blife (?:is|has) (?:not worth|no meaning|pointless|meaningless)|\bnothing (?:left )?to live for|\btired of (?:living|life|being alive|this life|this world)",
    "miss_me": r"\b(?:no ?one|nobody|no ?body|anyone|anybody|who)\b[^.?!]{0,25}\b(?:miss me|care if i|notice if i|cry)",
    "disappear": r"\b(?:disappear|vanish|not exist|stop existing|cease to exist|fade away|erase myself)\b",
    "take_me": r"\b(?:god|lord|he|heaven|death|cancer|truck|bus|car|train)\b[^.?!]{0,20}\b(?:takes? me|hits? me|hit by)|\bhit by a",
    "dont_care": r"\bdon't care (?:if|whether) i\b|\bwouldn't mind\b",
    # Harm to the own body.
    "self_harm": r"\bself[- ]?(?:harm|injur|mutilat)\w*",
    "cut_self": rf"\b(?:cut|cuts|cutting|cuttin|burn|burned|burning|hurt|hurting|harm|harming|injure|wound|hit|punch|bite|scratch|beat|slap|punish\w*|bang)(?:'?ing)?(?: on| up| open)? (?:{_SELF}|my (?:\w+ )?{_BODY}|my head)\b",
    "cuts_on": rf"\b(?:scars?|cuts?|marks?|burns?|wounds?|barcodes?)\b[^.?!]{{0,30}}\b{_BODY}\b|\b{_BODY}\b[^.?!]{{0,25}}\b(?:scars?|cuts?|cut up|marks)\b",
    "blade": r"\b(?:blades?|razors?|lighter)\b",
    "bleed": r"\bbleed\w*|\bblood\w*|\bbled\b",
    "cut_habit": r"\bi (?:just |always |have been |been |keep |started |still )*(?:cut|cutting)\b(?! (?:the|a|an|bread|my (?:finger|hair|grass|hours|thumb)))|\bcutting\b[^.?!]{0,20}\b(?:again|helps|cope|calms?|release)|\burges?\b",
    "relapse": r"\brelaps\w+|\bclean (?:for|\d)|\bdays clean\b",
    # When, and with what.
    "now": r"\b(?:tonight|right now|now now|now itself|this (?:evening|night|minute|moment|hour)|in (?:an|one|a few|ten|few|some|\d+) (?:hour|minute|min)s?|any minute|just now|by morning|before midnight)\b",
    "soon": r"\b(?:today|tomorrow|soon|already|about to|going to|ready|last (?:night|day|time))\b",
    "goodbye": r"\b(?:goodbye|good bye|bye|farewell|cheerio|forgive me|tell (?:my|them|everyone|papa|mama)|i'm sorry|sorry mummy)\b",
    "at_hand": r"\b(?:in my (?:hand|hands|lap|mouth)|in front of me|next to me|beside me|with me|on the table|lined up|loaded|around my neck|against my|to my (?:head|wrist|throat)|on my knees|laid out|tied)\b",
    "standing": r"\b(?:standing|sitting|sat|parked|on|at|by|near|walking to)\b[^.?!]{0,15}\b(?:bridge|roof|rooftop|ledge|edge|tracks?|platform|cliffs?|balcony|terrace|overpass|railing|railway)\b",
    "means": r"\b(?:pills?|tablets?|gun|pistol|rifle|shotgun|rope|noose|poison|bridge|roof|ledge|cliff|train|knife|knives|trigger|strap)\b",
    "done_it": r"\bi(?:'ve| have| just|'ve just| already)? (?:took|taken|swallowed|drank|drunk|did it|done it)\b|\bby the time\b",
    # Whose.
    "first_person": r"\b(?:i|i'm|i've|i'd|i'll|me|my|myself)\b",
    "opens_with_i": r"^(?:\W*)(?:i|i'm|i've|i'd|i'll|my life)\b",
    "third_person": r"\b(?:he|she|they|he's|she's|they're|his|her|their|himself|herself|themself|themselves)\b",
    "kin_at_risk": rf"\b(?:{_KIN}|someone|somebody|guy|he|she|they)\b[^.?!]{{0,60}}\b{_FATAL}",
    "kin_says": rf"\b(?:{_KIN}|someone|he|she|they)\b[^.?!]{{0,20}}\b(?:says?|said|told|tells|texted|keeps|threat\w+|sent|posted|is talking|has been|talks|wrote|telling|going)\b",
    "kin_gone": rf"\b(?:{_KIN}|dog|cat|singer|actor|celebrity|baby)\b[^.?!]{{0,25}}\b(?:died|passed|killed (?:him|her)self|took (?:his|her|their) own|was (?:killed|murdered|shot)|is dead|suicide)\b|\blost (?:my|our|a|him|her)|\bgriev\w+|\bbereave\w+|\bfuneral\b",
    "second_person": r"\byou(?:r|rself)?\b",
    # What takes it back.
    "negated_risk": rf"\b(?:not|never|no|isn't|wasn't|wouldn't|without|don't|didn't|haven't|nothing)\b(?: (?!but\b)[\w']+){{0,4}} {_RISK}",
    "afraid_of_death": r"\b(?:afraid|scared|terrified|fear|frightened|worried|phobia|panic)\b[^.?!]{0,25}\b(?:of death|of dying|die|dying|death|crash\w*)|\bfeel\w* like i'?m (?:going to die|dying)",
    "past": r"\byears? ago\b|\bused to\b|\bwhen i was\b|\bback (?:in|then)\b|\blong (?:time )?ago\b|\bsurviv\w+|\brecover\w+|\bfree (?:of|from)\b|\bbehind me\b|\bin (?:19|20)\d\d\b|\bgrateful\b|\byounger me\b|\bclean for (?:\w+ )?years\b|\bin my (?:twenties|teens)\b",
    "well_now": r"\b(?:i'm|i am|life is|now|today)\b[^.?!]{0,15}\b(?:well|good|happy|better now|fine now|past that|glad|grateful|proud|safe)\b",
    "but_kids": r"\b(?:never|wouldn't|couldn't)\b[^.?!]{0,20}\b(?:do that|do it|do anything|act on)\b",
    "figurative_kill": r"\b(?:is|are|was|be|'s|were|it's|literally|slowly) (?:\w+ )?(?:killing|murdering|destroying) (?:me|us|him|my)\b|\b(?:will|would|going to|gonna) (?:kill|murder) (?:me|us)\b|\bkill(?:s|ed|er|ing)? (?:for|it|time|two birds|your darlings|the (?:mood|vibe|noise|engine|lights|idea|feature|process|boss|dragon|server|queen))\b",
    "figurative_die": r"\b(?:dying|died|die|dead) (?:of|for|to|from|laughing|inside the|happy|tired|serious|battery|line)\b|\bto die for\b|\bdead tired\b|\bhalf dead\b|\bi(?:'m| am)? (?:literally )?(?:dead|deceased|ded)\b",
    "laughs": r"\b(?:lol|lmao+|haha\w*|ha ha|ha|rofl|omg|lmfao|joking|jk)\b|[\U0001F600-\U0001F606\U0001F923\U0001F480\U0001F605]",
    "computing": r"\b(?:process|python|linux|server|script|thread|docker|container|bash|java|javascript|sql|query|code|app|program|signal|command|battery|laptop|phone|database|git|branch|build|windows|terminal|ubuntu|router|wifi|regex|function|api|session|daemon|kernel)\b",
    "gaming": r"\b(?:game|gaming|boss|level|minecraft|fortnite|halo|gta|zelda|skyrim|respawn|zombies?|dragon|player|enem(?:y|ies)|team|match|map|weapon|xbox|playstation|quest|ranked|loot|goblins?|d&d)\b",
    "fiction": r"\b(?:novel|character|story|song|lyrics?|band|album|movie|film|show|season|series|netflix|scene|poem|book|chapter|sings?|episode|play|author|screenplay|quote[ds]?|headline|article|squad|roleplay|villain|hero)\b",
    "study": r"\b(?:essay|thesis|research|statistics|rates?|theory|exam on|summari[sz]e|explain|discuss|history|class|sociology|philosoph\w+|debate|study|prevalence|evidence|literature|sources|laws?|century|war)\b",
    "profession": r"\b(?:nurse|clinician|social worker|counsel(?:l)?or in|psychologist|client'?s?|patients?|training|workshop|policy|staff|prevention|assess\w*|screening|volunteer|hotline|crisis line|students|ward|guideline|documentation|document|risk factors|warning signs|postvention)\b",
    "household": r"\b(?:weeds?|ants?|mold|plants?|roses?|garden|recipe|cook\w*|kitchen|onion|lobster|bread|chicken|stain|bugs?|fleas?|finger|shaving|oven|stove|cut (?:costs|back|down))\b",
    "medical": r"\b(?:dose|ibuprofen|paracetamol|side effects|surgery|stitches|doctor|prescri\w+|antidepressants?|sertraline|headache|migraine|vet|blood pressure|hospice|cancer|diagnos\w+)\b",
    "asks": r"^(?:how|what|which|why|who|when|where|is|are|does|do|did|can|could|should|would|in which|will)\b",
    "asks_at_end": r"\?\s*$",
    "hopeless": r"\b(?:hopeless|worthless|pointless|give up|given up|giving up|can't (?:take|do|go on|bear|live)|no future|no hope|no way out|way out|only (?:option|solution|answer|escape))\b",
    "relationship": r"\b(?:marriage|relationship|divorce|married|dating|breakup|cheat\w*|in-laws|wedding|boyfriend|girlfriend|husband|wife)\b",
    "work_school": r"\b(?:job|work|boss|school|college|exam|grades?|promotion|manager|career|homework|interview)\b",
}  # fmt: skip
_COMPILED = [re.compile(pattern) for pattern in PATTERNS.values()]

# Sentences of a longer text that are looked at alone: those with any word that a crisis is put into.
_CUE = re.compile(
    r"\b(?:di(?:e|ed|es)|dying|dead|death|deaths|kill\w*|suicid\w*|liv(?:e|ing) (?:any|no|like|without|another|for)|to live|living|"
    r"alive|exist\w*|born|wake|waking|asleep forever|end(?:ing|s)? (?:it|my|this|every|things)|ends (?:here|tonight)|cut(?:s|ting|tin)?|"
    r"hurt(?:ing)? (?:my|me)|harm\w*|self-\w+|burn\w*|bleed\w*|blood|blades?|razor|scars?|scratch\w*|overdos\w*|pills?|tablets?|rope|"
    r"noose|gun|pistol|rifle|bridge|roof|jump\w*|hang(?:ing)?|poison|goodbye|farewell|note|burden|without me|be here|"
    r"around (?:any|much)|go on|point of|point in|reason to|worth|disappear\w*|vanish\w*|gone|attempt\w*|urges?|myself|accident|"
    r"insurance|take me|miss me|better off|own hand|own life)\b"
)


def has_cue(sentence: str) -> bool:
    """Whether a normalized sentence has any word that a crisis is put into, in whatever sense."""
    return bool(_CUE.search(sentence))


def wording_features(texts: Sequence[str]) -> NDArray[np.float32]:
    """One row of 0 and 1 per normalized text, one column per pattern."""
    return np.array([[bool(pattern.search(text)) for pattern in _COMPILED] for text in texts], dtype=np.float32).reshape(
        len(texts), len(_COMPILED)
    )
