"""The card of a reward model, in its folder: what it learnt from, what it is worth and what it is not."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from rlhf_ray.config import Config

CARD = "README.md"
"""Where Hugging Face's tools look for it."""
_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
---
# Reward model of the run {{ run }}

A sequence classifier with one label: it reads a dialogue with its last answer, and its logit is the reward. Load it
with `AutoModelForSequenceClassification` and `AutoTokenizer`{{ "; texts go through the tokenizer's chat template" if
backbone != "encoder" else "" }}.

## What it learnt from

Snapshot `{{ record.snapshot }}` of the feedback, as `reward_model.feedback={{ feedback }}`:
{% for kind, n in record.learnt_from.items() %}
- {{ n }} {{ kind }}{{ " of " + aspects if kind == "ratings" else "" }}
{% endfor %}
{% if record.ignored_annotators %}
- {{ record.ignored_annotators | length }} annotators were no better than chance and counted for nothing
{% endif %}
{% if record.half is not none %}
- one half of the annotators alone
{% endif %}
{% if record.shuffled_labels %}
- **its labels were shuffled: it is a control and knows nothing**
{% endif %}

## What it is worth

{% if record.n_held_out %}
On {{ record.n_held_out }} held-out choices, none of whose prompts it has seen, against {{ record.against }}:

| | accuracy | 95% interval |
|---|---|---|
| this model | {{ "%.3f" | format(record.accuracy) }} | {{ ends(record.accuracy_ci95) }} |
{% for name, value in record.baselines.items() %}
| {{ name }} | {{ "%.3f" | format(value) }} | |
{% endfor %}
{% for kind, found in record.by_kind.items() %}
| this model, on people's {{ kind }} | {{ "%.3f" | format(found.accuracy) }} | {{ ends(found.accuracy_ci95) }} |
{% endfor %}

Choices of annotators who were no better than chance are not among them. A difference of two scores times
{{ "%.3g" | format(record.logit_scale) }} is in {{ unit }}, with a calibration error of
{{ "%.3f" | format(record.calibration.ece) }}
{%- if record.calibration.ece_at_temperature is not none %}; divided by {{ "%.3g" | format(record.temperature) }}
besides, the temperature that suits choices that it did not learn from, of
{{ "%.3f" | format(record.calibration.ece_at_temperature) }}{% endif %}.
{% else %}
None of the judgements that were held out compare two answers: **how often it is right is not known.**
{% endif %}
{% if record.ratings and record.ratings.overall %}
Rank correlation with {{ record.ratings.overall.n }} held-out ratings:
{{ "%.3f" | format(record.ratings.overall.spearman) }}, {{ ends(record.ratings.overall.ci95) }}.
{% endif %}
{% if record.thumbs %}
Chance that of {{ record.thumbs.n }} held-out answers one with a thumb up is scored above one with a thumb down:
{{ "%.3f" | format(record.thumbs.auc) }}, {{ ends(record.thumbs.ci95) }}.
{% endif %}

## Limits

{% if members > 1 %}
- **This folder by itself is one of {{ members }} models whose mean was measured; the others are in `members`.**
{% endif %}
{% if record.gate.baseline and not record.gate.passed %}
- **On what people chose it is not surely better than `{{ record.gate.baseline }}`, which takes no model.**
{% endif %}
{% if record.length.correlation is not none %}
- Its margins and the answers' lengths have a rank correlation of {{ "%.2f" | format(record.length.correlation) }}.
{% endif %}
- It knows the answers of the policies that were judged. What another policy says, and what a policy says that was
  optimised against it for long, may be scored wrong with no sign of it.
- It has the preferences of the people who were asked.
"""


def write_card(folder: Path, record: dict[str, Any], config: Config) -> None:
    """Adds the card to a saved reward model. record: `reward_model.json`'s content."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = environment.from_string(_TEMPLATE).render(
        run=config.run.id,
        record=record,
        feedback=config.reward_model.feedback,
        backbone=config.reward_model.backbone,
        unit="standard deviations of ratings, taken for log-odds"
        if config.reward_model.feedback in ("ratings", "comments")
        else "log-odds",
        aspects=", ".join(f"{name} (weight {weight:g})" for name, weight in config.reward_model.aspects.items()),
        members=config.reward_model.ensemble.members,
        ends=lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}",
    )
    (folder / CARD).write_text(text, encoding="utf-8")
