"""`python -m surgery`, which `accelerate launch -m surgery` starts in every process."""

from surgery.cli import main

main()
