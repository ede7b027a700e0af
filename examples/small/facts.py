"""Small talk and small questions with true answers, for the conversations of `stories.py`."""

from __future__ import annotations

import random

Turn = tuple[str, str]

ANIMALS = {
    # name: (what it is, where it lives, what it eats, what it says or does)
    "cat": ("a small animal with soft fur and whiskers", "in a house or on a farm", "meat and fish", "says meow"),
    "dog": ("a friendly animal with four legs and a tail", "in a house with people", "meat and dog food", "says woof"),
    "cow": ("a big farm animal that gives milk", "on a farm", "grass", "says moo"),
    "horse": ("a large, strong animal with a mane", "on a farm", "grass and hay", "can run very fast"),
    "sheep": ("a farm animal with thick wool", "on a farm", "grass", "says baa"),
    "duck": ("a bird with a flat beak", "near a pond", "plants and small fish", "says quack"),
    "hen": ("a bird that lays eggs", "on a farm", "seeds and worms", "says cluck"),
    "pig": ("a clever farm animal with a round nose", "on a farm", "almost anything", "says oink"),
    "fox": ("a clever animal with red fur and a long tail", "in the forest", "mice, birds and berries", "can hear very well"),
    "bear": ("a big animal with thick fur", "in the forest", "berries, fish and honey", "sleeps in winter"),
    "owl": ("a bird with big eyes that can see at night", "in a tree", "mice", "says hoo"),
    "frog": ("a small green animal that can jump", "near water", "insects", "says ribbit"),
    "fish": ("an animal that breathes under water", "in water", "plants and small animals", "can swim"),
    "bee": ("an insect that makes honey", "in a hive", "the nectar of flowers", "can fly"),
    "rabbit": ("a small animal with long ears", "in a hole in the ground", "grass and carrots", "can hop"),
    "mouse": ("a very small animal with a long tail", "in a hole", "seeds and cheese", "says squeak"),
    "lion": ("a big wild cat", "in the grassland of Africa", "meat", "can roar"),
    "elephant": ("the largest animal on land, with a long trunk", "in Africa and Asia", "grass and leaves", "never forgets"),
    "bird": ("an animal with feathers and wings", "in a nest", "seeds and insects", "can fly and sing"),
    "snail": ("a small, slow animal with a shell", "in the garden", "leaves", "carries its house"),
    "whale": ("the largest animal in the sea", "in the sea", "fish and tiny animals", "can sing under water"),
    "penguin": ("a bird that cannot fly but swims well", "in the cold south", "fish", "walks in a funny way"),
}  # fmt: skip

PLAIN = [
    ("What colour is the sky?", "The sky is blue on a clear day."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is snow?", "Snow is white."),
    ("What colour is a banana?", "A ripe banana is yellow."),
    ("What colour is the sun?", "The sun looks yellow."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("What are the days of the week?", "They are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    ("What are the four seasons?", "The four seasons are spring, summer, autumn and winter."),
    ("Which season is the coldest?", "Winter is the coldest season."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("When does the sun rise?", "The sun rises in the morning."),
    ("When do the stars shine?", "The stars shine at night."),
    ("Where does rain come from?", "Rain comes from the clouds."),
    ("What is ice?", "Ice is frozen water."),
    ("What do plants need?", "Plants need water, light and earth."),
    ("What do we do with a book?", "We read a book."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of England?", "The capital of England is London."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("What is a friend?", "A friend is someone who likes you and helps you."),
    ("Why do we sleep?", "We sleep so that our body and our mind can rest."),
    ("Why should we share?", "We should share because it makes others happy, and us too."),
    ("What should I do when I am sad?", "You can talk to a friend, take a walk, or read a good story."),
    ("What should I do when I am afraid?", "Take a slow breath, and tell someone about it. It helps."),
    ("What should I eat?", "You could eat some bread, some soup, or an apple."),
    ("How can I be a good friend?", "Listen, be kind, and help when you can."),
]  # fmt: skip

SELF = [
    ("Who are you?", "I am a small language model. I can tell stories and answer small questions."),
    ("What are you?", "I am a very small language model that runs with whole numbers only."),
    ("What is your name?", "I have no name. I am the small model of bytelane."),
    ("What can you do?", "I can tell short stories and answer small questions."),
    ("Are you a person?", "No, I am not a person. I am a small computer program."),
    ("How big are you?", "I am very small. I fit into a few megabytes."),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Do you know everything?", "No, I know only a little. But I know many stories."),
]

OPPOSITES = [
    ("big", "small"), ("hot", "cold"), ("fast", "slow"), ("day", "night"), ("happy", "sad"), ("old", "new"),
    ("wet", "dry"), ("high", "low"), ("light", "dark"), ("open", "closed"), ("full", "empty"), ("loud", "quiet"),
    ("good", "bad"), ("left", "right"), ("up", "down"), ("hard", "soft"), ("long", "short"), ("early", "late"),
]  # fmt: skip

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def _animal(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(ANIMALS))
    what, home, food, does = ANIMALS[name]
    a_name = ("an " if name[0] in "aeiou" else "a ") + name
    capital = a_name[0].upper() + a_name[1:]
    return rng.choice([
        (f"What is {a_name}?", f"{capital} is {what}."),
        (f"Where does {a_name} live?", f"{capital} lives {home}."),
        (f"What does {a_name} eat?", f"{capital} eats {food}."),
        (f"Tell me about {'fish' if name == 'fish' else 'the ' + name}.", f"{capital} is {what}. It lives {home} and eats {food}. {capital} {does}."),
        (f"What does {a_name} do?" if not does.startswith("says") else f"What does {a_name} say?", f"{capital} {does}."),
    ])  # fmt: skip


def _number(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    if rng.random() < 0.6:
        return (
            f"What is {NUMBERS[a]} plus {NUMBERS[b]}?",
            f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}.",
        )
    a = rng.randint(1, 11)
    return f"Which number comes after {NUMBERS[a]}?", f"After {NUMBERS[a]} comes {NUMBERS[a + 1]}."


def _opposite(rng: random.Random) -> tuple[str, str]:
    one, other = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        one, other = other, one
    return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."


def question(rng: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    kind = rng.random()
    if kind < 0.35:
        return _animal(rng)
    if kind < 0.5:
        return _number(rng)
    if kind < 0.6:
        return _opposite(rng)
    return rng.choice(SELF if kind < 0.72 else PLAIN)


def small_talk(rng: random.Random) -> list[Turn]:
    """A greeting now and then, and one to four questions."""
    turns: list[Turn] = []
    if rng.random() < 0.35:
        greeting = rng.choice(["Hello!", "Hello", "Hi!", "Hi", "Good morning!", "Good evening!", "Hello there!"])
        turns += [("user", greeting), ("model", rng.choice(["Hello! How can I help you?", "Hello! Would you like a story?", "Hi! It is nice to meet you."]))]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        asked, answer = question(rng)
        turns += [("user", asked), ("model", answer)]
    return turns
