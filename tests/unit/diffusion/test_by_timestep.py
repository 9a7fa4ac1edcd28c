"""Numbers by timestep are looked up where the timesteps are, and copied there once."""

from __future__ import annotations

import torch

from raylora.diffusion.by_timestep import ByTimestep


def test_a_number_is_that_of_its_timestep_in_float64():
    values = torch.tensor([0.5, 2.0, -1.0, 7.0])
    found = ByTimestep(values).at(torch.tensor([3, 0, 0, 2]))
    assert found.dtype == torch.float64
    assert found.tolist() == [7.0, 0.5, 0.5, -1.0]


def test_each_device_is_given_one_copy():
    table, timesteps = ByTimestep(torch.arange(5)), torch.tensor([1, 4])
    table.at(timesteps)
    [first] = table._copies.values()
    table.at(timesteps)
    assert table.at(timesteps.to("meta")).device.type == "meta"
    assert set(table._copies) == {torch.device("cpu"), torch.device("meta")}
    assert table._copies[torch.device("cpu")] is first
