"""Writes nca.json: NCALoss of pytorch-metric-learning (MIT) on a fixed batch, which is the soft nearest neighbor loss.

pip install pytorch-metric-learning==2.9.0 && python tests/golden/soft_nearest_neighbor/make_nca.py
"""

import json
from pathlib import Path

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import NCALoss

x = torch.sin(torch.arange(60, dtype=torch.float64).square()).view(12, 5) * 2
y = torch.arange(12) % 3
values = {}
for temperature in (0.5, 2.0, 30.0):
    loss = NCALoss(softmax_scale=1 / temperature, distance=LpDistance(normalize_embeddings=False, p=2, power=2))
    values[str(temperature)] = loss(x, y).item()
Path(__file__).with_name("nca.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
