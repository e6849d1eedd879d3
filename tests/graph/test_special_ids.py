import pytest
import tiny_models

from hf_compress import make_example_inputs


@pytest.mark.parametrize(("eos", "expected"), [(2, 2), ([5, 2], 5), (None, None), ([], None)])
def test_texts_end_with_the_first_id_that_ends_texts(eos, expected) -> None:
    """Llama 3 names several."""
    model = tiny_models.llama()
    model.config.eos_token_id = eos
    ids = make_example_inputs(model)["input_ids"]
    assert (ids[0, -1].item() == expected) == (expected is not None)
    model(ids)


def test_a_padding_id_of_minus_one_is_none() -> None:
    model = tiny_models.llama()
    model.config.pad_token_id = -1
    assert make_example_inputs(model)["input_ids"].min() >= 0
