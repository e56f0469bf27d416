"""What a model can be written as, for other tools."""

from __future__ import annotations

from typing import Literal

Layout = Literal["graftwork", "diffusers", "published"]
Adapters = Literal["beside", "alone"]  # of a finetune by LoRA: with the model that they were trained on, or without
