"""`python -m movq_cli`, which is what `torchrun -m` starts."""

from movq_cli.app import main

main()
