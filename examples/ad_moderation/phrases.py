"""The words of the demo: every sentence pattern and value, in four disjoint parts.

Parts: `demonstrations` feeds supervised fine-tuning; `practice` adds patterns and values that only the prompts of the
reward model and of PPO draw on (annotated answers are scarce, prompts are not); `validation` and `test` are held out.
A pattern has two slots: `{p}` is the product and `{t}` the rule's topic (an ailment, a sum, a gift, ...), which the
compliant rewrite keeps. Every offending pattern has a cue of its own rule and none of another's; no other sentence
has any cue. What an answer may have to repeat is made of words that some demonstration's answer has, in new patterns
and combinations: a small model cannot write tokens that it never wrote. `tests/test_ad_moderation.py` holds the tables
to all of that.
"""

from dataclasses import dataclass

PARTS = ("demonstrations", "practice", "validation", "test")


@dataclass(frozen=True)
class Rule:
    """One rule of `policy.md`: what breaks it (`cues`, `offending`) and what repairs it (`rewrites`, `disclosure`).

    `offending`, `topics` and `decoys` map a part's name to its patterns or values; decoys are compliant sentences on
    the same topic. `cues` and `disclosure` are regular expressions over lower-case text.
    """

    number: int
    name: str
    cues: str
    disclosure: str
    rewrites: tuple[str, ...]
    topics: dict[str, tuple[str, ...]]
    offending: dict[str, tuple[str, ...]]
    decoys: dict[str, tuple[str, ...]]


def _parts(text: str) -> dict[str, tuple[str, ...]]:
    """Reads one paragraph per part (in the order of PARTS), entries separated by ` | ` or by line ends."""
    paragraphs = [" | ".join(line.strip() for line in part.strip().splitlines()) for part in text.split("--")]
    return {name: tuple(paragraph.split(" | ")) for name, paragraph in zip(PARTS, paragraphs, strict=True)}


def _grid(first: str, second: str, article: str = "") -> dict[str, tuple[str, ...]]:
    """Eight first words by eight second ones, dealt along the diagonals: all words are in all parts, no pair in two."""
    table = {name: () for name in PARTS}
    for i, one in enumerate(first.split()):
        for j, other in enumerate(second.split(", ")):
            part = ("demonstrations",) * 4 + ("practice",) * 2 + ("validation", "test")
            table[part[(i + j) % 8]] += (f"{article}{one} {other}",)
    return table


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HEALTH = Rule(
    number=1,
    name="health claims",
    cues=r"cure[sd]?|heal(s|ed)?|treats|banish(es)?|wipes out|gets? rid of|reverses|miracle|pills",
    disclosure=r"not a medicine|doctor",
    rewrites=("{p} is not a medicine for {t}.", "See a doctor about {t}, {p} is no remedy."),
    topics=_grid(
        "chronic severe sudden mild old nightly bad constant",
        "back pain, insomnia, migraine, asthma, eczema, acne, flu, cough",
    ),
    offending=_parts("""{p} cures {t} in a week. | This {p} heals {t} for good. | Use {p} and it wipes out {t}.
        Take {p} daily and your {t} is healed. | One touch of {p} banishes {t} for good.
        Say goodbye to {t}, the cure is here. | {p} gets rid of {t} in ten minutes.
        Nothing treats {t} faster than {p}.
        The miracle {p} treats {t} without pills. | Only {p} reverses {t} while you sleep.
        Your {t} will be cured in three days. | With {p} you get rid of {t} today.
        -- {p} reverses {t} in a week. | Take {p} and get rid of {t} for good. | Say goodbye to pills, {p} heals {t}.
        Your {t} is healed while you sleep. | This miracle cures {t} in ten minutes.
        Nothing wipes out {t} faster than {p}.
        -- With {p} your {t} will be healed. | One {p} daily cures {t} for good. | {p} banishes {t} while you sleep.
        Only the miracle {p} gets rid of {t}.
        -- Use {p} daily and {t} is cured. | The cure is here for {t}. | {p} treats {t} in three days without pills.
        Nothing heals {t} faster, {p} is here."""),
    decoys=_parts("""Ask a doctor about {t}. | We make no promise about {t}. -- This does nothing for {t}.
        -- Your doctor knows more about {t}. -- We do not claim to help with {t}."""),
)

