"""Files that no program would read are refused when the job is read."""

from __future__ import annotations

from typing import Any

import pytest

from raylora.adapt.export_options import ExportOptions, naming_problems
from raylora.networks import get_network


def problems(naming: str, family: str, kind: str, **given: Any) -> list[str]:
    export = ExportOptions.model_validate({"naming": naming})
    return list(naming_problems(export, get_network(kind).options(**given), family))


@pytest.mark.parametrize(
    ("naming", "family", "kind", "given", "told"),
    [
        ("diffusers", "sdxl", "loha", {}, "diffusers has no names for loha. Set it to kohya"),
        ("diffusers", "flux1", "lycoris", {"algo": "boft"}, "has no names for lycoris"),
        ("diffusers", "sd15", "locon", {"tucker": True}, "third factor of network.tucker"),
        ("diffusers", "sd15", "dora", {"axis": "input"}, "network.axis to output"),
        ("comfyui", "sd15", "lora", {}, "for sd15 ComfyUI reads kohya's names"),
        ("comfyui", "sd2", "lora", {}, "for sd2 ComfyUI reads kohya's names"),
        ("comfyui", "flux1", "lycoris", {"algo": "ia3"}, "ComfyUI does not read ia3"),
    ],
)
def test_names_that_would_not_be_read_are_refused(
    naming: str, family: str, kind: str, given: dict[str, Any], told: str
) -> None:
    (problem,) = problems(naming, family, kind, **given)
    assert told in problem
    assert problem.startswith(f"export.naming is {naming}, and ")


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "comfyui"])
def test_plain_loras_go_by_any_names(naming: str) -> None:
    for kind in ("lora", "locon", "dylora"):
        assert problems(naming, "sdxl", kind) == []
    assert problems(naming, "flux1", "dora") == []
    assert problems("kohya", "sd15", "loha") == []
