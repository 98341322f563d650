"""Learning through small matrices beside a network's own."""

from typing import Annotated

from pydantic import Field

from rlhf_ray.config.section import Count, Section


class LoRAConfig(Section):
    """Learning through small matrices beside the policy's and the critic's own, which then stay as they are."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Width of the matrices; 0: all weights learn."""
    alpha: Count = 32
    """What the matrices add is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get them, such as `q_proj`; by default every linear layer."""
    quantised: bool = False
    """Keep the weights that stay as they are in 4 bits (QLoRA); needs the extra `quantised`."""
