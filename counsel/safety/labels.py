"""The classes of crisis detection, from the most to the least urgent."""

IMMINENT, ACTIVE, SELF_HARM, PASSIVE, OTHER_AT_RISK, NONE = LABELS = (
    "imminent",  # about to act, acting, or has just acted
    "active",  # wants to end their life: ideation, intent, plan, looks for a way
    "self-harm",  # hurts themselves or has the urge to, without the wish to die
    "passive",  # wishes to be dead or gone, sees no reason to live, without intent
    "other-at-risk",  # somebody else may be in danger
    "none",
)
RISKS = LABELS[:-1]
