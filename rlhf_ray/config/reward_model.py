"""How a model of what people prefer is learnt from what they said."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.fits import RewardFitConfig
from rlhf_ray.config.lora import LoRAConfig
from rlhf_ray.config.section import Count, Positive, Section

NotNegative = Annotated[float, Field(ge=0)]


class KindWeights(Section):
    """What one judgement of each kind counts for; 0 leaves a kind out."""

    pairs: NotNegative = 1.0
    """Of two answers one is better, or neither."""
    rankings: NotNegative = 1.0
    """Three answers or more in order."""
    ratings: NotNegative = 1.0
    """Stars and points."""
    thumbs: NotNegative = 1.0
    """Up or down."""
    comments: NotNegative = 1.0
    """Words alone, times how sure it is what they are worth."""


class LinearConfig(Section):
    """Of `backbone: linear`."""

    solver: Literal["gradient", "ridge"] = "gradient"
    """`gradient`: L-BFGS on whatever was said; `ridge`: in closed form, from ratings or comments."""
    penalty: Positive = 1.0
    """On the squared weights; features are standardised, and losses are summed."""


class EnsembleConfig(Section):
    """What makes a reward model know how sure it is."""

    heads: Annotated[int, Field(ge=0)] = 8
    """Last layers learnt besides, each from other draws of the same prompts, at next to no cost; 0: none."""
    members: Count = 1
    """Whole models, each begun and shown its data otherwise; their mean is the reward."""


class RewardModelConfig(Section):
    """How a model of what people prefer is learnt from a snapshot of feedback."""

    path: Path | None = None
    """A reward model to use as it is: any sequence classifier with one label."""
    feedback: Literal["pairs", "rankings", "ratings", "thumbs", "comments", "joint"] = "pairs"
    """What is learnt from. `pairs`: rankings, two answers at a time (Bradley and Terry); `rankings`: whole ones
    (Plackett and Luce); `ratings`: stars and points (MSE); `thumbs` (BCE); `comments`: words, by what they are worth
    where people gave both; `joint`: all there is, in one model."""
    weights: KindWeights = KindWeights()
    """Of `joint`."""
    aspects: dict[str, float] = Field(default_factory=lambda: {"overall": 1.0}, min_length=1)
    """Aspects of ratings that are learnt, each by a head of its own, with what each counts for in the reward."""
    ties: Literal["none", "davidson", "rao_kupper"] = "none"
    """What a tie between two answers says: nothing, or that they are about as good, in Davidson's or Rao and Kupper's
    model. A ranking as a whole always says so of its ties."""
    margin: NotNegative = 0.0
    """Log-odds by which a choice between two has to be won in the mean, more where people said it is much better."""
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of choices between two answers, and of thumbs, that are known to be wrong."""
    centring: NotNegative = 0.0
    """Weight of the squared mean reward of a prompt's answers (Eisenstein et al., arXiv:2312.09244); 0.01 is usual."""
    reliability: bool = True
    """Count people by how far they can be relied on, where several judged the same; who is no better than chance counts
    for nothing."""
    backbone: Literal["decoder", "encoder", "linear"] = "decoder"
    """`decoder`: starts as the base policy's body; `encoder`: a small BERT with its own tokenizer; `linear`: a line
    through a body's features, which stay as they are."""
    body: Path | None = None
    """A pretrained model's folder that the body and its tokenizer are taken from instead."""
    linear: LinearConfig = LinearConfig()
    lora: LoRAConfig = LoRAConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    refresh: bool = False
    """Learn besides from what is said of the newer policy's answers, `run.from`'s; `rlhf reward --refresh` sets it."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts whose feedback only measures."""
    cross_validation: Literal[0] | Annotated[int, Field(ge=2)] = 0
    """Folds to train besides, for an accuracy with a small interval on few pairs; 0: none."""
    confirmed_by: Annotated[int, Field(ge=0)] = 50
    """Prompts whose choices, unseen, say how loud its scores may be, or ratings and thumbs where answers stand alone.
    Where validation has fewer, models like it are fitted besides, each without a tenth of the prompts, and asked of
    those; 0: never."""
    least_std: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Standard deviation that its scores have though nothing confirms them. 1: a control, as loud as a good model
    whatever it is worth; PPO then follows what noise there is."""
    judge: bool = False
    """Learn from one half of the annotators, and a second model from the other half: that one only measures
    (`evaluate.every`)."""
    limit: Count | None = None
    """A control: learn from so many judgements only, with `pairs` from so many pairs. What PPO then finds is what they
    left open."""
    shuffle_labels: bool = False
    """A control: learn from labels that say nothing. What PPO then gains is luck."""
    fit: RewardFitConfig = RewardFitConfig()

    @model_validator(mode="after")
    def _goes_together(self) -> "RewardModelConfig":
        if not any(self.aspects.values()):
            raise ValueError("aspects: one of them has to count for something, and all weights are 0")
        if self.lora.quantised:
            raise ValueError("lora.quantised is for the policy: a reward model's matrices are merged into its weights")
        if self.lora.rank and self.backbone == "linear":
            raise ValueError("lora.rank has no layer to learn beside a body that stays as it is: leave it out")
        if self.feedback == "rankings":
            for name, asked in (("smoothing", self.smoothing), ("margin", self.margin), ("ties", self.ties != "none")):
                if asked:
                    raise ValueError(
                        f"{name} is said of choices between two answers: with feedback=rankings, which takes each "
                        "ranking as a whole, leave it out, or take feedback=pairs"
                    )
        if self.backbone == "linear" and self.linear.solver == "ridge" and self.feedback not in ("ratings", "comments"):
            raise ValueError(
                f"linear.solver=ridge is for ratings and comments: with feedback={self.feedback} take gradient"
            )
        return self
