"""What is made for one model must suit the others that it is compared with."""

from __future__ import annotations

from loadtest.targets.base import ModelInfo, fitting_all


def test_models_that_are_compared_get_the_limits_of_all() -> None:
    models = [ModelInfo("a", 900, 512, (5,)), ModelInfo("b", 1000, None, (7, 5)), ModelInfo("c", 950, 300)]
    fitting = fitting_all(models)
    assert [model.name for model in fitting] == ["a", "b", "c"]
    assert {(model.vocab_size, model.context_length, model.eos_token_ids) for model in fitting} == {(900, 300, (5, 7))}


def test_a_model_by_itself_stays_as_it_is() -> None:
    assert fitting_all([ModelInfo("a", 900, None, (5,))]) == [ModelInfo("a", 900, None, (5,))]
