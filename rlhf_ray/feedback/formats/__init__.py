"""Human feedback in other people's formats: which there are, what a row of them says, how feedback is written so."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.feedback.formats import mqm, own, published, trl
from rlhf_ray.feedback.formats.judged import Judged
from rlhf_ray.feedback.formats.rows import Row
from rlhf_ray.feedback.schema import Feedback

Read = Callable[[Mapping[str, Any]], list[Judged] | list[Feedback]]
Write = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Format:
    """One way of writing feedback."""

    about: str
    """In a few words, for people who choose one."""
    read: Read | None = None
    """A row's judgements; raises `BadRow`. None where it says nothing that could be kept."""
    write: Write | None = None
    """The rows of one piece of feedback (`conversational`: as turns of a chat); raises `Unsayable`."""
    tabs: bool = False
    """A table with tabs, where it is not Parquet."""
    gather: Callable[[Iterable[Row]], Iterator[Row]] | None = None
    """Makes one row of several that belong together."""
    once: bool = False
    """Equal rows are written once."""


FORMATS: dict[str, Format] = {
    "feedback": Format("this project's own, nothing lost", own.read_own, own.write_own),
    "preference": Format("TRL: prompt, chosen, rejected", trl.read_preference, trl.write_preference),
    "implicit": Format("TRL: chosen and rejected, the prompt in both", trl.read_preference, trl.write_implicit),
    "unpaired": Format("TRL: prompt, completion, label", trl.read_unpaired, trl.write_unpaired),
    "prompt-only": Format("TRL: prompts", write=trl.write_prompt, once=True),
    "prompt-completion": Format("TRL: prompts with the answer liked best", write=trl.write_completion),
    "hh": Format("HH-RLHF's dialogues", published.read_hh, published.write_hh),
    "ultrafeedback": Format("UltraFeedback's ratings by aspect", published.read_ultrafeedback),
    "helpsteer2": Format("HelpSteer2's ratings, or its preferences", published.read_helpsteer),
    "shp": Format("Stanford's human preferences", published.read_shp),
    "summaries": Format("OpenAI's comparisons of summaries", published.read_summaries),
    "lmarena": Format("votes of the LMArena", published.read_arena, published.write_arena),
    "argilla": Format("records of Argilla", published.read_argilla),
    "mqm": Format("WMT's error marks, with tabs", mqm.read_mqm, tabs=True, gather=mqm.gather),
}
"""By the name that the command line and configs use."""
