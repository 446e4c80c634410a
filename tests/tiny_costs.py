"""The memory and arithmetic of the tiny preset's steps, computed once for all processes that a server forks.

Each training counts them when it starts, and to count them takes longer than the training of a tiny model.
"""

from __future__ import annotations

import torch

from movq_cli.settings import Preset
from movq_cli.training import cost
from tests.conftest import TINY

_CPU = torch.device("cpu")

torch.set_num_threads(1)  # A process that has started threads must not be forked.
_tiny = Preset.model_validate(TINY)
cost.of_tokenizer(_tiny.vq, _tiny.train_vq, _CPU, 1)
cost.of_prior(_tiny.prior, _tiny.vq.code_shape, _tiny.train_prior, _CPU, 1)
