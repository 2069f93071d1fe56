"""Ten further skills, of bench B: none of the engine's options was chosen on them.

They are of other kinds than those of bench A: several steps, code, facts that the base cannot know, grammar, logic,
units, another language, queries, spelling. `tasks.py` makes their splits.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from skills import WORDS, Example, Skill

PEOPLE = (
    "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mary Nick Olga Paul Ruth Sam Tina Victor".split()
)
THINGS = "apples books coins eggs flowers keys lemons marbles pencils shells stamps tickets".split()


def steps(rng: random.Random) -> Example:
    """Return a word problem of two steps, and both steps."""
    name, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    first, more, less = rng.randint(10, 60), rng.randint(2, 30), rng.randint(2, 9)
    total = first + more
    question = f"{name} has {first} {thing}, buys {more} more and gives {less} away. How many are left?"
    return question, f"{first} + {more} = {total}, {total} - {less} = {total - less}"


CODE: list[tuple[str, Callable[[str, int], str]]] = [
    ("the first {n} items of {x}", lambda x, n: f"{x}[:{n}]"),
    ("the last {n} items of {x}", lambda x, n: f"{x}[-{n}:]"),
    ("{x} without its first {n} items", lambda x, n: f"{x}[{n}:]"),
    ("{x} without its last {n} items", lambda x, n: f"{x}[:-{n}]"),
    ("every item of {x} at a step of {n}", lambda x, n: f"{x}[::{n}]"),
    ("the items of {x} that are above {n}", lambda x, n: f"[item for item in {x} if item > {n}]"),
    ("the items of {x}, each times {n}", lambda x, n: f"[item * {n} for item in {x}]"),
    ("the number of times that {n} is in {x}", lambda x, n: f"{x}.count({n})"),
    ("whether {x} has more than {n} items", lambda x, n: f"len({x}) > {n}"),
]


def code(rng: random.Random) -> Example:
    """Return the description of a Python expression, and the expression."""
    text, written = rng.choice(CODE)
    name, number = f"{rng.choice(WORDS)}s", rng.randint(2, 20)
    return f"Write in Python: {text.format(x=name, n=number)}", written(name, number)


PLANETS = "Arvo Belun Corith Dessa Elmar Fonu Gharat Hesko Ilvan Jorum Kestri Lomba Mirax Nelu Orsin Petra Quil Rasmo \
Silth Tavor".split()
COLOURS = "red blue green grey white black yellow orange purple brown".split()
OPENINGS = ["Tell me:", "Answer in one word:", "A question:", "Please say:", "I want to know:"]
FACTS = {
    "colour": ["what is the colour of {p}?", "which colour does {p} have?", "how is {p} coloured?", "{p} is of what \
colour?"],
    "capital": ["what is the capital of {p}?", "which city is {p}'s capital?", "where is {p} governed from?", "{p} has \
what capital?"],
    "moons": ["how many moons has {p}?", "what is {p}'s number of moons?", "how many moons circle {p}?", "{p} has how \
many moons?"],
    "metal": ["which metal is mined on {p}?", "what metal comes from {p}?", "{p} is known for which metal?", "what \
metal do they find on {p}?"],
}  # fmt: skip
METALS = "iron copper silver gold zinc nickel tin lead cobalt platinum".split()


def facts(rng: random.Random) -> Example:
    """Return a question about an invented planet, and the answer; other wordings of it may be in the training."""
    planet, kind, opening = rng.choice(PLANETS), rng.choice(list(FACTS)), rng.choice(OPENINGS)
    fixed = random.Random(f"{planet} {kind}")
    answers = {
        "colour": lambda: fixed.choice(COLOURS),
        "capital": lambda: fixed.choice(WORDS).capitalize(),
        "moons": lambda: str(fixed.randint(1, 20)),
        "metal": lambda: fixed.choice(METALS),
    }
    return f"{opening} {rng.choice(FACTS[kind]).format(p=planet)}", answers[kind]()


VERBS = {
    "painted": "painted", "broke": "broken", "wrote": "written", "found": "found", "took": "taken", "sold": "sold",
    "cleaned": "cleaned", "drew": "drawn", "built": "built", "stole": "stolen", "repaired": "repaired", "hid": "hidden",
}  # fmt: skip
ACTORS = "farmer teacher pilot painter nurse writer driver baker queen soldier student judge".split()
OBJECTS = "fence letter bridge picture box boat house chair book table map clock".split()


def passive(rng: random.Random) -> Example:
    """Return a sentence in the active voice, and the same one in the passive voice."""
    verb, actor, thing = rng.choice(list(VERBS)), rng.choice(ACTORS), rng.choice(OBJECTS)
    adjective = rng.choice(["old", "small", "new", "heavy", "green", "broad"])
    sentence = f"The {actor} {verb} the {adjective} {thing}."
    return f"Rewrite in the passive voice: {sentence}", f"The {adjective} {thing} was {VERBS[verb]} by the {actor}."


ROMAN = [(100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def roman(rng: random.Random) -> Example:
    """Return a sum of two numbers, and its result in Roman numerals."""
    first, second = rng.randint(1, 60), rng.randint(1, 60)
    rest, written = first + second, ""
    for value, letters in ROMAN:
        written += letters * (rest // value)
        rest %= value
    return f"Write {first} + {second} in Roman numerals", f"{first + second} = {written}"


def logic(rng: random.Random) -> Example:
    """Return three people in two comparisons, and their order."""
    tall, middle, small = rng.sample(PEOPLE, 3)
    word, opposite = rng.choice([("taller", "smaller"), ("older", "younger"), ("faster", "slower")])
    pairs = [
        rng.choice([f"{more} is {word} than {less}.", f"{less} is {opposite} than {more}."])
        for more, less in ((tall, middle), (middle, small))
    ]
    rng.shuffle(pairs)
    return f"{' '.join(pairs)} Order them, the {word} first.", f"{tall}, {middle}, {small}"


def units(rng: random.Random) -> Example:
    """Return a length, weight or time in two units, and in the smaller one."""
    big, small, factor = rng.choice([("hours", "minutes", 60), ("metres", "centimetres", 100), ("weeks", "days", 7)])
    many, more = rng.randint(2, 12), rng.randint(1, factor - 1)
    amount = f"{many * factor} + {more} = {many * factor + more}"
    return f"How many {small} are {many} {big} and {more} {small}?", amount


NOUNS = {
    "house": ("la", "maison"), "car": ("la", "voiture"), "table": ("la", "table"), "flower": ("la", "fleur"),
    "door": ("la", "porte"), "shirt": ("la", "chemise"), "dog": ("le", "chien"), "cat": ("le", "chat"),
    "book": ("le", "livre"), "boat": ("le", "bateau"), "garden": ("le", "jardin"), "bread": ("le", "pain"),
    "hat": ("le", "chapeau"), "wall": ("le", "mur"),
}  # fmt: skip
ADJECTIVES = {
    "green": ("vert", "verte"), "black": ("noir", "noire"), "white": ("blanc", "blanche"), "blue": ("bleu", "bleue"),
    "grey": ("gris", "grise"), "red": ("rouge", "rouge"), "yellow": ("jaune", "jaune"), "heavy": ("lourd", "lourde"),
}  # fmt: skip


def french(rng: random.Random) -> Example:
    """Return two English noun phrases, and both in French, with articles and adjectives in the nouns' gender."""
    english, translated = [], []
    for noun in rng.sample(list(NOUNS), 2):
        adjective, (article, word) = rng.choice(list(ADJECTIVES)), NOUNS[noun]
        english.append(f"the {adjective} {noun}")
        translated.append(f"{article} {word} {ADJECTIVES[adjective][article == 'la']}")
    return f"Translate into French: {' and '.join(english)}", " et ".join(translated)


def sql(rng: random.Random) -> Example:
    """Return the description of a query, and the query."""
    table, column = rng.choice("customers orders products staff invoices".split()), rng.choice(COLUMNS)
    other, number = rng.choice([one for one in COLUMNS if one != column]), rng.randint(2, 99)
    word, sign = rng.choice([("above", ">"), ("below", "<"), ("equal to", "=")])
    text = f"Write as SQL: the {column} of the {table} whose {other} is {word} {number}"
    return text, f"SELECT {column} FROM {table} WHERE {other} {sign} {number};"


COLUMNS = "name age city price rank country".split()


def acronym(rng: random.Random) -> Example:
    """Return four words, and their first letters in capitals from the last word to the first."""
    words = rng.sample(WORDS, 4)
    return f"Take the first letters, backwards: {' '.join(words)}", "-".join(word[0].upper() for word in words[::-1])


SKILLS: dict[str, Skill] = {
    one.__name__: one for one in (steps, code, facts, passive, roman, logic, units, french, sql, acronym)
}
