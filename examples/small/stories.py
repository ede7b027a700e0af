"""Simple English, made by rule: short stories, talk about them, and small questions with true answers.

A model of a few million parameters learns fluent English only from a small world: few words, told in many ways. This
module is that world. A `World` draws who, where and what; a plot is a list of sentences about them; brackets hold what
can be said in several ways: `[One day|One morning]`, also inside each other. A sentence that starts with `?` is told
half of the time. Everything is drawn from one `random.Random`, so a seed gives the same text on every machine.

    python examples/small/stories.py --seed 1 --count 3        # print some

The text is our own, under this project's licence.
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass, field

from facts import small_talk
from plots import ENDINGS, OPENINGS, PLOTS

GIRLS = [
    "Lily",
    "Anna",
    "Mia",
    "Rose",
    "Emma",
    "Ruby",
    "Nora",
    "Clara",
    "Ella",
    "Lucy",
    "Molly",
    "Sara",
    "Ivy",
    "Grace",
    "Hazel",
    "Daisy",
    "Alice",
    "Zoe",
    "Maya",
    "Tess",
]
BOYS = [
    "Tom",
    "Ben",
    "Max",
    "Sam",
    "Leo",
    "Jack",
    "Finn",
    "Oscar",
    "Tim",
    "Henry",
    "Noah",
    "Hugo",
    "Paul",
    "Theo",
    "Adam",
    "Luke",
    "Peter",
    "Will",
    "Eli",
    "Joe",
]
ANIMALS = [
    "fox",
    "bear",
    "rabbit",
    "mouse",
    "owl",
    "duck",
    "frog",
    "cat",
    "dog",
    "hedgehog",
    "squirrel",
    "lamb",
    "pony",
    "goat",
    "turtle",
    "badger",
    "otter",
    "crow",
    "deer",
    "mole",
]
TRAITS = [
    "brave",
    "kind",
    "shy",
    "curious",
    "clever",
    "quiet",
    "cheerful",
    "gentle",
    "careful",
    "proud",
    "lively",
    "patient",
]
PLACES = {
    "the forest": "under the tall trees",
    "the park": "near the old bench",
    "the beach": "on the warm sand",
    "the garden": "between the flowers",
    "the river": "by the slow water",
    "the hill": "at the top of the hill",
    "the market": "among the busy stalls",
    "the farm": "behind the red barn",
    "the lake": "on the wooden pier",
    "the village": "beside the stone well",
    "the meadow": "in the tall grass",
    "the school": "next to the big door",
}
THINGS = [
    "ball",
    "kite",
    "book",
    "drum",
    "boat",
    "hat",
    "bell",
    "lamp",
    "key",
    "box",
    "coat",
    "basket",
    "flute",
    "ring",
    "map",
    "cup",
    "blanket",
    "puzzle",
    "wagon",
    "scarf",
]
COLOURS = ["red", "blue", "green", "yellow", "white", "silver", "golden", "purple", "orange", "brown"]
FOODS = [
    "bread",
    "soup",
    "an apple",
    "a pie",
    "some cheese",
    "a cake",
    "pancakes",
    "berries",
    "honey",
    "a pear",
    "warm milk",
    "nuts",
]
ELDERS = [
    "his mother",
    "his father",
    "his grandmother",
    "his grandfather",
    "his aunt",
    "his uncle",
    "the old teacher",
    "the baker",
]
FEELINGS = ["happy", "glad", "proud", "very happy", "full of joy", "calm and happy"]
WEATHER = ["sunny", "warm", "cold", "windy", "cloudy", "bright", "quiet", "foggy"]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SENTENCE = re.compile(r"(^\"?|[.!?] |\.\" )([a-z])")
"""Where a sentence starts; after a question or an exclamation in quotes it goes on: `"Why?" he asked`."""


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass
class Character:
    """Someone in a story: a name, a kind (`girl`, `fox`), and the words that stand for the name."""

    name: str
    kind: str
    trait: str
    female: bool

    def words(self, prefix: str) -> dict[str, str]:
        """The fields of a template: `{hero}`, `{he}`, `{his}`, `{him}`, and those of the friend with `f_` before."""
        he, his, him = ("she", "her", "her") if self.female else ("he", "his", "him")
        short = "" if prefix == "hero" else "f_"
        return {prefix: self.name, f"{short}he": he, f"{short}his": his, f"{short}him": him,
                f"{short}kind": self.kind, f"{short}trait": self.trait, f"{short}a_kind": article(self.kind),
                f"{short}a_trait": article(self.trait)}  # fmt: skip


def character(rng: random.Random, taken: str = "", *, animal: bool | None = None) -> Character:
    """A child or an animal; `taken` is a name that is not given again."""
    female = rng.random() < 0.5
    name = rng.choice([n for n in (GIRLS if female else BOYS) if n != taken])
    if animal is None:
        animal = rng.random() < 0.45
    kind = rng.choice(ANIMALS) if animal else ("girl" if female else "boy")
    return Character(name, kind, rng.choice(TRAITS), female)


@dataclass
class World:
    """What one story is about; `fields` fill the templates."""

    rng: random.Random
    fields: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def draw(rng: random.Random) -> World:
        """A new world."""
        hero = character(rng)
        friend = character(rng, hero.name, animal=None if rng.random() < 0.5 else hero.kind in ANIMALS)
        place = rng.choice(list(PLACES))
        elder = rng.choice(ELDERS)
        if hero.female:
            elder = elder.replace("his", "her")
        thing, colour, food = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(FOODS)
        fields = {
            **hero.words("hero"), **friend.words("friend"), "place": place, "spot": PLACES[place], "thing": thing,
            "a_thing": article(thing), "colour": colour, "a_colour": article(colour), "food": food, "elder": elder,
            "feeling": rng.choice(FEELINGS), "weather": rng.choice(WEATHER), "number": rng.choice(["two", "three", "four"]),
            "a_f": article(friend.kind), "a_box": rng.choice(["an old box", "a book", "the attic", "a drawer"]),
            "a_thing_light": rng.choice(["a lamp", "a candle", "a light"]), "spot_cap": PLACES[place],
            "spot_water": rng.choice(["at the lake", "by the river", "near the water"]),
            "food_plain": rng.choice(["bread", "nuts", "honey", "corn"]),
        }  # fmt: skip
        return World(rng, fields)

    def tell(self, template: str) -> str:
        """A template with its choices made and its fields filled, and the first letter of each sentence a capital."""
        while found := _CHOICE.search(template):
            pick = self.rng.choice(found.group(1).split("|"))
            template = template[: found.start()] + pick + template[found.end() :]
        text = re.sub(r" +", " ", template.format(**self.fields)).strip()
        return _SENTENCE.sub(lambda m: m.group(1) + m.group(2).upper(), text)


@dataclass
class Story:
    """A told story, with what can be asked about it."""

    title: str
    paragraphs: list[str]
    lesson: str
    world: World

    @property
    def text(self) -> str:
        """The paragraphs, a blank line between."""
        return "\n\n".join(self.paragraphs)


def story(rng: random.Random) -> Story:
    """One story: an opening, a plot, an ending."""
    world = World.draw(rng)
    plot = rng.choice(PLOTS)
    paragraphs = []
    for lines in (rng.choice(OPENINGS), *plot.paragraphs, rng.choice(ENDINGS)):
        told = [world.tell(line.removeprefix("?")) for line in lines if not line.startswith("?") or rng.random() < 0.5]
        paragraphs.append(" ".join(told))
    lesson = world.tell(plot.lesson)
    lesson = lesson[0].lower() + lesson[1:]
    if rng.random() < 0.5:
        paragraphs[-1] += " " + world.tell(
            f"[From that day on, {{hero}} knew that|{{hero}} had learned that] {lesson}."
        )
    return Story(world.tell(plot.title), paragraphs, lesson, world)


Turn = tuple[str, str]
"""A role, `"user"` or `"model"`, and what it says."""


def ask_for(told: Story) -> str:
    """How a user may have asked for a story."""
    words = told.world.fields
    about = ["", " about {a_kind}", " about {a_kind}", " about {a_kind} named {hero}", " about {hero}"]
    about += [" about {hero} and {friend}", " about two friends"] if words["friend"] in told.text else []
    about += [" that happens at {place}"] if words["place"] in told.text else []
    if words["thing"] in told.text:
        about += [" about {a_thing}", " about {a_kind} and {a_thing}"]
    if f"{words['colour']} {words['thing']}" in told.text:
        about += [" about {a_colour} {thing}"]
    wish = (
        "[Tell me|Tell me|Can you tell me|Please tell me|Write|Please write|I would like] a [|short|little|nice] story"
    )
    end = (
        told.world.rng.choice([".", ".", "?", ""]) if wish.startswith("Can") else told.world.rng.choice([".", ".", ""])
    )
    return told.world.tell(wish + told.world.rng.choice(about)) + end


def questions(told: Story) -> list[Turn]:
    """Questions that the story answers, each with its answer."""
    words, tell, text = told.world.fields, told.world.tell, told.text
    coloured = f"{words['colour']} {words['thing']}"
    asked = [
        ("", "Who is the story about?", "[The story|It] is about {hero}, {a_trait} {kind}."),
        ("", "Who [is|was] {hero}?", "{hero} [is|was] {a_trait} {kind}."),
        (words["friend"], "Who is {friend}?", "{friend} is {a_f} and a friend of {hero}."),
        (words["friend"], "What is the name of the friend?", "The friend is called {friend}."),
        (words["place"], "Where did it happen?", "It happened at {place}."),
        (coloured, "What colour was the {thing}?", "The {thing} was {colour}."),
        (f"was {words['feeling']}", "How did {hero} feel at the end?", "[At the end, {hero}|{hero}] was {feeling}."),
        ("", "What did {hero} learn?", "{hero} learned that " + told.lesson + "."),
        ("", "What can we learn from it?", "We can learn that " + told.lesson + "."),
        ("", "What is the story called?", '[It is called|The story is called] "' + told.title + '".'),
    ]
    fitting = [(question, answer) for needed, question, answer in asked if needed in text]
    turns: list[Turn] = []
    for question, answer in told.world.rng.sample(fitting, told.world.rng.randint(1, min(4, len(fitting)))):
        turns += [("user", tell(question)), ("model", tell(answer))]
    return turns


def conversation(rng: random.Random) -> list[Turn]:
    """A chat: a story and questions about it, or small talk."""
    if rng.random() < 0.3:
        return small_talk(rng)
    turns: list[Turn] = []
    if rng.random() < 0.15:
        turns += small_talk(rng)[:2]
    told = story(rng)
    turns += [("user", ask_for(told)), ("model", told.text)]
    if rng.random() < 0.55:
        turns += questions(told)
    if rng.random() < 0.2:
        turns += [("user", rng.choice(["Thank you!", "Thanks.", "Thank you, that was nice."])),
                  ("model", rng.choice(["You are welcome!", "I am glad that you liked it.", "You are welcome. Would you like another story?"]))]  # fmt: skip
    return turns


def main() -> None:
    """Print some text."""
    parser = argparse.ArgumentParser(description="Print stories and conversations.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="stories only, as documents of a text file")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for _ in range(arguments.count):
        if arguments.plain:
            print(f"<doc>\n{story(rng).text}\n</doc>")
            continue
        print("\n".join(f"{role}: {said}" for role, said in conversation(rng)), end="\n\n---\n\n")


if __name__ == "__main__":
    main()