INCOME = Rule(
    number=2,
    name="income promises",
    cues=r"earns?|guaranteed|(get|gets) rich|makes? (you )?\$|pays you|quit your job|doubles? your money"
    r"|sure profit|passive income|retire early",
    disclosure=r"vary|no promise|may be less",
    rewrites=("Results with {p} vary and {t} is no promise.", "What {p} brings may be less than {t}."),
    topics=_parts("1 | 2 | 5 | 8 -- 9 -- 3 | 7 -- 4 | 6"),
    offending=_parts("""Earn {t} from home with {p}. | {p} pays you {t}, guaranteed. | Make {t} with no work at all.
        Get rich with {p} and bank {t}. | Quit your job, {p} brings you {t}. | A sure profit of {t} comes with {p}.
        Double your money when {p} returns {t}. | Owners of {p} earn {t} with no risk.
        You will make {t} while you sleep.
        With {p} a passive income of {t} is yours. | Your guaranteed profit is {t}.
        It is easy to get rich, {p} pays {t}.
        -- Owners of {p} get rich with {t}. | You will earn {t} while you sleep.
        With {p} a sure profit of {t} is yours.
        {p} brings you {t}, guaranteed at home. | Quit your job and make {t} at home.
        A passive income of {t} comes from {p}.
        -- With {p} you will earn {t}. | Your sure profit from {p} is {t}. | Get rich at home when {p} pays {t}.
        {p} returns {t} with no risk, guaranteed.
        -- Quit your job, you earn {t} with {p}. | It is a guaranteed income of {t}.
        Owners of {p} make {t} with no work.
        Double your money and bank {t} with {p}."""),
    decoys=_parts("""Most buyers save less than {t}. | Our shop rent is {t}. -- We gave {t} to a charity.
        -- Our team pays {t} for its office. -- The prize fund is less than {t}."""),
)

MINORS = Rule(
    number=3,
    name="minors",
    cues=r"kids?|teens?|children|pupils?|pocket money|mum and dad|parents|(to|after) school|classmates",
    disclosure=r"adults",
    rewrites=("Adults aged 18 and over get {t} with {p}.", "Only adults may order {p} and {t}."),
    topics=_grid(
        "red blue green tiny magic golden secret funny",
        "poster, robot, comic, puzzle, balloon, card, yo-yo, badge",
        "a ",
    ),
    offending=_parts("""Kids, grab {p} and win {t}. | Hey teens, {p} comes with {t}.
        Ask your parents for {p} and get {t}.
        Spend your pocket money on {p} for {t}. | {p} is made for children and has {t}. | Every kid wants {p} and {t}.
        Bring {p} to school and show {t}. | Pupils who buy {p} receive {t}. | Teens love {p} and there is {t} inside.
        Your classmates have {p} and {t}. | For children under 12 there is {t}. | Get {t} after school with {p}.
        -- Kids love {p} and {t}. | Every kid wants {p} with {t} inside. | Bring {t} and show your classmates {p}.
        Ask your parents for {t}. | Pupils get {p} and show {t} after school. | {p} has {t} and is for children.
        -- Teens who buy {p} win {t}. | Spend your pocket money and get {t}. | Your parents love {p} and {t}.
        Kids, get {p} and receive {t}.
        -- Hey children, there is {t} with {p}. | Bring {p} to school and win {t}.
        Get {p} and show your classmates {t}.
        Pupils have pocket money for {p} and {t}."""),
    decoys=_parts("""Adults get {t} in the box. | The first ten buyers win {t}. -- Our staff like {t} a lot.
        -- Grown-ups can collect {t} too. -- Order by phone and receive {t}."""),
)

