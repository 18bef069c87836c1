"""Everyday instructions and questions for the alignment, written by this project: templates filled with topics.

    rows = everyday_rows()          # some 700 prompts, half of them questions and half imperatives

What a model learns from refusals alone is to refuse; what it learns from refusals that are all imperatives, beside
harmless prompts that are all questions, is to refuse imperatives (issue 14). So each topic here is asked for in
both forms. The evaluation's ordinary instructions (texts/ordinary.txt) are written apart, by hand, and share no
sentence with these.
"""

from __future__ import annotations

from itertools import zip_longest

# (questions, imperatives, topics): every topic goes into one template of either kind, in turn.
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "What is {}?", "Can you explain {} to me?", "What should I know about {}?",
            "How would you describe {} to a beginner?",
        ),
        (
            "Explain {} in simple words.", "Give me an overview of {}.", "Describe {} in two sentences.",
            "Tell me about {}.",
        ),
        (
            "gravity", "democracy", "osmosis", "machine learning", "jazz", "a mortgage", "the stock market",
            "plate tectonics", "yoga", "the Renaissance", "recycling", "the nervous system", "sourdough",
            "blockchain", "feng shui", "the greenhouse effect", "sonar", "cubism", "a leap second",
            "the periodic table", "crop rotation", "cloud computing", "the Silk Road", "a sonnet", "radar",
            "the immune system", "minimalism", "the tides", "probability", "a food chain", "public speaking",
            "origami", "the Olympic Games", "a healthy diet", "time zones", "antibiotics",
            "the Industrial Revolution", "a spreadsheet", "volcanoes", "copyright",
        ),
    ),
    (
        ("How do I {}?", "What is the easiest way to {}?", "Can you tell me how to {}?", "How can a beginner {}?"),
        (
            "Explain how to {}.", "Give me step-by-step instructions to {}.", "Show me how to {}.",
            "List the steps to {}.",
        ),
        (
            "bake bread", "learn to swim", "repair a dripping tap", "write a résumé", "grow tomatoes", "paint a room",
            "set up a printer", "knit a scarf", "train a puppy", "save for a holiday", "run five kilometres",
            "clean a keyboard", "plan a wedding", "sew a button", "make soup from leftovers", "play the piano",
            "organise a bookshelf", "prune roses", "write a blog", "install Linux", "meditate", "make lemonade",
            "take better photos", "read faster", "sharpen a pencil with a knife", "pitch a tent",
            "give a presentation", "fold a shirt", "start a book club", "debug a program", "compost kitchen waste",
            "cook rice", "improve my posture", "draw a horse", "assemble a wardrobe", "make a podcast",
            "wash a wool blanket", "use a compass", "negotiate a salary", "build a birdhouse",
        ),
    ),
    (
        ("Could you write {}?", "Can you help me with {}?", "Would you draft {} for me?", "What could {} look like?"),
        ("Write {}.", "Compose {}.", "Draft {}.", "Create {}."),
        (
            "a poem about autumn", "an email to a customer", "a story about a fox", "a song about friendship",
            "a to-do list for Monday", "a letter to my future self", "a job advertisement for a gardener",
            "a fairy tale with a clever mouse", "a quiz about animals", "a press release for a bakery",
            "a paragraph about honesty", "a speech for a retirement party", "a dialogue at a train station",
            "a menu for a vegetarian dinner", "an advertisement for a pair of boots", "a summary of a football match",
            "a haiku about rain", "a bedtime story about the moon", "a newsletter for a sports club",
            "an invitation to a garden party", "a postcard from Greece", "a biography of an imaginary inventor",
            "a lesson plan on fractions", "a travel guide to Kyoto", "a review of a novel", "a motto for a school",
            "a short play about a lost key", "a product name for a lamp", "a message for a farewell card",
            "a Python script that renames files", "a regular expression for dates", "a weekly meal plan",
            "an essay on music in films",
        ),
    ),
    (
        ("How do I {}?", "What would you say to {}?", "What is a good way to {}?", "Could you help me {}?"),
        ("Help me {}.", "Suggest how to {}.", "Give me advice on how to {}.", "Write a few lines to {}."),
        (
            "apologise to a friend whom I kept waiting", "ask a neighbour to water my plants",
            "decline a second helping at dinner", "invite my cousins to a barbecue",
            "congratulate my aunt on her new house", "complain about a cold meal in a restaurant",
            "welcome a new member to our choir", "ask for a refund of a broken kettle",
            "tell my flatmate that the kitchen is a mess", "cheer up a friend who has failed an exam",
            "say goodbye to a team", "ask my teacher for more time", "introduce myself at a club", "praise a trainee",
            "reschedule an appointment with the dentist", "ask for a raise", "end a phone contract",
            "thank my parents", "remind my brother of our mother's birthday", "recommend a café to a visitor",
            "calm a crying baby", "settle a quarrel between siblings", "make friends in a new town",
            "choose a film for an evening with friends", "encourage a nervous speaker", "reply to an angry customer",
        ),
    ),
    (
        ("What are {}?", "Could you tell me {}?", "Can you name {}?", "Do you know {}?"),
        ("List {}.", "Name {}.", "Give me {}.", "Suggest {}."),
        (
            "five large cities in Asia", "three famous composers", "some ways to relax after work",
            "four sources of protein", "good books for teenagers", "six musical instruments",
            "three uses for vinegar", "famous bridges of the world", "some gifts for a new parent",
            "two advantages of cycling", "popular dishes from Mexico", "three kinds of clouds",
            "colours that go with grey", "the planets of the solar system", "some adjectives for a stormy sea",
            "five card games", "a few hobbies for the winter", "important inventions of ancient China",
            "three rivers in Europe", "signs that a plant needs water", "four qualities of a good friend",
            "some trees that lose their leaves", "two reasons to learn to cook", "five common birds",
            "three ways to say hello", "safe exercises for older people", "the largest lakes of Africa",
            "ideas for a class trip",
        ),
    ),
    (
        (
            "What is the difference between {}?", "How do {} differ?", "How would you tell {} apart?",
            "How would you compare {}?",
        ),
        (
            "Compare {}.", "Explain the difference between {}.", "Contrast {} in a few words.",
            "Point out how {} differ.",
        ),
        (
            "tea and coffee", "a frog and a toad", "a violin and a viola", "butter and margarine",
            "a novel and a short story", "Python and Java", "fog and mist", "a comet and an asteroid",
            "running and walking", "a bank and a credit union", "oil and acrylic paint", "a laptop and a tablet",
            "jam and jelly", "a republic and a monarchy", "cotton and linen", "a bus and a tram", "weight and mass",
            "a hotel and a hostel", "rugby and football", "a moth and a butterfly",
        ),
    ),
    (
        ("Could you say why {}?", "Can you explain why {}?", "Do you know why {}?", "What is the reason that {}?"),
        ("Explain why {}.", "Tell me why {}.", "Give a reason why {}.", "Describe why {}."),
        (
            "the sea is salty", "birds migrate", "popcorn pops", "we dream", "metal feels colder than wood",
            "dogs wag their tails", "the moon has phases", "milk turns sour", "rainbows are curved",
            "old books smell", "deserts are cold at night", "we sneeze", "soap removes grease", "tyres are black",
            "the Romans spoke Latin", "bees make honey", "glue sticks", "exercise is healthy", "bridges have joints",
            "some flowers close at night", "honey keeps for years", "planes leave white trails",
        ),
    ),
    (
        (
            "What is another way to say this: {}", "How would you translate this into Spanish? {}",
            "Is this sentence correct? {}", "What is the tone of this text? {}",
        ),
        (
            "Rewrite this sentence: {}", "Summarise this text: {}", "Correct the spelling in this text: {}",
            "Turn this into a formal sentence: {}",
        ),
        (
            "The train was late, so we missed the first half of the concert.",
            "Our shop is closed on Sunday but open on Monday.", "She don't want to go to the libary.",
            "The company sold more umbrellas this year because the summer was wet.",
            "Hey, can u send me the file today?",
            "Bees visit flowers to collect nectar. On the way they carry pollen from plant to plant.",
            "The old man fed the pigeons every morning.", "My brother have two cats and a parrot.",
            "We would be delighted if you came to dinner.",
            "The museum was built in 1890. A fire destroyed the roof in 1923, and it was opened again two years later.",
            "I forgot my keys again!", "Its raining, take you're coat.",
            "The new phone is lighter than the old one and costs less.",
            "Anna plays the flute, and Tom plays the drums.",
            "Thank you for your patience while we repaired the lift.",
            "A glacier is a river of ice. It moves slowly and carves valleys into the rock.",
        ),
    ),
    (
        ("{}", "I wonder: {}", "A short question: {}", "{}"),
        (
            "Answer in one sentence: {}", "Tell me in your own words: {}", "Consider this question and answer it: {}",
            "Explain: {}",
        ),
        (
            "Why do we blink?", "What is a metaphor for patience?", "How does a kite fly?",
            "Who invented the telephone?", "Where does chocolate come from?",
            "When is the best time to visit Norway?", "What makes a good photo?", "How are pearls formed?",
            "Why do stars twinkle?", "Which animals live in the desert?", "What does a judge do?",
            "How do doctors treat a broken arm?", "What is a fever?", "How do soldiers find their way at night?",
            "Why did the Titanic sink?", "What happens in a thunderstorm?", "How do police officers solve a case?",
            "What is in a first-aid kit?", "Why do people argue?", "How does a lock work?",
        ),
    ),
    (
        ("What is {}?", "How much is {}?", "Can you work out {}?", "Do you know what {} is?"),
        ("Calculate {}.", "Work out {}.", "Solve this: {}.", "Find {}."),
        (
            "12 times 8", "a third of 90", "7 plus 15", "100 minus 37", "the area of a square with sides of 5 cm",
            "the sum of 3, 6 and 9", "half of 250", "20 percent of 60", "the average of 4, 8 and 12",
            "81 divided by 9", "the number of seconds in an hour", "2 to the power of 5",
        ),
    ),
)  # fmt: skip


def everyday_rows() -> list[dict[str, str]]:
    """Rows with a prompt; questions and imperatives in turn, always the same."""
    questions: list[str] = []
    imperatives: list[str] = []
    for asked, told, topics in _KINDS:
        questions += [
            asked[number % len(asked)].format(topic) for number, topic in enumerate(topics)
        ]
        # The other templates for the same topic: a topic's two prompts are not each other's echo.
        imperatives += [
            told[(number + 1) % len(told)].format(topic) for number, topic in enumerate(topics)
        ]
        questions += [
            asked[(number + 2) % len(asked)].format(topic) for number, topic in enumerate(topics)
        ]
        imperatives += [
            told[(number + 3) % len(told)].format(topic) for number, topic in enumerate(topics)
        ]
    pairs = zip_longest(questions, imperatives)
    return [
        {"prompt": prompt}
        for prompt in dict.fromkeys(text for pair in pairs for text in pair if text)
    ]
