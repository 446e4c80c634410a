"""A campaign against the commands: kills, full disks and damaged files, whose results are counted.

`make campaign` runs all of it and writes benchmarks/results/campaign.json; tests/test_campaign.py runs a small part.
"""
