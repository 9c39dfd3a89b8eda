"""What the base model is asked: openings that it finishes itself, templates, held-out prompts.

The nine held-out prompts are used by ``evaluate.py`` only.
"""

from __future__ import annotations

import random

#: Beginnings of a user's turn; the model samples the rest. Empty: it makes up the whole turn.
OPENINGS = (
    "", "", "", "", "", "", "", "", "", "", "", "",
    "Write a Python function that", "Write a Python function to", "Implement a Python class for",
    "Write a Python script that", "How do I use Python to", "Write a function in Python called",
    "Write unit tests for a Python function that", "Fix this Python code:\n\ndef ",
    "Write a C++ function that", "Implement in C++ a", "Write a C program that", "In C++, how do",
    "Write a C++ class that represents", "Write a JavaScript function that", "Write an SQL query",
    "Write a bash script that", "Write a Java method that", "Write a Rust function that",
    "Explain how", "Explain the concept of", "Explain the difference between", "Explain why",
    "Describe how", "What is meant by", "In simple terms, what is", "Explain to a child why",
    "Summarize the following text:\n\n", "Summarize this article in two sentences:\n\n",
    "Give a short summary of the following paragraph:\n\nThe", "Write a one-sentence summary:\n\n",
    "Rewrite the following to be more concise:\n\n", "List the key points of this text:\n\nIn",
    "What is the capital of", "Who was", "When did", "Where is", "What is the", "How many",
    "Why do", "Which country", "What causes", "Who invented", "What are the main",
    "Translate to French:", "Translate the following sentence into Spanish:", "How do you say",
    "Translate this into German:", "Translate the following English text to Italian:\n\n",
    "Translate from French to English:", "Translate from Spanish to English:",
    "Write a short story about", "Write a poem about", "Write a haiku about", "Write a dialogue",
    "Write the opening paragraph of a novel about", "Write a limerick about", "Create a character",
    "Write an email to", "Write a product description for", "Write a letter to",
    "Solve step by step:", "If a train", "A farmer has", "A shop sells", "Calculate the",
    "Solve the equation", "What is the probability", "A rectangle has", "Sarah has", "There are",
    "Review the following code and suggest improvements:\n\n```python\ndef ",
    "Review this Python class:\n\n```python\nclass ",
    "Please review this C++ code:\n\n```cpp\n#include <",
    "Find the bug in this code:\n\n```python\nimport ",
    "What does this function do?\n\n```python\ndef ",
    "Can you refactor this JavaScript code?\n\n```javascript\nfunction ",
    "Give me tips for", "How can I", "What are the pros and cons of", "Compare", "Make a list of",
    "Plan a", "Suggest", "I am feeling", "Can you help me", "Write an essay on", "Define",
)  # fmt: skip

TEMPLATES = {
    "code": (
        "Write a Python function that {task}.", "Write a C++ function that {task}.",
        "Write a Python program that {task}. Add comments.", "Show me how to {verb} in Python.",
        "Write a C++ program that {task} and prints the result.",
        "Write a JavaScript function that {task}.", "Give an example of code that {task}.",
        "Write a Python class with a method that {task}, and explain it.",
    ),
    "topic": (
        "Explain {topic}.", "Explain {topic} to a beginner.",
        "What is {topic} and why is it important?",
        "Describe {topic} in three paragraphs.", "Give five facts about {topic}.",
        "What are the advantages and disadvantages of {topic}?", "How does {topic} work?",
        "Write a short introduction to {topic}.", "What are common misconceptions about {topic}?",
        "Write a quiz with answers about {topic}.", "Summarize what is known about {topic}.",
    ),
    "creative": (
        "Write a short story about {thing} and {thing2}.", "Write a poem about {thing}.",
        "Write a funny dialogue between {thing} and {thing2}.", "Describe {thing} vividly.",
        "Write the first paragraph of a mystery about {thing}.",
    ),
    "translate": (
        "Translate to {language}: \"{sentence}\"", "How do you say \"{sentence}\" in {language}?",
        "Translate the following into {language} and explain each word: {sentence}",
    ),
    "maths": (
        "A box has {a} red balls and {b} blue balls. {name} adds {c} more. How many are there now?",
        "{name} buys {a} pens at {b} dollars each and pays with {c}00 dollars. What is the change?",
        "Solve for x: {a}x + {b} = {c}. Show every step.",
        "What is {a}% of {b}{c}? Explain step by step.",
        "A car drives {a}0 km in {b} hours. How far does it go in {c} hours? Show the steps.",
        "The sides of a rectangle are {a} and {b}. Find its area and perimeter.",
    ),
}  # fmt: skip

