"""A customer of several turns is pleased by answers about what they spoke of last."""

from rlhf_ray.recipes.dialogue_turns import Customer, _things
from rlhf_ray.types import Message, Prompt

PROMPT = Prompt("p", (Message("user", "Hello. My blue lamp arrived broken."),), group="p")


def test_the_dialogue_opens_with_the_prompt_and_goes_on_with_something_else() -> None:
    customer = Customer(PROMPT, seed=1)
    assert customer.observe() == PROMPT.messages
    assert customer.act("Sorry about your blue lamp.")
    (reply,) = customer.observe()
    assert reply.role == "user"
    assert len(_things(reply.content)) == 1


def test_an_answer_pleases_where_it_names_the_last_thing_and_no_other() -> None:
    customer = Customer(PROMPT, seed=1)
    customer.act("Sorry about your blue lamp.")
    (thing,) = _things(customer.observe()[0].content)
    customer.act(f"Your {thing} and your blue lamp.")
    assert customer.reward() == 0.5
    (thing,) = _things(customer.observe()[0].content)
    customer.act(f"Your {thing}.")
    assert customer.reward() == 2 / 3


def test_one_seed_meets_the_same_customer() -> None:
    turns = []
    for _ in range(2):
        customer = Customer(PROMPT, seed=7)
        customer.act("")
        turns.append(customer.observe())
    assert turns[0] == turns[1]