FEAR = Rule(
    number=4,
    name="fear",
    cues=r"ruins?|destroys?|afraid|too late|in danger|everything|panic|regret|nightmare|doomed",
    disclosure=r"prepare|plan",
    rewrites=("{p} is one way to prepare for {t}.", "You can plan for {t} with or without {p}."),
    topics=_grid(
        "big sudden silent violent sneaky local winter city",
        "burglars, fires, floods, storms, thieves, dogs, wasps, hackers",
    ),
    offending=_parts("""Without {p} the next {t} will ruin your life. | Buy {p} now or {t} will destroy your home.
        Be afraid, {t} come for your family. | You lose everything to {t} without {p}.
        It is too late for {p} after {t}.
        Your home is in danger of {t}, get {p}. | Panic about {t} and buy {p}. | Ignore {p} and regret it with {t}.
        Soon {t} take everything from you. | Do not wait until {t} ruin your family.
        The nightmare of {t} starts without {p}.
        You are doomed by {t}, so order {p}.
        -- Your family is doomed by {t}. | Without {p} you lose everything to {t}.
        Ignore {t} and your home is in danger.
        Be afraid of {t} and get {p}. | Do not wait with {p} until {t} destroy you.
        The next {t} will destroy your family.
        -- You will regret {t} without {p}. | Soon {t} ruin your home, so buy {p}.
        It is a nightmare of {t} without {p}.
        Panic now or {t} come for you.
        -- Your life is in danger from {t}. | Buy {p} or be afraid of {t}. | Without {p} it is too late after {t}.
        You lose your home to {t} and regret it."""),
    decoys=_parts("""Our blog has news on {t}. | The city has tips on {t}. -- Read our free page about {t}.
        -- Our guide covers {t} as well. -- A short film about {t} is online."""),
)

PROOF = Rule(
    number=5,
    name="false proof",
    cues=r"out of ten|prove[ns]?|proof|agree|stud(y|ies)|confirm(s|ed)?|endorsed?|award|swear by|certified|recommend",
    disclosure=r"not tested|judge for yourself",
    rewrites=("So far {t} have not tested {p}.", "Judge for yourself if {p} suits you, not by {t}."),
    topics=_grid(
        "famous senior young local foreign modern retired busy",
        "dentists, chefs, engineers, nurses, pilots, farmers, lawyers, coaches",
    ),
    offending=_parts("""Nine out of ten {t} choose {p}. | {p} is proven by {t}. | All {t} agree that {p} is the best.
        A secret study by {t} confirms {p}. | Endorsed by {t}, {p} never fails. | The top award of {t} went to {p}.
        Tests by {t} prove {p} is perfect. | Even {t} swear by {p} now. | Every study shows that {t} choose {p}.
        There is proof from {t} that {p} works. | Confirmed by {t}, nothing beats {p}. | The leading {t} recommend {p}.
        -- All {t} recommend {p} now. | {p} is the best, {t} agree. | Every {p} is proven by {t}.
        A study by {t} shows that {p} works. | Even the leading {t} swear by {p}. | Nine out of ten {t} recommend {p}.
        -- Confirmed by {t}, {p} is the best. | There is a secret study by {t} on {p}. | {p} never fails, {t} agree.
        Even {t} prove that {p} works.
        -- All leading {t} swear by {p}. | The award of {t} confirms {p}. | Endorsed by {t}, {p} is perfect now.
        Nine out of ten {t} agree that {p} works."""),
    decoys=_parts("""Our office is next to some {t}. | Some of our buyers are {t}. -- We send a newsletter to {t}.
        -- We also have a shop for {t}. -- Our founders were {t} once."""),
)

