"""The facts of the small world that the embedded model is trained on.

Every fact is in this one place, because the corpus states it and the instructions ask for it: a
question about something that the base never read would test luck, not fine-tuning.
"""

# Word lists are text, since the formatter would put a list literal on one word per line.
# ruff: noqa: SIM905
from __future__ import annotations

NAMES = (
    "Anna Ben Carla David Ella Finn Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul "
    "Rosa Sam Tina Tom Vera Will Yara Zoe"
).split()
PLACES = (
    "park kitchen garden school forest market harbour library barn attic bakery station "
    "museum cellar meadow tower"
).split()
THINGS = (
    "ball cup hat book kite box bag key lamp drum coat ring chair boat bell rope mug scarf "
    "basket bottle pencil clock plate spoon"
).split()
VERBS = "likes sees finds wants draws paints carries loses".split()
MOODS = "happy sad tired busy quiet proud hungry calm".split()
WEATHER = "sunny rainy windy cloudy snowy foggy".split()

# Every word occurs once, so that each has exactly one opposite.
OPPOSITES: list[tuple[str, str]] = [
    (pair.split("-")[0], pair.split("-")[1])
    for pair in (
        "hot-cold big-small tall-short fast-slow happy-sad wet-dry hard-soft light-dark up-down "
        "left-right in-out open-closed full-empty clean-dirty rich-poor strong-weak loud-quiet "
        "early-late near-far high-low thick-thin wide-narrow deep-shallow sweet-sour young-old "
        "good-bad first-last true-false day-night boy-girl man-woman king-queen brother-sister "
        "mother-father son-daughter uncle-aunt summer-winter north-south east-west top-bottom "
        "front-back start-end buy-sell give-take push-pull win-lose laugh-cry come-go rise-fall "
        "remember-forget ask-answer sit-stand love-hate friend-enemy yes-no always-never "
        "before-after above-below inside-outside over-under more-less many-few safe-dangerous "
        "easy-difficult brave-afraid sharp-blunt smooth-rough tight-loose alive-dead awake-asleep "
        "rare-common polite-rude cheap-expensive same-different arrive-leave morning-evening"
    ).split()
]

# The usual colour of a thing that has one.
COLOURED: dict[str, str] = {
    thing: colour
    for colour, things in {
        "red": "strawberry tomato cherry rose heart brick ladybird ruby poppy",
        "yellow": "lemon banana sun chick corn butter daffodil canary",
        "green": "frog leaf grass pea cucumber lime cactus parrot cabbage",
        "blue": "sky sea whale blueberry sapphire river cornflower",
        "white": "snow milk swan salt cloud sheep egg tooth goose lily",
        "black": "crow coal tyre ant raven panther beetle",
        "brown": "bear mud nut potato owl bread horse log",
        "grey": "elephant mouse stone rat wolf donkey ash dolphin",
        "pink": "pig flamingo ham tulip shrimp",
        "orange": "carrot pumpkin tiger fox goldfish",
        "purple": "plum grape violet beetroot lavender",
    }.items()
    for thing in things.split()
}
COLOURS = sorted(set(COLOURED.values()))

MEMBERS: dict[str, list[str]] = {
    kind: members.split()
    for kind, members in {
        "animal": "cat dog cow horse fox wolf bear mouse sheep goat pig lion tiger rabbit donkey "
        "elephant monkey deer camel squirrel",
        "bird": "owl crow swan goose duck hen eagle robin parrot raven sparrow penguin canary",
        "fruit": "apple pear plum cherry peach lemon banana grape strawberry lime melon fig",
        "vegetable": "carrot potato cabbage onion pea cucumber leek pumpkin beetroot turnip",
        "flower": "rose tulip lily daisy poppy violet daffodil lavender cornflower",
        "tool": "hammer saw drill spade rake axe brush knife chisel file",
        "drink": "milk water tea coffee juice lemonade cocoa",
        "toy": "doll kite ball puzzle robot marble teddy",
        "body part": "hand foot arm leg nose ear tooth knee thumb elbow",
        "vehicle": "car bus train lorry tractor bicycle van tram",
    }.items()
}
KIND_OF: dict[str, str] = {thing: kind for kind, things in MEMBERS.items() for thing in things}
UNCOUNTED = {*MEMBERS["drink"], "lavender"}
COUNTABLE = MEMBERS["animal"][:12] + MEMBERS["fruit"][:8] + THINGS[:12]

IRREGULAR: dict[str, str] = {
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "child": "children",
    "man": "men",
    "woman": "women",
    "sheep": "sheep",
    "deer": "deer",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "loaf": "loaves",
    "shelf": "shelves",
    "calf": "calves",
    "potato": "potatoes",
    "tomato": "tomatoes",
}
NOUNS: list[str] = sorted(
    {
        *IRREGULAR,
        *THINGS,
        *PLACES,
        *(noun for kind in MEMBERS if kind not in ("drink", "body part") for noun in MEMBERS[kind]),
        *"hand arm leg nose ear knee thumb bench dress glass dish peach watch church class".split(),
        *"berry puppy baby city lady story party pony bunny fairy bush wish kiss beach".split(),
        *"frog nut egg star tree house bridge road window table letter brother sister".split(),
    }
    - {"lavender", "grass", "corn"}
)
MAX_ADDEND = 10
MAX_SORTED = 20


def plural(noun: str) -> str:
    """The English plural of one of the world's nouns."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it, if it takes an article."""
    if noun in UNCOUNTED:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
