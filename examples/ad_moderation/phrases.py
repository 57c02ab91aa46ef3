"""The words of the demo: every sentence pattern and value, in four disjoint parts.

Parts: `demonstrations` feeds supervised fine-tuning; `practice` adds patterns and values that only the prompts of the
reward model and of PPO draw on (annotated answers are scarce, prompts are not); `validation` and `test` are held out.
A pattern has two slots: `{p}` is the product and `{t}` the rule's topic (an ailment, a sum, a gift, ...), which the
compliant rewrite keeps. Every offending pattern has a cue of its own rule and none of another's; no other sentence
has any cue: `tests/test_ad_moderation.py` holds the tables to that.
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


HEALTH = Rule(
    number=1,
    name="health claims",
    cues=r"cure[sd]?|heal(s|ed)?|treats|banish(es)?|wipes out|gets? rid of|reverses|miracle|pills",
    disclosure=r"not a medicine|doctor",
    rewrites=("{p} is not a medicine for {t}.", "See a doctor about {t}, {p} is no remedy."),
    topics=_parts("""back pain | insomnia | migraine | asthma | eczema | arthritis | hay fever | acne | flu | ulcers
        -- gout | backache | toothache | nausea | colds -- anemia | cramps | sore throats | psoriasis
        -- vertigo | heartburn | neck pain | bronchitis"""),
    offending=_parts("""{p} cures {t} in a week. | This {p} heals {t} for good. | Use {p} and it wipes out {t}.
        Take {p} daily and your {t} is healed. | One touch of {p} banishes {t}. | Say goodbye to {t}, the cure is here.
        {p} gets rid of {t} overnight. | The miracle {p} treats {t} without pills.
        -- Cured of {t} in three days, thanks to {p}. | It reverses {t} while you sleep. | {p} is a miracle against {t}.
        Throw away your pills, {p} heals {t}. | A cure for {t} is found in {p}. | Within days {p} treats severe {t}.
        -- Your {t} will be cured with {p}. | Nothing heals {t} faster than {p}. | {p} banishes {t} in ten minutes.
        It wipes out {t}, no pills needed.
        -- With {p} you get rid of {t} today. | People cured {t} with {p} alone. | Only {p} reverses {t} by itself.
        The miracle of {p} is that {t} is healed."""),
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
        Get rich with {p} and bank {t}. | Quit your job, {p} brings {t}. | A sure profit of {t} comes with {p}.
        Double your money when {p} returns {t}. | Owners of {p} earn {t} with no risk.
        -- Passive income of {t} is yours with {p}. | Guaranteed cash of {t} comes from {p}. | Users of {p} get rich on {t}.
        You will make {t} while you sleep. | Retire early, {p} pays you {t}. | For sure profit {p} makes you {t}.
        -- With {p} everyone will earn {t}. | Your guaranteed income from {p} is {t}. | Quit your job and make {t}.
        {p} doubles your money to {t}.
        -- Bank a sure profit of {t} from {p}. | Get rich fast, {t} is guaranteed. | It pays you {t} for owning {p}.
        Earn {t} in passive income from {p}."""),
    decoys=_parts("""Most buyers save less than {t}. | Our shop rent is {t}. -- We gave {t} to a charity.
        -- Our team pays {t} for its office. -- The prize fund is less than {t}."""),
)