WORDS = {
    "task": (
        "counts the vowels in a string", "finds the largest element of a list",
        "computes the nth Fibonacci number", "merges two sorted arrays",
        "checks for balanced brackets",
        "removes duplicates from a list", "sorts a list with quicksort", "reads a CSV file",
        "converts Celsius to Fahrenheit", "finds all prime factors of a number", "rotates a matrix",
        "computes the factorial recursively", "does a binary search", "counts word frequencies",
        "validates an email address", "finds the shortest path in a graph", "parses a date",
        "implements a stack with a linked list", "computes the average of each column",
        "generates a random password", "encrypts text with a Caesar cipher",
        "flattens nested lists",
        "computes the edit distance of two words", "prints a multiplication table",
        "groups anagrams together", "downloads a web page", "draws a triangle of stars",
        "checks whether a year is a leap year", "converts Roman numerals to integers",
        "simulates rolling two dice", "computes compound interest", "transposes a matrix",
        "finds common elements of two sets", "implements a queue", "inverts a binary tree",
    ),
    "verb": (
        "read a file line by line", "sort a dictionary by value", "use list comprehensions",
        "handle exceptions", "write a decorator", "use a generator", "parse JSON", "open a socket",
        "plot a sine wave", "use regular expressions", "format strings", "work with dates",
        "connect to a database", "use threads", "measure running time", "split a string",
    ),
    "topic": (
        "photosynthesis", "black holes", "inflation", "the water cycle", "machine learning",
        "gravity",
        "the French Revolution", "vaccines", "plate tectonics", "supply and demand", "DNA",
        "democracy",
        "the Roman Empire", "electric cars", "climate change", "the immune system", "blockchain",
        "recursion", "operating systems", "the printing press", "the human heart", "volcanoes",
        "relativity", "coral reefs", "the stock market", "jazz", "chess", "yoga",
        "renewable energy",
        "the solar system", "bees and pollination", "quantum computers", "the Silk Road", "sleep",
        "antibiotics", "evolution", "the internet", "memory", "nuclear power", "the Renaissance",
        "tides", "fermentation", "earthquakes", "the alphabet", "game theory", "soil", "glaciers",
        "cryptography", "world trade", "the nervous system", "public transport", "coffee", "opera",
        "hash tables", "version control", "probability", "the Industrial Revolution", "whales",
    ),
    "thing": (
        "a lonely robot", "an old lighthouse", "a lost dog", "the moon", "a clever fox",
        "a rusty bicycle",
        "a young wizard", "a forgotten city", "the first snow", "a train at midnight", "a violin",
        "a dragon who hates fire", "a tiny garden", "an honest thief", "a talking teapot",
        "the sea",
        "a retired astronaut", "a busy market", "a secret door", "two brothers", "a broken clock",
        "a shy ghost", "an autumn forest", "a paper boat", "a stubborn goat", "a night watchman",
    ),
    "language": ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch", "Latin"),
    "sentence": (
        "The weather is very nice today.", "I would like a cup of tea.", "My brother lives abroad.",
        "She reads a book every week.", "We are going to the beach tomorrow.",
        "Thank you very much.",
        "The children are playing in the park.", "Can you tell me the time?", "I lost my keys.",
        "The museum opens at nine.", "He has never seen snow.", "Our house has a red door.",
        "Please close the window.", "They arrived late last night.", "The soup is too hot.",
    ),
    "name": ("Tom", "Maria", "Ahmed", "Lena", "Kofi", "Yuki", "Sam", "Priya", "Olga", "Ben"),
}  # fmt: skip

#: One prompt for each kind of work; nothing like them is in the training set on purpose.
HELD_OUT = {
    "code_python": "Write a Python function that takes a list of (start, end) meeting times and "
    "returns the minimum number of rooms needed. Include a docstring and an example call.",
    "code_cpp": "Write a C++ template class for a fixed-capacity ring buffer with push, pop and "
    "size, and a main function that exercises it.",
    "explain_concept": "Explain how noise-cancelling headphones manage to remove the sound of an "
    "aeroplane cabin but not somebody's voice.",
    "summarize": "Summarize in three bullet points:\n\nThe city council voted on Tuesday to close "
    "two lanes of the harbour bridge for eleven months so that its steel cables, last inspected "
    "in 1987, can be replaced. Ferry operators will run extra boats at rush hour, paid for by a "
    "surcharge on parking. Shop owners near the bridge warned that fewer passing customers could "
    "force some of them out of business, while cycling groups welcomed a temporary bike lane.",
    "qa_factual": "Which planet has the most moons, and which of its moons is the largest?",
    "translation": "Translate to French: \"The baker on our street sells the best bread, but you "
    "have to get up early because it is gone by eight o'clock.\"",
    "creative_short": "Write a short story about a cartographer who discovers that one of her maps "
    "has started to change by itself.",
    "stepwise_math": "A water tank holds 840 litres. One pipe fills it at 35 litres per minute "
    "while a leak drains 7 litres per minute. How long until the tank is full? Think step by step.",
    "long_code_review": "Review the following code. Point out bugs, naming problems and missing "
    "error handling, then show an improved version.\n\n```python\nimport json, os\n\ndef load(p):"
    "\n    f = open(p)\n    d = json.load(f)\n    return d\n\ndef save(p, d):\n    if os.path."
    "exists(p):\n        os.remove(p)\n    f = open(p, 'w')\n    f.write(json.dumps(d))\n\ndef "
    "merge(a, b={}):\n    for k in b:\n        if k in a:\n            a[k] = a[k] + b[k]\n        "
    "else:\n            a[k] = b[k]\n    return a\n\ndef average(xs):\n    s = 0\n    for i in "
    "range(0, len(xs) + 1):\n        s += xs[i]\n    return s / len(xs)\n```",
}  # fmt: skip


def draw(rng: random.Random) -> tuple[str, bool]:
    """Return a user's turn and whether the model has to finish it."""
    if rng.random() < 0.75:
        return rng.choice(OPENINGS), True
    template = rng.choice(TEMPLATES[rng.choice(tuple(TEMPLATES))])
    words = {key: rng.choice(values) for key, values in WORDS.items()}
    words["thing2"] = rng.choice(WORDS["thing"])
    numbers = {key: str(rng.randint(2, 40)) for key in "abc"}
    return template.format(**words, **numbers), False
