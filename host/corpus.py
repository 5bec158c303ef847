"""Prompts to learn a dictionary of words from: the user's lines, with ``{a|b}`` for choices, or a bundled grammar."""

import random
import re

CHOICE = re.compile(r"\{([^{}]*)\}")
HELD = 20
"""One line of so many is kept for measuring, where lines have no choices."""

THINGS = """mug|cup|hat|cap|coat|shirt|dress|shoe|boot|scarf|glove|bag|backpack|umbrella|ring|necklace|watch|
pair of glasses|crown|mask|star|moon|sun|planet|cloud|mountain|river|lake|tree|flower|rose|leaf|mushroom|forest|
garden|beach|island|cat|kitten|dog|puppy|horse|cow|pig|sheep|rabbit|fox|wolf|bear|lion|tiger|elephant|monkey|bird|
owl|eagle|duck|swan|fish|shark|whale|frog|turtle|snake|butterfly|bee|dragon|robot|astronaut|knight|wizard|pirate|
dancer|chef|farmer|doctor|child|baby|boy|girl|man|woman|old man|old woman|portrait|face|hand|house|castle|tower|
church|bridge|street|window|door|room|kitchen|table|chair|sofa|bed|lamp|candle|clock|mirror|book|letter|key|bell|
vase|bottle|plate|bowl|spoon|knife|apple|orange|banana|lemon|cake|bread|pizza|egg|coffee|tea|car|truck|bus|train|
bicycle|boat|ship|plane|rocket|balloon|kite|guitar|piano|violin|drum|camera|phone|computer|keyboard|computer mouse|
ball|doll|teddy bear|toy|statue|heart|sign|flag"""
LOOKS = """red|green|blue|yellow|orange|purple|pink|white|black|grey|brown|golden|silver|wooden|metal|glass|stone|
paper|plastic|leather|knitted|furry|shiny|rusty|old|new|tiny|small|big|huge|tall|round|square|striped|dotted|
checkered|plain|floral|colorful|transparent|broken|cute|scary|elegant|dirty|smiling|sleeping|flying|burning|frozen|
wet"""
PLACES = """grass|sand|snow|water|wood|a table|a shelf|a street|a beach|a brick wall|a mountain top|the moon|
a carpet|a bed of leaves|the roof of a house|a busy market|an empty room|a cobblestone street"""
GROUNDS = """grass|brick|sky|sand|wood|snow|water|night|white|dark|forest|city|sunset|starry night|
northern lights"""
ACTIONS = "wearing|holding|looking at|standing next to|sitting on|painting|carrying|dreaming of"
STYLES = """a photo|a close photo|a black and white photo|an oil painting|a watercolor painting|a pencil drawing|
a cartoon|a pixel art picture|an anime picture|a 3d render|a poster|a sketch|a cinematic shot|an old photograph|
a mosaic"""
GRAMMAR = f"""a photo of a {{{LOOKS}}} {{{THINGS}}}
{{{STYLES}}} of a {{{LOOKS}}} {{{THINGS}}} on {{{PLACES}}}
a {{small|big|huge|tiny}} {{{LOOKS}}} {{{THINGS}}}, {{on the left|on the right|in the center}}, {{{GROUNDS}}} background
a {{{THINGS}}} {{{ACTIONS}}} a {{{LOOKS}}} {{{THINGS}}}, {{{STYLES}}}
a {{{THINGS}}}, a {{{LOOKS}}} {{{THINGS}}} and a {{{LOOKS}}} {{{THINGS}}}, in front of {{{PLACES}}}
{{{THINGS}}} decorated with {{stars|hearts|flowers|stripes|dots|jewels|shells}}, {{{GROUNDS}}} background
a {{{LOOKS}}} {{{THINGS}}} made of {{glass|wood|stone|gold|paper|ice|wool|fire}}""".replace("|\n", "|")


class Corpus:
    """An endless, seeded stream of prompts that is never held.

    text: a prompt per line; ``{a|b}`` becomes one of its choices, anew each time. Empty: the bundled grammar.
    """

    def __init__(self, text: str, seed: int):
        lines = list(dict.fromkeys(line.strip() for line in (text.strip() or GRAMMAR).splitlines() if line.strip()))
        random.Random(f"lines/{seed}").shuffle(lines)
        self.seed, self.plain = seed, not any(CHOICE.search(line) for line in lines)
        kept = len(lines) // HELD if self.plain else 0
        self.lines, self.held_lines = lines[kept:], lines[:kept] or lines
        self._turn, self._order = -1, []

    @property
    def apart(self) -> bool:
        """Whether ``held`` gives prompts that are not learned from."""
        return self.held_lines != self.lines or not self.plain

    @property
    def distinct(self) -> int:
        """How many different prompts there are to learn from; 0 for more than can be told."""
        return len(self.lines) if self.plain else 0

    def prompt(self, number: int) -> str:
        """One to learn from: every line comes once per round, in an order of its own."""
        turn, place = divmod(number, len(self.lines))
        if turn != self._turn:
            self._turn, self._order = turn, list(range(len(self.lines)))
            random.Random(f"order/{self.seed}/{turn}").shuffle(self._order)
        return self._chosen(self.lines[self._order[place]], f"{self.seed}/{number}")

    def prompts(self, first: int, count: int) -> list[str]:
        return [self.prompt(n) for n in range(first, first + count)]

    def held(self, count: int) -> list[str]:
        """Prompts to measure by: lines or draws that learning never sees, where the corpus is large enough for that."""
        many = len(self.held_lines)
        count = min(count, many) if self.plain else count
        return [self._chosen(self.held_lines[n % many], f"held/{self.seed}/{n}") for n in range(count)]

    @staticmethod
    def _chosen(line: str, seed: str) -> str:
        draw = random.Random(seed)
        return CHOICE.sub(lambda m: draw.choice(m[1].split("|")).strip(), line)