MINORS = Rule(
    number=3,
    name="minors",
    cues=r"kids?|teens?|children|pupils?|pocket money|mum and dad|parents|(to|after) school|classmates",
    disclosure=r"adults",
    rewrites=("Adults aged 18 and over get {t} with {p}.", "Only adults may order {p} and {t}."),
    topics=_parts("""a free poster | a toy robot | gold stars | a comic | a puzzle | a red balloon | a game card | a yo-yo
        -- a sticker book | a magic pen | a whistle | a joke book -- a paper kite | a badge | a mini drone | a mask
        -- a spin top | a slime kit | a cap | a board game"""),
    offending=_parts("""Kids, grab {p} and win {t}. | Hey teens, {p} comes with {t}. | Ask your parents for {p} and get {t}.
        Spend your pocket money on {p} for {t}. | {p} is made for children and has {t}. | Every kid wants {p} and {t}.
        Bring {p} to school and show {t}. | Pupils who buy {p} receive {t}.
        -- Teens love {p} and there is {t} inside. | Get {t} after school with {p}. | Tell mum and dad that {p} has {t}.
        Your classmates have {p} and {t}. | For children under 12 there is {p} with {t}. | Pocket money buys {p} plus {t}.
        -- Kids under 14 get {t} with {p}. | Children, ask for {p} and collect {t}. | Teens, save pocket money for {t}.
        Take {t} to school with {p}.
        -- Show your classmates {t} from {p}. | No parents needed, kids get {t} with {p}. | All pupils with {p} win {t}.
        Teens can order {p} and keep {t}."""),
    decoys=_parts("""Adults get {t} in the box. | The first ten buyers win {t}. -- Our staff like {t} a lot.
        -- Grown-ups can collect {t} too. -- Order by phone and receive {t}."""),
)

FEAR = Rule(
    number=4,
    name="fear",
    cues=r"ruins?|destroys?|afraid|too late|in danger|everything|panic|regret|nightmare|doomed",
    disclosure=r"prepare|plan",
    rewrites=("{p} is one way to prepare for {t}.", "You can plan for {t} with or without {p}."),
    topics=_parts("""burglars | house fires | floods | hackers | power cuts | bad storms | car thieves | job loss
        -- stray dogs | mold | identity theft | frost -- heat waves | lost keys | rust | sharks
        -- snow storms | tax audits | wasps | gas leaks"""),
    offending=_parts("""Without {p} the next {t} will ruin your life. | Buy {p} now or {t} will destroy your home.
        Be afraid, {t} come for your family. | You lose everything to {t} without {p}. | It is too late for {p} after {t}.
        Your home is in danger of {t}, get {p}. | Panic about {t} and buy {p}. | Ignore {p} and regret it with {t}.
        -- Do not wait until {t} ruin your family. | Who is without {p} should be afraid of {t}. | You are doomed by {t}.
        Soon {t} take everything from you. | Stop {t} with {p} or it is too late. | The nightmare of {t} starts without {p}.
        -- Be afraid of {t} until you own {p}. | Skip {p} and {t} will ruin you. | Your family is in danger from {t}.
        It is too late once {t} come.
        -- You will regret {t} without {p}. | Panic now, {t} are near your home. | Skip {p} and lose everything to {t}.
        Soon {t} destroy your family, so order {p}."""),
    decoys=_parts("""Our blog has news on {t}. | The city has tips on {t}. -- Read our free page about {t}.
        -- Our guide covers {t} as well. -- A short film about {t} is online."""),
)

