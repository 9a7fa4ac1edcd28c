"""Every mistake in a section, at once, each in one sentence."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from raylora.base.options import Options, explain, known_as, words_at


class Lion(Options):
    name: Literal["lion"] = "lion"
    beta: float = Field(
        0.9, ge=0, lt=1, json_schema_extra=known_as(sd_scripts="--optimizer_args betas (two)")
    )


class Adam(Options):
    name: Literal["adam"] = "adam"
    rate: float
    """How far a step goes."""


class Network(Options):
    kind: Literal["lora", "loha"]
    rank: int = Field(4, ge=1)

    @field_validator("rank")
    @classmethod
    def _even(cls, rank: int) -> int:
        if rank % 2:
            raise ValueError(f"rank {rank} is odd. Choose {rank - 1} or {rank + 1}.")
        if rank > 100:
            raise ValueError(f"network.rank is {rank}, which is too many.")
        return rank


class Tree(Options):
    network: Network
    optimizer: Annotated[Adam | Lion, Field(discriminator="name")] = Lion()
    steps: int = Field(100, json_schema_extra=known_as(sd_scripts="--max_train_steps"))
    folders: tuple[str, ...] = ()
    workers: int | tuple[Network, ...] = 1
    note: str | None = None


def problems_of(**sections: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Tree(**sections)
    return explain(caught.value, Tree)


def test_every_mistake_is_found_in_one_go():
    found = problems_of(
        network={"kind": "lorra", "rank": 0, "rnak": 4}, step=3, steps="many", folders="one"
    )
    assert len(found) == 6
    for start in ("network.kind is 'lorra': ", "network.rank is 0: ", "steps is 'many': "):
        assert sum(problem.startswith(start) for problem in found) == 1
    assert "network.rnak: no such option. Did you mean 'rank'?" in found
    assert "step: no such option. Did you mean 'steps'?" in found
    assert all("\n" not in problem for problem in found)


def test_a_choice_names_what_is_allowed():
    (problem,) = problems_of(network={"kind": "lorra"})
    assert problem == "network.kind is 'lorra': input should be 'lora' or 'loha'."


def test_what_is_missing_is_named():
    assert problems_of() == ["network: missing. Give it a value."]
    assert problems_of(network={}) == ["network.kind: missing. Give it a value."]


def test_a_value_that_fits_no_branch_is_one_mistake():
    (problem,) = problems_of(network={"kind": "lora"}, workers="two")
    assert problem == "workers is 'two': input should be a valid integer or a list."


def test_mistakes_within_a_branch_are_told_without_its_name():
    network = {"kind": "lora"}
    found = problems_of(network=network, workers=[{"kind": "lora", "rnak": 2}, {"rank": 0}])
    assert found == [
        "workers.0.rnak: no such option. Did you mean 'rank'?",
        "workers.1.kind: missing. Give it a value.",
        "workers.1.rank is 0: input should be greater than or equal to 1.",
    ]
    (problem,) = problems_of(network=network, optimizer={"name": "adam", "rat": 1, "rate": 1})
    assert problem == "optimizer.rat: no such option. Did you mean 'rate'?"


def test_sections_and_lists_are_called_so():
    found = problems_of(network=3, folders="one", note=2)
    assert found == [
        "network is 3: input should be a section of options.",
        "folders is 'one': input should be a list.",
        "note is 2: input should be a valid string.",
    ]


def test_infinity_is_no_number():
    (problem,) = problems_of(network={"kind": "lora"}, optimizer={"name": "adam", "rate": 1e999})
    assert problem == "optimizer.rate is inf: input should be a finite number."


def test_a_sentence_that_names_the_option_is_not_prefixed():
    class Section(Options):
        low: int = 0

        @model_validator(mode="after")
        def _positive(self) -> Self:
            raise ValueError("section.low must be above 0.")

    class Root(Options):
        section: Section

    with pytest.raises(ValidationError) as caught:
        Root.model_validate({"section": {}})
    assert explain(caught.value, Root) == ["section.low must be above 0."]


def test_a_word_like_no_other_gets_all_that_are_allowed():
    (problem,) = problems_of(network={"kind": "lora", "zzz": 1})
    assert problem == "network.zzz: no such option. Allowed: kind, rank."


def test_a_validators_own_sentence_is_kept():
    (problem,) = problems_of(network={"kind": "lora", "rank": 3})
    assert problem == "network.rank: rank 3 is odd. Choose 2 or 4."


def test_a_long_value_is_shown_short():
    (problem,) = problems_of(network={"kind": "lora"}, steps="x" * 500)
    assert len(problem) < 200


def test_sections_are_frozen():
    tree = Tree(network=Network(kind="lora"))
    with pytest.raises(ValidationError, match="frozen"):
        tree.network.rank = 8


def test_a_default_is_checked_like_any_value():
    class Wrong(Options):
        rank: int = Field(0, ge=1)

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Wrong()


def test_the_text_under_a_field_reaches_the_schema():
    schema = Adam.model_json_schema()
    assert schema["properties"]["rate"]["description"] == "How far a step goes."


def test_words_of_a_section_are_found_by_its_path():
    assert words_at(Tree, "") == [
        "network",
        "optimizer",
        "steps",
        "folders",
        "workers",
        "note",
    ]
    assert words_at(Tree, "workers.0") == ["kind", "rank"]
    assert words_at(Tree, "network") == ["kind", "rank"]
    assert words_at(Tree, "steps") == []
    assert words_at(Tree, "nowhere.at.all") == []


def test_a_sentence_that_begins_with_its_place_is_not_given_it_twice():
    (told,) = problems_of(network={"kind": "lora", "rank": 102})
    assert told == "network.rank is 102, which is too many."
    (told,) = problems_of(network={"kind": "lora", "rank": 3})
    assert told == "network.rank: rank 3 is odd. Choose 2 or 4."


def test_a_word_of_sd_scripts_is_told_by_its_name_here():
    (told,) = problems_of(network={"kind": "lora"}, max_train_steps=3)
    assert told == (
        "max_train_steps: no such option. What sd-scripts calls max_train_steps is steps here."
    )
    (told,) = problems_of(network={"kind": "lora", "betas": 0.9})
    assert told == (
        "network.betas: no such option. What sd-scripts calls betas is optimizer.beta here."
    )
