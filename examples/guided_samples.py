"""Draw samples with classifier-free guidance, in the cells of a notebook.

Editors such as VS Code, PyCharm and Spyder run each `# %%` cell by itself; `python examples/guided_samples.py` runs all
of them. The prior must be class-conditional: `make demo` trains one on digits.
"""

# %% Load a prior. Its run folder holds the tokenizer too.
import os

import torch
from PIL import Image

from movq_cli import Prior

RUN = os.environ.get("RUN", "runs/digits-prior")
device = "cuda" if torch.cuda.is_available() else "cpu"
prior = Prior.load(RUN).to(device)
print(f"{len(prior.classes)} classes: {', '.join(prior.classes[:10])}")

# %% Draw four samples of each of the first ten classes, with rising strengths of guidance.
# Guidance 0 is off. Larger values move each code's distribution away from the unconditional one: the samples show their
# class more clearly, and differ less from each other. Image i depends on its seed (`seed` + i), its class and the
# settings alone, so that the columns of two strengths can be compared.
chosen = list(prior.classes[:10])
rows = []
for guidance in (0.0, 1.0, 3.0):
    settings = prior.header.sample.model_copy(update={"guidance": guidance})
    images = prior.sample(n=4 * len(chosen), seed=0, classes=chosen, settings=settings)  # [n, 3, H, W] in [-1, 1]
    rows.append(images)

# %% Arrange them: a row for each four samples of a strength, a column for each class (the classes are taken in turn).
images = torch.cat(rows).cpu()
_, _, height, width = images.shape
grid = images.unflatten(0, (-1, len(chosen))).permute(0, 3, 1, 4, 2).reshape(-1, len(chosen) * width, 3)
picture = Image.fromarray(((grid + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
picture.save(os.environ.get("PICTURE", "guided.png"))

# %% In a notebook, the last expression of a cell is displayed.
picture  # noqa: B018
