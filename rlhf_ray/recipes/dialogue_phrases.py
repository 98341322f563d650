"""The words of the invented shop: what customers write about, and the pieces that answers are put together from."""

from dataclasses import dataclass

COLOURS = (
    "blue", "red", "green", "white", "black", "yellow", "brown", "pink", "grey", "purple", "orange", "silver",
)  # fmt: skip
ITEMS = (
    "lamp", "kettle", "chair", "table", "clock", "mirror", "basket", "blanket", "radio", "camera", "jacket", "bicycle",
    "pillow", "teapot", "bench", "helmet",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of trouble: how customers put it, and what a good answer promises.

    Gold knows a remedy and a step by their key words below.
    """

    name: str
    complaints: tuple[str, ...]
    """`{thing}` stands for colour and item."""
    fact: str
    """How an answer repeats the trouble: `your {thing} {fact}`."""
    remedy: str
    step: str


PROBLEMS = (
    Problem(
        "broken",
        ("My {thing} arrived broken.", "The box came and my {thing} was in pieces."),
        "arrived broken",
        "We will send a new one.",
        "Please throw the pieces away.",
    ),
    Problem(
        "late",
        ("I am still waiting for my {thing}.", "My {thing} has not arrived yet."),
        "is late",
        "We will ask the driver.",
        "You get a call by tomorrow.",
    ),
    Problem(
        "wrong_size",
        ("My {thing} is too small for me.", "I need a larger size of my {thing}."),
        "has the wrong size",
        "We will swap it for a larger size.",
        "Use the label in the bag.",
    ),
    Problem(
        "charged_twice",
        ("I paid two times for my {thing}.", "You charged me twice for my {thing}."),
        "was charged twice",
        "We will pay back one charge.",
        "Check your bank on friday.",
    ),
    Problem(
        "stopped",
        ("My {thing} stopped working.", "After one week my {thing} does not work."),
        "stopped working",
        "Our workshop will repair it.",
        "A courier fetches it on monday.",
    ),
    Problem(
        "missing_part",
        ("A screw of my {thing} is missing.", "My {thing} came without all of its screws."),
        "came without a screw",
        "We will mail the screw.",
        "Look for a small letter.",
    ),
    Problem(
        "return",
        ("I do not like my {thing} and want to send it back.", "How can I give my {thing} back?"),
        "is not what you wanted",
        "You may return it for free.",
        "Bring it to any post office.",
    ),
    Problem(
        "manual",
        ("I lost the manual of my {thing}.", "Where is the manual for my {thing}?"),
        "has no manual",
        "We will email you the pages.",
        "Open the link inside.",
    ),
    Problem(
        "address",
        ("I moved and my {thing} goes to my old street.", "Please send my {thing} to my new street."),
        "goes to the old street",
        "We will change the address.",
        "Reply with your new street.",
    ),
    Problem(
        "discount",
        ("The price of my {thing} fell after I paid.", "My {thing} is cheaper now than when I paid."),
        "is cheaper now",
        "We will give you a voucher.",
        "Type the code at checkout.",
    ),
)

REMEDY_KEYS = {
    "broken": "new one",
    "late": "driver",
    "wrong_size": "swap",
    "charged_twice": "one charge",
    "stopped": "workshop",
    "missing_part": "mail",
    "return": "return it",
    "manual": "pages",
    "address": "address",
    "discount": "voucher",
}
"""The words by which a remedy is known, whatever its phrasing."""
STEP_KEYS = {
    "broken": "the pieces",
    "late": "by tomorrow",
    "wrong_size": "label",
    "charged_twice": "bank",
    "stopped": "courier",
    "missing_part": "small letter",
    "return": "post office",
    "manual": "link inside",
    "address": "your new street",
    "discount": "checkout",
}

GREETINGS = ("Hello.", "Hi there.", "Good morning.", "Good evening.", "")
ENDINGS = ("What can I do?", "Please help me.", "Can you help?", "")

POLITE_OPENERS = (
    "Thank you for writing.",
    "Thanks for your message.",
    "Thank you for telling us.",
    "It is good to hear from you.",
    "We read your letter with care.",
)
RUDE_OPENERS = ("What is it now?", "You again.", "Read the page first.")
SORRY = (
    "We are sorry that your {thing} {fact}.",
    "Sorry to hear your {thing} {fact}.",
    "It is a pity that your {thing} {fact}.",
)
POLITE_CLOSERS = (
    "We are glad to help.",
    "Have a lovely day.",
    "Write to us at any time.",
    "All the best from our shop.",
    "Warm wishes to you.",
)
RUDE_CLOSERS = ("Do not write again.", "That is all you get.", "Now leave us alone.")
FILLERS = (
    "Our shop is very old.",
    "The weather was nice this week.",
    "Many people walk past our window.",
    "Our cat sleeps near the door.",
)
