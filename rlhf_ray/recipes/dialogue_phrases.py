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
    facts: tuple[str, ...]
    """How an answer may repeat the trouble: `your {thing} {fact}`."""
    remedies: tuple[str, ...]
    steps: tuple[str, ...]


PROBLEMS = (
    Problem(
        "broken",
        ("My {thing} arrived broken.", "The box came and my {thing} was in pieces."),
        ("arrived broken", "came in pieces"),
        ("We will send a new one.", "A new one leaves our shop today.", "You shall have a new one soon."),
        ("Please throw the pieces away.", "Keep the pieces out of reach.", "Put the pieces in a bin."),
    ),
    Problem(
        "late",
        ("I am still waiting for my {thing}.", "My {thing} has not arrived yet."),
        ("is late", "has not reached you"),
        ("We will ask the driver.", "Our driver will hear from us.", "The driver has to explain this."),
        ("You get a call by tomorrow.", "By tomorrow we know more.", "Expect news by tomorrow evening."),
    ),
    Problem(
        "wrong_size",
        ("My {thing} is too small for me.", "I need a larger size of my {thing}."),
        ("has the wrong size", "does not fit"),
        ("We will swap it for a larger size.", "A swap costs you nothing.", "Our team can swap sizes at once."),
        ("Use the label in the bag.", "Stick the label on the box.", "Print a label at home."),
    ),
    Problem(
        "charged_twice",
        ("I paid two times for my {thing}.", "You charged me twice for my {thing}."),
        ("was charged twice", "was paid two times"),
        ("We will pay back one charge.", "You get one charge refunded.", "We cancel one charge right away."),
        ("Check your bank on friday.", "Your bank shows it next week.", "Ask the bank in three days."),
    ),
    Problem(
        "stopped",
        ("My {thing} stopped working.", "After one week my {thing} does not work."),
        ("stopped working", "does not work"),
        ("Our workshop will repair it.", "The workshop looks into the fault.", "We let our workshop mend that."),
        ("A courier fetches it on monday.", "Hand everything to the courier.", "Wait for our courier at noon."),
    ),
    Problem(
        "missing_part",
        ("A screw of my {thing} is missing.", "My {thing} came without all of its screws."),
        ("came without a screw", "lacks a part"),
        ("We will mail the screw.", "Another screw comes by mail.", "We mail you what is missing."),
        ("Look for a small letter.", "A small letter reaches you shortly.", "Shake the small letter gently."),
    ),
    Problem(
        "return",
        ("I do not like my {thing} and want to send it back.", "How can I give my {thing} back?"),
        ("is not what you wanted", "did not please you"),
        ("You may return it for free.", "Please return it within a month.", "You can return it unpacked."),
        ("Bring it to any post office.", "The post office takes parcels daily.", "Drop it at a post office nearby."),
    ),
    Problem(
        "manual",
        ("I lost the manual of my {thing}.", "Where is the manual for my {thing}?"),
        ("has no manual", "needs a manual"),
        ("We will email you the pages.", "All pages are on their way.", "You receive the pages as files."),
        ("Open the link inside.", "Click the link inside our email.", "Follow the link inside to read."),
    ),
    Problem(
        "address",
        ("I moved and my {thing} goes to my old street.", "Please send my {thing} to my new street."),
        ("goes to the old street", "was sent elsewhere"),
        ("We will change the address.", "Your address is corrected already.", "The address gets mended overnight."),
        ("Reply with your new street.", "Tell us your new street again.", "Spell your new street slowly."),
    ),
    Problem(
        "discount",
        ("The price of my {thing} fell after I paid.", "My {thing} is cheaper now than when I paid."),
        ("is cheaper now", "has a lower price"),
        ("We will give you a voucher.", "A voucher makes up for this.", "Your voucher covers the difference."),
        ("Type the code at checkout.", "Show us that at checkout time.", "The checkout asks for its number."),
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
    "We regret that your {thing} {fact}.",
    "What a shame that your {thing} {fact}.",
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
