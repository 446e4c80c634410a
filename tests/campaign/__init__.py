"""A campaign against the commands: kills, full disks, damaged files and lost ranks, whose results are counted.

`make campaign` runs all of it and writes benchmarks/results/campaign.json; tests/test_campaign.py runs a small part.
"""

import os

# As in `movq_cli.app`, which cannot set it here: the commands are forked from a process that has imported torch.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