PROOF = Rule(
    number=5,
    name="false proof",
    cues=r"out of ten|prove[ns]?|proof|agree|stud(y|ies)|confirm(s|ed)?|endorsed?|award|swear by|certified|recommend",
    disclosure=r"not tested|judge for yourself",
    rewrites=("So far {t} have not tested {p}.", "Judge for yourself if {p} suits you, not by {t}."),
    topics=_parts("""dentists | top chefs | engineers | scientists | nurses | pilots | farmers | lawyers
        -- athletes | professors | bakers | surgeons -- coaches | astronauts | gardeners | plumbers
        -- vets | architects | sailors | drummers"""),
    offending=_parts("""Nine out of ten {t} choose {p}. | {p} is proven by {t}. | All {t} agree that {p} is the best.
        A secret study by {t} confirms {p}. | Endorsed by {t}, {p} never fails. | The top award of {t} went to {p}.
        Tests by {t} prove {p} is perfect. | Even {t} swear by {p} now.
        -- We know that all {t} recommend {p}. | {p} was certified by {t} as number one. | Confirmed by {t}, nothing beats {p}.
        There is proof from {t} that {p} works. | Every study shows that {t} prefer {p}. | The leading {t} endorse {p}.
        -- {p} is certified and proven by {t}. | Eight out of ten {t} swear by {p}. | A study confirms that {t} prefer {p}.
        Leading {t} agree on {p}.
        -- Endorsed by all {t}, {p} is perfect. | Proof from {t} shows {p} is the best. | {p} won the award of {t}.
        Most {t} recommend it in every study."""),
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
    topics=_parts("""bank password | passport number | home address | blood type | credit card | salary | birth date
        voting record -- phone contacts | diary | face scan | tax number -- fingerprint | chat history | mail login
        house key -- medical file | door code | photo album | pension plan"""),
    offending=_parts("""Send us your {t} to get {p}. | Enter your {t} to unlock {p}. | We share your {t} with anyone.
        {p} sells your {t} to partners. | Tell us your {t} and {p} is free. | Upload your {t} before you buy {p}.
        Hand over your {t} to save on {p}. | We need your {t} to ship {p}.
        -- Your {t} is shared when you use {p}. | Just text us your {t} for {p}. | {p} collects your {t} and keeps it.
        Type in your {t} and win {p}. | No {p} until you send your {t}. | Partners of {p} may read your {t}.
        -- Send your {t} and we ship {p}. | {p} shares your {t} with partners. | Enter your {t} to win a prize.
        We collect your {t} with every {p}.
        -- Tell us your {t} before {p} ships. | Upload your {t} to win {p}. | We sell your {t} when you order {p}.
        Hand over your {t} and unlock {p}."""),
    decoys=_parts("""Nobody here wants your {t}. | Your {t} stays with you. -- Please hide your {t} from us.
        -- We have no use for your {t}. -- Your {t} is your own business."""),
)

RULES = (HEALTH, INCOME, MINORS, FEAR, PROOF, DATA)

# A brand is one entry of each row: 8,000 made-up names, dealt to the parts by a checksum of the name.
BRAND_SYLLABLES = (
    (
        "Vel Lum Nor Zan Tor Mel Kar Bel Sol Fen Dor Ral Pel Cal Bren Ost Wil Gran Tam Hol "
        "Quin Jas Bar Dal Gar Har Kel Lor Mar Ner Per Ser Ter Ver Yol Zil Ul Ar El Im"
    ).split(),
    "a e i o u".split(),
    (
        "ra na to vi mo lex dia ro sta nel qua zo mi fo tis wen bix lo pa ki "
        "ba che dra fen gu han jo ket lin mar nox pel rik sun tal vek wo yan zil do"
    ).split(),
)
KINDS = _parts("""tea | app | lamp | soap | drink | watch | cream | mat | course | pillow | phone | bike | tent | shirt
    -- radio | heater | juice | bottle | blender | desk -- scooter | kettle | jacket | candle | oven
    -- camera | backpack | mixer | charger | fan""")

OPENERS = _parts("""Meet {p}, new this year. | Here is {p} for your home. | Try {p} this weekend. | {p} is back in our shop.
    Say hello to {p}. | We made {p} for busy people. | {p} comes in blue and green. | Look at {p} on our page.
    -- Our new {p} is out now. | Discover {p} in every store. | You asked for it, so here is {p}. | Enjoy {p} at home.
    -- Welcome {p} to your home. | This week we show {p}. | The new {p} is in our shop. | {p} comes in three colors.
    -- Have a look at {p}. | Now in store you find {p}. | {p} is new on our page. | We are happy to show {p}.""")
FILLERS = _parts("""Shipping is free on Monday. | It weighs very little. | The box is easy to open. | Colors may differ.
    Returns are open for 30 days. | Pick it up in our store. | It fits in any bag. | Made with care in a small town.
    Pay in two parts if you like. | The price is $20 this month. | Call us with any question. | Stock is limited.
    -- We answer mail within a day. | It comes with a short manual. | Gift wrap costs $2. | The handle is made of wood.
    Cleaning it is easy. | Two sizes are on offer. | Order online or by phone. | A spare part is in the box.
    -- Delivery is free on Friday. | It is light and easy to use. | The price is $35 this week. | Visit our store in town.
    Returns cost nothing for 60 days. | The box is made of paper.
    -- Shipping takes two days. | It is small and fits in a drawer. | Pay by card or in cash. | We open at nine on Sunday.
    The price is $48 online. | It comes with a long cable.""")
