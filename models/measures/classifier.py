"""A small convolutional classifier: the judge of embedded data sets, for which there is no Inception network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64
EPOCHS, LR = 40, 2e-3  # its training recipe: AdamW, cosine decay to 0


class Classifier(nn.Module):
    """Images (B,C,S,S) in [-1, 1] -> logits (B, num_classes); its 64 last features measure Frechet distances."""

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 32, 3, padding=1)
        self.neck = nn.Linear(32 * (side // 4) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B,64)."""
        x = F.max_pool2d(F.silu(self.stem(x)), 2)
        x = F.max_pool2d(F.silu(self.middle(x)), 2)
        return F.silu(self.neck(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def augmented(x: Tensor, stream: torch.Generator) -> Tensor:
    """Images shifted by up to two pixels and lightly noised: one draw for the batch."""
    dy, dx = torch.randint(-2, 3, (2,), generator=stream).tolist()
    return x.roll((dy, dx), (2, 3)) + 0.1 * torch.randn(x.shape, generator=stream)
