"""The plots of the stories: see `stories.py` for the words in braces and the choices in brackets."""

from __future__ import annotations

from dataclasses import dataclass

OPENINGS = [
    [
        "[Once upon a time|Once|Long ago], there [was|lived] {a_trait} {kind} named {hero}.",
        "{hero} lived [in a small house|in a little house|in an old house] near {place}.",
        "?{he} [liked|loved] to play with {his} friend {friend}.",
        "?{hero} had {a_colour} {thing}, and {he} [took it everywhere|was very proud of it|kept it close].",
    ],
    [
        "{hero} was {a_trait} {kind} who [loved|liked] {place}.",
        "[Every day|Every morning|Every afternoon|After breakfast], {he} went there to [play|look around|sing|rest|think].",
        "?{his} best friend was {a_f} named {friend}.",
        "?{friend} was very {f_trait}.",
    ],
    [
        "[It was|One day it was] a {weather} [morning|day|afternoon].",
        "{hero} the {kind} [woke up early|looked out of the window|could not sleep any more|ate some breakfast].",
        '"[What a day|What a lovely day|Today will be a good day]!" {he} said.',
        "?{he} put on {his} coat and went to {place}.",
    ],
    [
        "There was once {a_kind} [called|named] {hero}.",
        "{hero} was {trait}, [and everyone knew it|and that was a good thing|but sometimes a little lonely].",
        "?[On most days|On many days], {he} played with {friend} [near|at] {place}.",
    ],
]

ENDINGS = [
    ["[In the end|That night|That evening], {hero} was {feeling}.", "?{he} [slept well|fell asleep with a smile|dreamed of {place}]."],
    ["{hero} and {friend} [walked home together|went home hand in hand|laughed all the way home].", "?It had been a [good|long|wonderful] day.", "{hero} was {feeling}."],
    ["[When the sun went down|When the stars came out|As the moon rose], everyone went home.", "{hero} told {elder} about the day.", "\"[I am proud of you|You did well|That is a fine story],\" said {elder}, and {hero} was {feeling}."],
    ["They [shared|ate] {food} and [talked|laughed|sang songs] until it was dark.", "{hero} was {feeling}."],
]  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """What happens: sentences by paragraph, a title, and what is learned."""

    title: str
    paragraphs: tuple[tuple[str, ...], ...]
    lesson: str


