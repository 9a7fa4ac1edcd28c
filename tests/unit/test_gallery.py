"""Which base a request means; stores written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from small import small_job

from raylora.base.errors import DataError, MissingObject, OptionError, WeightsError
from raylora.base.storage import Storage, open_storage
from raylora.gallery import choose, example, with_base
from raylora.serving.library import Library
from raylora.serving.options import RenderRequest, ServeOptions
from raylora.training.checkpoint import State, write_checkpoint


@pytest.fixture
def store(tmp_path) -> Storage:
    return open_storage(str(tmp_path))


def add_run(store: Storage, run: str, **overrides: Any) -> None:
    place = store.within(f"runs/{run}")
    place.write("job.yaml", yaml.safe_dump(small_job("s", name=run, **overrides).plain()).encode())
    write_checkpoint(place, State(6, {"values": torch.zeros(1)}, {}), run.encode())


def test_the_only_base_draws_requests_without_an_adapter(store):
    add_run(store, "cats", preview__prompts=["a cat"])
    add_run(store, "dogs", training__seed=1)
    library = Library(store)
    options = with_base(library, ServeOptions())
    assert choose(library, options, RenderRequest(prompt="x")) == ("cats", None)
    run, checkpoint = choose(library, options, RenderRequest(prompt="x", adapter="dogs"))
    assert (run, checkpoint and checkpoint.name) == ("dogs", "dogs/6")
    assert example(library, options) == {"prompt": "a cat", "adapter": "cats", "seed": 1}


def test_where_runs_have_several_bases_one_must_be_named(store):
    add_run(store, "cats")
    add_run(store, "dogs", training__precision="fp64")
    library = Library(store)
    options = with_base(library, ServeOptions())
    with pytest.raises(OptionError, match=r"several bases. Name a run with strength 0"):
        choose(library, options, RenderRequest(prompt="x"))
    named = with_base(library, ServeOptions(base="dogs"))
    assert choose(library, named, RenderRequest(prompt="x")) == ("dogs", None)


def test_what_cannot_be_served_is_found_before_anything_starts(store):
    with pytest.raises(DataError, match="holds no runs"):
        with_base(Library(store), ServeOptions())
    add_run(store, "cats", family__weights=f"{store.url}/nowhere")
    with pytest.raises(WeightsError, match="nowhere is not there"):
        with_base(Library(store), ServeOptions())
    with pytest.raises(MissingObject, match=r"adapter 'cat': no such run. Near: cats"):
        with_base(Library(store), ServeOptions(base="cat"))
