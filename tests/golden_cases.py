"""Golden numbers of the official code, copied into tests/golden."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from cfpretrain.core.model import CausalFusion
from cfpretrain.export.official import our_name

FOLDER = Path(__file__).parent / "golden"
CASES = ("patch1", "patch2", "many_steps", "patch2_steps")


@dataclass(frozen=True)
class GoldenCase:
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def model(self) -> CausalFusion:
        c = self.config
        model = CausalFusion(
            grid=c["grid"] // c["patch"],
            patch_values=c["patch"] ** 2 * c["channels"],
            width=c["width"],
            depth=c["depth"],
            num_heads=c["heads"],
            num_cond_tokens=c["cond_tokens"],
            num_classes=c["classes"],
        )
        model.load_state_dict({our_name(name): value for name, value in self.group("weights.").items()})
        return model


def load(name: str) -> GoldenCase:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        config = json.loads((file.metadata() or {})["config"])
        return GoldenCase(config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
