"""What a model can be written as, for other tools."""

from __future__ import annotations

from typing import Literal

Layout = Literal["graftwork", "diffusers", "published"]
