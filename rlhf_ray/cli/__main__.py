"""`python -m rlhf_ray.cli`."""

from rlhf_ray.cli import main

main()
