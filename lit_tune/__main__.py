"""`python -m lit_tune` is `lit-tune`."""

from lit_tune.cli import main

main()
