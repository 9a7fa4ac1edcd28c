"""Options of networks: each shows in the adapter, or the job is refused."""

from __future__ import annotations

from typing import Any

import pytest

from raylora.adapt.idle import refuse_idle
from raylora.base.errors import OptionError
from raylora.base.site import Site
from raylora.networks import get_network

LINEAR = Site("unet.mid_block.attn1.to_q", "linear", 320, 320, block=12)
WIDE = Site("unet.mid_block.ff.net.2", "linear", 1280, 640, block=12, role="mlp")
CONV = Site(
    "unet.mid_block.conv1", "conv", 64, 64, kernel=(3, 3), padding=(1, 1), block=12, role="residual"
)
BLOCKS = (4,) * 25


def check(sites: list[Site], kind: str, **words: Any) -> None:
    refuse_idle(get_network(kind).options(kind=kind, **words), sites)


@pytest.mark.parametrize(
    ("sites", "words", "told"),
    [
        ([LINEAR], {"kind": "locon", "conv_rank": 4}, "conv_rank is 4, .* larger than 1x1"),
        ([LINEAR], {"kind": "locon", "conv_alpha": 4}, "conv_alpha is 4"),
        ([LINEAR], {"kind": "locon", "tucker": True}, "tucker is true"),
        ([LINEAR], {"kind": "loha", "tucker": True}, "tucker is true"),
        ([LINEAR], {"kind": "lokr", "tucker": True}, "tucker is true"),
        ([CONV], {"kind": "lokr", "tucker": True}, "tucker is true"),  # its blocks are both whole
        ([CONV], {"kind": "locon", "conv_rank": 8, "conv_block_ranks": BLOCKS}, "conv_rank is 8"),
        ([LINEAR], {"kind": "lora", "rank": 8, "block_ranks": BLOCKS}, "rank is 8.* has its own"),
        ([LINEAR], {"kind": "lora", "alpha": 8, "alphas": {"*": 4}}, "alpha is 8"),
        ([LINEAR], {"kind": "lora", "rank": 1, "alpha": 1, "scaling": "sqrt_rank"}, "scaling is"),
        ([LINEAR], {"kind": "lokr", "decompose_both": True}, "decompose_both is true"),
        ([LINEAR], {"kind": "lokr", "factor": 5000}, "factor is 5000"),
        ([CONV], {"kind": "lokr", "unbalanced": True}, "unbalanced is true"),
        ([CONV], {"kind": "lokr", "alpha": 4}, "alpha is 4"),
        ([CONV], {"kind": "lokr", "rank": 64}, "rank is 64"),
        ([LINEAR], {"kind": "lokr", "full_matrix": True, "ranks": {"*": 4}}, "ranks is given"),
        ([LINEAR], {"kind": "lycoris", "algo": "ia3", "ranks": {"*": 4}}, "ranks is given"),
        ([LINEAR], {"kind": "lycoris", "algo": "full", "block_ranks": BLOCKS}, "block_ranks is"),
    ],
)
def test_what_shows_in_no_layer_is_refused(sites: list[Site], words: dict[str, Any], told: str):
    with pytest.raises(OptionError, match=f"network.{told}.*Leave it out"):
        check(sites, **words)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ([CONV], {"kind": "locon", "conv_rank": 4}),
        ([CONV], {"kind": "locon", "conv_rank": 16, "conv_alpha": 16}),  # as without, in words
        ([CONV], {"kind": "locon", "conv_alpha": 4, "scaling": "sqrt_rank"}),
        ([CONV], {"kind": "locon", "tucker": True}),
        ([CONV], {"kind": "loha", "tucker": True}),
        ([CONV], {"kind": "lokr", "tucker": True, "rank": 2}),
        ([LINEAR], {"kind": "lora", "alpha": 16}),
        ([LINEAR, WIDE], {"kind": "lora", "rank": 8, "ranks": {"mlp": 8}}),
        ([WIDE], {"kind": "lokr", "decompose_both": True, "rank": 4}),
        ([LINEAR], {"kind": "lokr", "factor": 8}),
        ([WIDE], {"kind": "lokr", "unbalanced": True}),
        ([WIDE], {"kind": "lokr", "rank": 4000}),  # what makes both blocks whole
        ([LINEAR], {"kind": "lycoris", "algo": "full", "ranks": {"mlp": 0}}),
        ([LINEAR], {"kind": "lycoris", "algo": "boft", "rank": 4}),
        ([LINEAR], {"kind": "oft", "rank": 5, "alpha": 1e-3}),
    ],
)
def test_what_shows_in_a_layer_is_taken(sites: list[Site], words: dict[str, Any]):
    check(sites, **words)
