"""Cards by name, and what an hour of them costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.base.errors import JobError, OptionError
from raylora.base.units import GIB
from raylora.memory.cards import KNOWN, card_named, cards_named, known_name
from raylora.memory.prices import priced, read_prices


@pytest.mark.parametrize("name", KNOWN)
def test_a_card_is_found_by_its_own_word_in_any_case(name: str):
    assert card_named(name).name == name
    assert card_named(name.lower()).name == name


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA GeForce RTX 3060", "RTX3060-12G"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G"),
        ("NVIDIA A100-PCIE-40GB", "A100-40G"),
        ("Tesla V100-SXM2-32GB", "V100-32G"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_what_torch_calls_a_card_leads_to_its_figures(called: str, name: str):
    assert known_name(called) == name


@pytest.mark.parametrize("label", ["V100", "T4", "A10G", "L4", "L40S", "A100", "H100", "H200"])
def test_rays_labels_lead_to_the_smallest_card_that_has_them(label: str):
    card = card_named(label)
    assert card.name.startswith(label)
    same = [name for name in KNOWN if name.partition("-")[0] == label]
    assert card.total_bytes == min(card_named(name).total_bytes for name in same)


def test_a_size_that_is_not_listed_has_the_speed_of_its_name():
    large, usual = card_named("RTX4090-48G"), card_named("RTX4090")
    assert (large.name, large.total_bytes) == ("RTX4090-48G", 48 * GIB)
    assert (large.half_tflops, large.bandwidth_gbs) == (usual.half_tflops, usual.bandwidth_gbs)
    assert card_named("RTX4090-24G") == usual


def test_a_card_without_figures_is_refused_with_the_nearest_word():
    with pytest.raises(OptionError, match=r"RTX4900: no figures .*Did you mean 'RTX4090'"):
        card_named("RTX4900")
    with pytest.raises(OptionError, match="no figures are known"):
        card_named("NVIDIA GeForce RTX 3060 Ti")  # not the speed of an RTX 3060


def test_a_count_stands_for_as_many_cards():
    names = [card.name for card in cards_named(["2xA100-80G", "RTX4090"])]
    assert names == ["A100-80G", "A100-80G", "RTX4090"]
    with pytest.raises(OptionError, match="0 cards"):
        cards_named(["0xA100-80G"])


def test_turing_and_volta_compute_no_bfloat16():
    old = {name for name in KNOWN if not card_named(name).bf16}
    assert old == {"T4", "V100-16G", "V100-32G"}


def test_every_card_has_a_line_of_prices_and_a_known_price_has_its_date():
    prices = read_prices()
    assert set(prices) == set(KNOWN)
    for price in prices.values():
        assert price.dollars is None or (price.as_of and price.source)


def test_a_file_of_ones_own_replaces_what_it_names(tmp_path: Path):
    file = tmp_path / "prices.yaml"
    file.write_text(
        "NVIDIA GeForce RTX 4090: 0.5\nRTX4090-48G: {dollars: 0.8, as_of: 2026-01-02}\n"
    )
    prices = read_prices(str(file))
    assert prices["RTX4090"].dollars == 0.5
    assert prices["RTX4090-48G"].as_of == "2026-01-02"
    assert prices["H100"] == read_prices()["H100"]
    cards = priced([card_named("RTX4090"), card_named("RTX4090-48G"), card_named("T4")], prices)
    assert [card.dollars_per_hour for card in cards] == [0.5, 0.8, None]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("RTX4090: cheap", "RTX4090 is 'cheap', which is no price"),
        ("RTX4090: -1", "which is no price"),
        ("RTX4900: 1", "RTX4900 is no card. Did you mean 'RTX4090'"),
        ("RTX4090: {dolars: 1}", "Did you mean 'dollars'"),
    ],
)
def test_a_line_that_is_no_price_is_told(text: str, told: str, tmp_path: Path):
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=told):
        read_prices(str(file))


def test_a_file_of_prices_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(JobError, match="Give a file of prices"):
        read_prices(str(tmp_path / "none.yaml"))