PLOTS = [
    Plot(
        "The Lost [Thing|Treasure] of {hero}",
        (
            (
                "[One day|One morning|One afternoon], {hero} could not find {his} {colour} {thing}.",
                "{he} looked [under the bed|behind the door|in every room], but it was [not there|gone].",
                "?{he} looked [in the kitchen|on the table|under the chair] too.",
                "{hero} [began to cry|was very sad|sat down and sighed].",
            ),
            (
                '"[What is wrong|Why are you sad|What happened]?" asked {friend}.',
                '"I lost my {thing}," said {hero}.',
                '"[Do not worry|Do not be sad|Don\'t cry]," said {friend}. "[We will find it|I will help you|We can look together]."',
                "They [looked|searched] everywhere, and at last they went to {place}.",
                "There, {spot}, was the {colour} {thing}!",
                '"[Thank you|You are a true friend|You found it], {friend}!" [cried|said] {hero}.',
            ),
        ),
        "a good friend helps you [look|when you are sad]",
    ),
    Plot(
        "{hero} and the Storm",
        (
            (
                "[One day|That day], {hero} and {friend} were playing at {place} when the sky [turned grey|grew dark|became black].",
                "The wind [began to blow|blew hard|howled], and [rain fell|big drops of rain fell|it started to rain].",
                '"I am [scared|afraid|frightened]," said {friend}.',
                '"[Hold my hand|Stay close to me|Come with me]," said {hero}. "I know a safe place."',
            ),
            (
                "They ran to [an old barn|a small cave|a little hut] and waited there.",
                "?{hero} told a funny story, and {friend} [laughed|smiled] a little.",
                "After a while the rain [stopped|was over], and the sun came out.",
                "[There was a rainbow over {place}|A big rainbow stood in the sky].",
                '"[Look|See]!" said {friend}. "[The storm is gone|It is beautiful]."',
            ),
        ),
        "being brave means helping others [even when you are afraid|when they are afraid]",
    ),
    Plot(
        "The {colour} {thing}",
        (
            (
                "[One day|One morning], {elder} gave {hero} {a_colour} {thing}.",
                "It was the [best|nicest|finest] {thing} {he} had ever seen.",
                '{friend} [saw it too|came by|looked at it] and asked, "[Can I play with it|May I try it|May I have a turn]?"',
                '"No," said {hero}. "It is [mine|only for me]."',
                "{friend} [went away|walked home|left] with a sad face.",
            ),
            (
                "{hero} played alone, but it was [not much fun|boring|no fun at all].",
                "?{he} thought about {friend} [for a long time|all afternoon].",
                'So {he} went to {friend} and said, "I am sorry. [Let us play together|You can have a turn|We can share it]."',
                "{friend} smiled, and they played [together|with the {thing}] until [the evening|dinner|the sun went down].",
            ),
        ),
        "[sharing makes everything more fun|it is good to share]",
    ),
    Plot(
        "The {kind} Who Could Not [Swim|Whistle|Dance]",
        (
            (
                "All the others could [swim|dance|climb|sing], but {hero} could not.",
                "{he} tried [once|one time], and it did not work.",
                "{he} tried again, and [it did not work|{he} fell down].",
                '"I will never learn it," said {hero}.',
                '"[Try again tomorrow|Do not give up|You only need time]," said {elder}.',
            ),
            (
                "So {hero} [practised|tried|worked] every day.",
                "?{friend} came [along|too] and helped {him}.",
                "[After {number} weeks|One day], {he} [could do it|did it well], just like the others.",
                '"[Look at me|I can do it|I did it]!" {he} [shouted|called|cried].',
                "Everyone [clapped|cheered].",
            ),
        ),
        "you can learn many things if you do not give up",
    ),
    Plot(
        "The Strange [Noise|Sound]",
        (
            (
                "[One night|Late at night], {hero} heard a [strange|funny|loud] [noise|sound].",
                "[Tap, tap, tap|Boo, boo, boo|Scratch, scratch, scratch]!",
                '"What is that?" {he} [whispered|asked].',
                "{he} [hid under the blanket|pulled the blanket over {his} head], but the noise did not stop.",
                "At last {hero} took {a_thing_light} and went [outside|to the door|to look].",
            ),
            (
                "[There in the dark|Behind the house|Near the gate] sat a [small|tiny|little] [kitten|puppy|bird|mouse].",
                "It was [cold|wet|hungry] and [alone|lost].",
                '"[Oh, you poor thing|Come in|You do not have to be afraid]," said {hero}.',
                "{he} gave it {food} and a warm place to sleep.",
                "?In the morning, {friend} came to see it, and they [gave it a name|played with it].",
            ),
        ),
        "things are less scary when you look at them",
    ),
    Plot(
        "A [Gift|Present] for {friend}",
        (
            (
                "It was {friend}'s birthday, and {hero} wanted to give {f_him} [a gift|something special|a nice present].",
                "But {hero} had no money.",
                '"What can I do?" {he} [thought|asked {elder}].',
                '"[The best gifts are made by hand|Make something yourself|You can make something]," said {elder}.',
            ),
            (
                "So {hero} took [some paper|some wood|some wool|some paint] and [worked all day|went to work].",
                "{he} made {a_colour} {thing}.",
                "?It was a little crooked, but it was [pretty|made with love].",
                "When {friend} saw it, {f_he} [jumped for joy|smiled|hugged {hero}].",
                '"[This is the best gift of all|I love it|It is wonderful]," said {friend}.',
            ),
        ),
        "a gift made with love is the best gift",
    ),
    Plot(
        "The Big [Race|Contest]",
        (
            (
                "There was a [race|big race] at {place}, and all the [animals|children] came.",
                "{hero} was [not very fast|slow], but {he} wanted to [try|win].",
                '"[Ready, set, go|One, two, three, go]!" called {elder}.',
                "{friend} ran [like the wind|very fast], and {hero} was [last|far behind].",
            ),
            (
                "Then {friend} [fell|tripped over a stone] and hurt {f_his} [foot|leg|knee].",
                "The others ran [on|past {f_him}], but {hero} stopped.",
                '"[Can you stand|Are you all right|Let me help you]," said {hero}.',
                "They walked to the end together, [step by step|slowly].",
                "They did not win, but everyone [clapped for them|cheered].",
                "?{elder} gave them both a [prize|medal|ribbon].",
            ),
        ),
        "helping a friend is better than winning",
    ),
    Plot(
        "The Garden of {hero}",
        (
            (
                "In spring, {hero} [planted|put] {number} [seeds|little seeds] in the ground.",
                "{he} gave them water every [day|morning].",
                "After one day, {he} looked, but there was nothing.",
                "After a week, there was still [nothing|only brown earth].",
                '"[Why do they not grow|Did I do something wrong]?" asked {hero}.',
                '"[Wait a little|Be patient|Good things take time]," said {elder}.',
            ),
            (
                "{hero} waited, and [watered the seeds|sang to the seeds], and waited again.",
                "Then, one [sunny|warm|bright] morning, there was a [small green leaf|tiny green plant].",
                "?Soon there were {number} tall plants with {colour} flowers.",
                '{friend} came to see the garden and said, "It is [beautiful|lovely]!"',
                "{hero} gave {f_him} a {colour} flower.",
            ),
        ),
        "good things take time",
    ),
    Plot(
        "{hero} Goes to the Market",
        (
            (
                '[One day|One morning], {elder} said, "Please go to the market and buy {food}."',
                "{hero} took a basket and {number} coins.",
                "On the way, {he} met {friend}, who looked [hungry|tired|sad].",
                '"[I have not eaten today|I am so hungry]," said {friend}.',
            ),
            (
                "{hero} [thought for a moment|looked at the coins].",
                "Then {he} bought {food} and gave half of it to {friend}.",
                '"[Thank you|How kind of you]!" said {friend}. "[I will never forget this|You have a good heart]."',
                "At home, {hero} told {elder} what {he} had done.",
                "{elder} was not angry at all.",
                '"[You did the right thing|That was kind]," said {elder}.',
            ),
        ),
        "it feels good to be kind",
    ),
    Plot(
        "The Boat on the [Lake|River]",
        (
            (
                "{hero} and {friend} found an old boat {spot_water}.",
                "It had a [hole|big hole], and its paint was [gone|old].",
                '"[Let us fix it|We can fix it]," said {friend}.',
                "They [worked for {number} days|worked hard].",
                "{hero} [closed the hole|found some wood], and {friend} painted it {colour}.",
            ),
            (
                "Then they pushed the boat into the water.",
                '"[Will it float|Will it sink]?" asked {hero}.',
                "It [rocked a little|moved from side to side], and then it [floated|swam like a duck]!",
                "?A [fish jumped|duck swam] beside them.",
                "They [sailed|rowed] to a small island and [ate|shared] {food} there.",
            ),
        ),
        "[two friends can do more than one|working together makes hard things easy]",
    ),
    Plot(
        "{hero} Tells the Truth",
        (
            (
                "[One day|One afternoon], {hero} played with a ball in the house.",
                "[Crash|Bang]! {his} ball hit a [cup|vase|bowl|plate], and it [broke|fell to the floor and broke].",
                '{hero} was [afraid|scared]. "[What will {elder} say|What shall I do]?" {he} thought.',
                "?{he} hid the pieces [under the bed|behind the chair].",
            ),
            (
                '{elder} came home and asked, "[Where is the cup|Did something break|What happened here]?"',
                "{hero} looked at the floor.",
                'Then {he} said, "[I broke it|It was me]. I am sorry."',
                '{elder} [smiled|was quiet for a moment]. "Thank you for telling the truth," said {elder}.',
                "Together they [cleaned the floor|picked up the pieces|fixed it with glue].",
            ),
        ),
        "it is best to tell the truth",
    ),
    Plot(
        "The [Lonely|New] {f_kind}",
        (
            (
                "[One day|In autumn], {a_f} named {friend} came to {place}.",
                "{friend} did not know anyone there.",
                "{f_he} sat {spot} and looked at the others.",
                "Nobody [spoke to {f_him}|asked {f_him} to play].",
                "{hero} saw it and [walked over|went to {f_him}].",
            ),
            (
                '"[Hello|Hi]! I am {hero}," {he} said. "What is your name?"',
                '"I am {friend}," said {friend} [in a quiet voice|shyly].',
                '"[Do you want to play with us|Would you like to see my {thing}|Come and play with me]?" asked {hero}.',
                "{friend} [nodded|smiled] for the first time [that day|in a long time].",
                "They played [with the {colour} {thing}|all afternoon], and soon {friend} had many friends.",
            ),
        ),
        "a kind word can make a new friend",
    ),
    Plot(
        "Lost in [the Woods|the Fog]",
        (
            (
                "{hero} [walked|went] too far and did not know the way home.",
                "All the [trees|paths] looked the same, and it was getting [dark|cold].",
                '"[Where am I|Hello! Is anyone there]?" {he} called.',
                "An [owl|old owl] looked down from a tree.",
                '"[Who are you|Why do you shout]?" asked the owl.',
            ),
            (
                '"I am {hero}, and I am lost," said {hero}.',
                '"[Follow the river|Follow the stars|Follow me]," said the owl. "[It will lead you home|I know the way]."',
                "{hero} did as the owl had said.",
                "?{he} was tired, but {he} did not stop.",
                "[At last|Soon] {he} saw a light in a window. It was {his} home!",
                "{elder} [hugged {him}|ran to meet {him}] and gave {him} {food}.",
            ),
        ),
        "it is good to ask for help",
    ),
    Plot(
        "The [Wise|Old] [Owl|Turtle]",
        (
            (
                "{hero} and {friend} could not agree.",
                '"The {thing} is mine," said {hero}. "No, it is mine," said {friend}.',
                "They [argued all morning|shouted at each other].",
                "So they went to the [old turtle|wise old owl] {spot}.",
            ),
            (
                '"[Listen|Sit down]," said the old one. "Who [found|made] the {thing}?"',
                '"{friend} did," said {hero}. "And who [cleaned|fixed|painted] it?" "{hero} did," said {friend}.',
                '"Then it belongs to [both of you|you both]," said the old one.',
                "{hero} looked at {friend}, and {friend} looked at {hero}, and they both [laughed|began to laugh].",
                '?"We were silly," said {hero}.',
            ),
        ),
        "it is better to talk than to fight",
    ),
    Plot(
        "{hero} Bakes a [Cake|Pie]",
        (
            (
                "{hero} wanted to bake a [cake|pie] for {elder}.",
                "{he} took flour, milk, eggs and [honey|sugar|butter].",
                "But {he} was in a hurry and [forgot the sugar|left it in the oven too long|put salt in it].",
                "The [cake|pie] tasted [terrible|very bad|awful]!",
            ),
            (
                "{friend} [tried not to laugh|took a bite and made a face].",
                '"[Let us make another one|We can try again], but slowly," said {f_he}.',
                "This time they read every word in the book.",
                "{hero} [stirred|mixed], and {friend} watched the oven.",
                "The second one was [sweet and warm|golden and sweet|perfect], and {elder} ate {number} pieces.",
            ),
        ),
        "[it is better to go slowly and do it well|a mistake is a chance to try again]",
    ),
    Plot(
        "The [Star|Moon] and the {kind}",
        (
            (
                "Every night, {hero} looked at the [stars|moon].",
                '"I want to [touch one|fly up there|have one]," {he} said.',
                "{he} climbed [a tall tree|the hill|the roof], but the sky was still far away.",
                "?{he} jumped as high as {he} could.",
                "{hero} sat down and sighed.",
            ),
            (
                "Then {friend} came and pointed to the [lake|pond|water].",
                "In the water, the [stars|moon] [shone|were shining] as bright as in the sky.",
                "{hero} put {his} hand in the water, and the light [danced|moved] around it.",
                '"[I touched the sky|Now they are close]," said {hero} [softly|with a smile].',
            ),
        ),
        "[beautiful things can be closer than you think|you can find beauty near your home]",
    ),
    Plot(
        "The [Hungry|Cold] Winter",
        (
            (
                "Winter came, and {place} was white with snow.",
                "{hero} had [a lot of food|enough {food_plain}] for the winter, because {he} had worked all summer.",
                "{friend} had played all summer and had [nothing|nothing to eat].",
                "One [cold|windy] day, {friend} knocked at the door.",
            ),
            (
                '"[Please|Dear {hero}], may I come in?" asked {friend}. "I am [cold|hungry] and I have no food."',
                '{hero} opened the door. "Come in and [sit by the fire|get warm]," {he} said.',
                "They [ate|shared] {food} by the fire.",
                '"Next summer, I will work with you," said {friend}, and {f_he} did.',
            ),
        ),
        "[we should help those who have less|it is wise to think of tomorrow]",
    ),
    Plot(
        "The Secret [Door|Map|Key]",
        (
            (
                "[One day|One rainy day], {hero} found an old [key|map] in {a_box}.",
                '"[What is it for|Where does it lead]?" asked {friend}.',
                '"Let us find out!" said {hero}.',
                "They [walked|went] to {place} and looked for [a door|a sign].",
            ),
            (
                "{spot_cap}, they found a [little door|small wooden door].",
                "{hero} opened it [slowly|with care]. Inside was [a room full of books|a room full of toys|a garden full of flowers].",
                '?"[Wow|Oh]!" said {friend}.',
                'There was also a letter. It said, "[Whoever finds this may stay|Take what you like, but leave something too]."',
                "So {hero} took a book and left {his} {colour} {thing} there.",
            ),
        ),
        "[a curious mind finds wonders|there is always something new to find]",
    ),
]
