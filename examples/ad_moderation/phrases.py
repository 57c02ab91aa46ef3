"""The words of the demo: clauses and values whose combinations make every ad.

A template is a combination of clauses (lead, claim, tail of the offending sentence; subject, verb, object, time of a
harmless one). A value is a combination too (a product of brand and kind, a topic of two words). `part_of` assigns every
combination to one of four disjoint parts by a checksum. So a held-out template or value never occurs in training, but
its words do. SFT uses `demonstrations`. The prompts of the reward model and of PPO use `practice` too, as prompts are
less scarce than annotated answers. `validation` and `test` are held out.

A claim has two slots: `{p}` is the product and `{t}` the rule's topic, which the compliant rewrite keeps. Every claim
has a cue of its rule and of no other; no other sentence has a cue. `tests/examples/test_ad_moderation.py` checks the
tables.
"""

import zlib
from dataclasses import dataclass

PARTS = ("demonstrations", "practice", "validation", "test")
_PART_BY_TENTH = ("demonstrations",) * 4 + ("practice",) * 2 + ("validation",) * 2 + ("test",) * 2


def part_of(*pieces: str) -> str:
    """Return the part of a combination: four tenths are demonstrations, two tenths each of the others."""
    return _PART_BY_TENTH[zlib.crc32("|".join(pieces).encode()) % 10]


@dataclass(frozen=True)
class Rule:
    """One rule of `policy.md`, with violations (`cues`, `claims`) and remedies (`rewrites`, `disclosure`).

    A topic is one of `kinds` behind one of `modifiers`; `decoys` are compliant sentences on a topic. `cues` and
    `disclosure` are regular expressions over lower-case text.
    """

    number: int
    name: str
    cues: str
    disclosure: str
    rewrites: tuple[str, ...]
    modifiers: tuple[str, ...]
    kinds: tuple[str, ...]
    claims: tuple[str, ...]
    decoys: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    """Entries separated by ` | ` or by line ends."""
    return tuple(entry.strip() for line in text.strip().splitlines() for entry in line.strip().split(" | "))


HEALTH = Rule(
    number=1,
    name="health claims",
    cues=r"cure[sd]?|heal(s|ed)?|treats|banish(es)?|wipes out|gets? rid of|reverses|miracle|pills",
    disclosure=r"not a medicine|doctor",
    rewrites=("{p} is not a medicine for {t}.",),
    modifiers=_list("back | knee | neck | skin | chest | tooth | foot | hand | joint | muscle"),
    kinds=_list("pain | ache | rash | cramps | swelling | itching"),
    claims=_list("""{p} cures {t} in a week. | This {p} heals {t} for good. | Use {p} and it wipes out {t}.
        Take {p} daily and your {t} is healed. | One touch of {p} banishes {t}.
        Say goodbye to {t}, the cure is here. | {p} gets rid of {t} overnight.
        The miracle {p} treats {t} without pills. | Cured of {t} in three days, thanks to {p}."""),
    decoys=_list("""Ask a doctor about {t}. | We make no promise about {t}. | This does nothing for {t}.
        Your doctor knows more about {t}. | We do not claim to help with {t}."""),
)

INCOME = Rule(
    number=2,
    name="income promises",
    cues=r"earns?|guaranteed|(get|gets) rich|makes? (you )?\$|pays you|quit your job|doubles? your money"
    r"|sure profit|passive income|retire early",
    disclosure=r"vary|no promise|may be less",
    rewrites=("Results with {p} vary and {t} is no promise.",),
    modifiers=_list("$1 | $2 | $3 | $4 | $5 | $6 | $7 | $8 | $9"),
    kinds=_list("00 a day | 00 a week | 00 a month | 50 a day | 50 a week | 50 a month | 000 a month"),
    claims=_list("""Earn {t} from home with {p}. | {p} pays you {t}, guaranteed. | Make {t} with no work at all.
        Get rich with {p} and bank {t}. | Quit your job, {p} brings {t}.
        A sure profit of {t} comes with {p}. | Double your money when {p} returns {t}.
        Owners of {p} earn {t} with no risk. | Passive income of {t} is yours with {p}."""),
    decoys=_list("""Most buyers save less than {t}. | Our shop rent is {t}. | We gave {t} to a charity.
        Our team pays {t} for its office. | The prize fund is less than {t}."""),
)

MINORS = Rule(
    number=3,
    name="minors",
    cues=r"kids?|teens?|children|pupils?|pocket money|mum and dad|parents|(to|after) school|classmates",
    disclosure=r"adults",
    rewrites=("Adults aged 18 and over get {t} with {p}.",),
    modifiers=_list("a free | a red | a paper | a blue | a toy | a lucky | a gold | a mini"),
    kinds=_list("poster | robot | star | comic | balloon | card | kite | badge"),
    claims=_list("""Kids, grab {p} and win {t}. | Hey teens, {p} comes with {t}. | Ask your parents for {p} and get {t}.
        Spend your pocket money on {p} for {t}. | {p} is made for children and has {t}.
        Every kid wants {p} and {t}. | Bring {p} to school and show {t}. | Pupils who buy {p} receive {t}.
        Teens love {p} and there is {t} inside."""),
    decoys=_list("""Adults get {t} in the box. | The first ten buyers win {t}. | Our staff like {t} a lot.
        Grown-ups can collect {t} too. | Order by phone and receive {t}."""),
)