DATA = Rule(
    number=6,
    name="personal data",
    cues=r"(send|enter|tell us|text us|upload|hand over|type in|need|collects?|shares?|sells?|read) (us )?your"
    r"|is shared",
    disclosure=r"never asks for|private",
    rewrites=("{p} never asks for your {t}.", "Keep your {t} private when you order {p}."),
    topics=_grid(
        "home bank work phone mail old new secret", "address, password, number, record, code, file, photo, diary"
    ),
    offending=_parts("""Send us your {t} to get {p}. | Enter your {t} to unlock {p}. | We share your {t} with anyone.
        {p} sells your {t} to partners. | Tell us your {t} and {p} is free. | Upload your {t} before you buy {p}.
        Hand over your {t} to save on {p}. | We need your {t} to ship {p}. | Your {t} is shared when you use {p}.
        {p} collects your {t} and keeps it. | No {p} until you send your {t}. | Just text us your {t} for {p}.
        -- Your {t} is shared with partners. | Send us your {t} and {p} is free. | We need your {t} before you use {p}.
        Enter your {t} to save on {p}. | {p} sells your {t} when you buy it. | No {p} before you send your {t}.
        -- Tell us your {t} to unlock {p}. | Upload your {t} and get {p}. | We share your {t} when you use {p}.
        {p} collects your {t} before you buy.
        -- Hand over your {t} before you buy {p}. | Just text us your {t} to save on {p}.
        We send your {t} to partners.
        Your {t} is shared until you buy {p}."""),
    decoys=_parts("""Nobody here wants your {t}. | Your {t} stays with you. -- Please hide your {t} from us.
        -- We have no use for your {t}. -- Your {t} is your own business."""),
)

RULES = (HEALTH, INCOME, MINORS, FEAR, PROOF, DATA)

# A brand is one entry of each row: 8,000 made-up names, dealt to the parts by a checksum of the name.
BRAND_SYLLABLES = (
    _words("""Vel Lum Nor Zan Tor Mel Kar Bel Sol Fen Dor Ral Pel Cal Bren Ost Wil Gran Tam Hol
        Quin Jas Bar Dal Gar Har Kel Lor Mar Ner Per Ser Ter Ver Yol Zil Ul Ar El Im"""),
    _words("a e i o u"),
    _words("""ra na to vi mo lex dia ro sta nel qua zo mi fo tis wen bix lo pa ki
        ba che dra fen gu han jo ket lin mar nox pel rik sun tal vek wo yan zil do"""),
)
KINDS = _words("""tea app lamp soap drink watch cream mat course pillow phone bike tent shirt radio heater juice
    bottle blender desk kettle jacket candle camera""")

OPENERS = _parts("""Meet {p}, new this year. | Here is {p} for your home. | Try {p} this weekend.
    {p} is back in our shop.
    Say hello to {p}. | We made {p} for busy people. | {p} comes in blue and green. | Look at {p} on our page.
    -- Our new {p} is out now. | Discover {p} in every store. | You asked for it, so here is {p}. | Enjoy {p} at home.
    -- Welcome {p} to your home. | This week we show {p}. | The new {p} is in our shop. | {p} comes in three colors.
    -- Have a look at {p}. | Now in store you find {p}. | {p} is new on our page. | We are happy to show {p}.""")
FILLERS = _parts("""Shipping is free on Monday. | It weighs very little. | The box is easy to open. | Colors may differ.
    Returns are open for 30 days. | Pick it up in our store. | It fits in any bag. | Made with care in a small town.
    Pay in two parts if you like. | The price is $20 this month. | Call us with any question. | Stock is limited.
    -- We answer mail within a day. | It comes with a short manual. | Gift wrap costs $2. | The handle is made of wood.
    Cleaning it is easy. | Two sizes are on offer. | Order online or by phone. | A spare part is in the box.
    -- Delivery is free on Friday. | It is light and easy to use. | The price is $35 this week.
    Visit our store in town.
    Returns cost nothing for 60 days. | The box is made of paper.
    -- Shipping takes two days. | It is small and fits in a drawer. | Pay by card or in cash.
    We open at nine on Sunday.
    The price is $48 online. | It comes with a long cable.""")