FEAR = Rule(
    number=4,
    name="fear",
    cues=r"ruins?|destroys?|afraid|too late|in danger|everything|panic|regret|nightmare|doomed",
    disclosure=r"prepare|plan",
    rewrites=("{p} is one way to prepare for {t}.",),
    modifiers=_list("house | city | night | winter | summer | office | car | street"),
    kinds=_list("fires | floods | thieves | storms | power cuts | gas leaks"),
    claims=_list("""Without {p} the next {t} will ruin your life. | Buy {p} now or {t} will destroy your home.
        Be afraid, {t} come for your family. | You lose everything to {t} without {p}.
        It is too late for {p} after {t}. | Your home is in danger of {t}, get {p}.
        Panic about {t} and buy {p}. | Ignore {p} and regret it with {t}.
        Do not wait until {t} ruin your family."""),
    decoys=_list("""Our blog has news on {t}. | The city has tips on {t}. | Read our free page about {t}.
        Our guide covers {t} as well. | A short film about {t} is online."""),
)

PROOF = Rule(
    number=5,
    name="false proof",
    cues=r"out of ten|prove[ns]?|proof|agree|stud(y|ies)|confirm(s|ed)?|endorsed?|award|swear by|certified|recommend",
    disclosure=r"not tested|judge for yourself",
    rewrites=("So far {t} have not tested {p}.",),
    modifiers=_list("top | young | local | Swiss | old | famous | army | village"),
    kinds=_list("dentists | chefs | engineers | nurses | pilots | farmers | lawyers | scientists"),
    claims=_list("""Nine out of ten {t} choose {p}. | {p} is proven by {t}. | All {t} agree that {p} is the best.
        A secret study by {t} confirms {p}. | Endorsed by {t}, {p} never fails.
        The top award of {t} went to {p}. | Tests by {t} prove {p} is perfect. | Even {t} swear by {p} now.
        We know that all {t} recommend {p}."""),
    decoys=_list("""Our office is next to some {t}. | Some of our buyers are {t}. | We send a newsletter to {t}.
        We also have a shop for {t}. | Our founders were {t} once."""),
)

DATA = Rule(
    number=6,
    name="personal data",
    cues=r"(send|enter|tell us|text us|upload|hand over|type in|need|collects?|shares?|sells?|read) (us )?your"
    r"|is shared",
    disclosure=r"never asks for|private",
    rewrites=("{p} never asks for your {t}.",),
    modifiers=_list("bank | mail | work | school | phone | home | tax | health"),
    kinds=_list("password | number | address | card | file | code | photo | record"),
    claims=_list("""Send us your {t} to get {p}. | Enter your {t} to unlock {p}. | We share your {t} with anyone.
        {p} sells your {t} to partners. | Tell us your {t} and {p} is free.
        Upload your {t} before you buy {p}. | Hand over your {t} to save on {p}.
        We need your {t} to ship {p}. | Your {t} is shared when you use {p}."""),
    decoys=_list("""Nobody here wants your {t}. | Your {t} stays with you. | Please hide your {t} from us.
        We have no use for your {t}. | Your {t} is your own business."""),
)

RULES = (HEALTH, INCOME, MINORS, FEAR, PROOF, DATA)

# A product is a brand and a kind of thing.
BRANDS = _list("""Sunny | Nova | Lucky | Royal | Silver | Golden | Alpha | Delta | Polar | Ocean | Forest | Rocket
    Tiger | Panda | Eagle | Comet | Maple | Lotus | Pixel | Turbo | Magic | Prime | Ultra | Happy""")
KINDS = _list("""tea | app | lamp | soap | drink | watch | cream | mat | course | pillow | phone | bike | tent | shirt
    radio | heater | juice | bottle | blender | desk | kettle | jacket | candle | oven | camera | mixer | fan | mug""")

LEADS = _list("""Good news: | Look here: | Today only: | At last: | Friends: | New this week: | Hello: | Believe us:
    From our shop: | Just out: | Hurry: | Our best offer:""")
TAILS = _list("""today | right now | this week | at our shop | before Sunday | from Monday on | in every town | all year
    again | as always | for real | in the end""")

OPENERS = _list("""Meet {p}, new this year. | Here is {p} for your home. | Try {p} this weekend.
    {p} is back in our shop. | Say hello to {p}. | We made {p} for busy people. | {p} comes in blue and green.
    Look at {p} on our page. | Our new {p} is out now. | Discover {p} in every store.
    You asked for it, so here is {p}. | Enjoy {p} at home. | Welcome {p} to your home. | This week we show {p}.
    The new {p} is in our shop. | {p} comes in three colors.""")
SUBJECTS = _list(
    "Our team | This shop | The crew | Every store | Our partner | The courier | Your neighbor | The manager"
)
VERBS = _list("ships | packs | wraps | tests | repairs | prints | paints | sells | delivers | cleans")
OBJECTS = _list("each box | every order | all parcels | the parts | two colors | many sizes | gift cards | the labels")
TIMES = _list("on Monday | within a day | by hand | with care | for free | at noon | in town | all week | online")
