"""Token ids and what goes with them, by what signature and config say."""

from typing import Any

import pytest
import torch
from model_facts import facts
from torch import nn
from transformers import PreTrainedConfig

from hf_compress.graph.input_facts import ModelFacts, decodes
from hf_compress.graph.input_text import TextMaker, num_padded, placeholder_id, takes_choices


def made(given: ModelFacts, **placeholders: int) -> dict[str, torch.Tensor]:
    return TextMaker(given, placeholders).make()


def test_a_model_that_reads_no_tokens_gets_none() -> None:
    assert made(facts("pixel_values", vocab_size=9)) == {}
    assert made(facts("input_ids")) == {}


def test_tokens_lie_between_start_and_end_and_the_last_text_is_shorter() -> None:
    special = {"cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0, "mask_token_id": 3}
    text = made(facts("input_ids", "attention_mask", vocab_size=20, **special))
    ids = text["input_ids"]
    assert ids.shape == (2, 7) and ids[:, 0].tolist() == [1, 1]
    assert ids[0, -1] == 2 and ids[1].tolist()[3:] == [2, 0, 0, 0]
    assert text["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    plain = torch.cat([ids[0, 1:-1], ids[1, 1:3]])
    assert plain.min() > 3 and plain.max() < 20


@pytest.mark.parametrize(("config", "first"), [({"bos_token_id": 4}, 4), ({"cls_token_id": 5, "bos_token_id": 4}, 5)])
def test_texts_start_with_the_class_token_or_the_first(config, first) -> None:
    ids = made(facts("input_ids", vocab_size=20, **config))["input_ids"]
    assert ids[:, 0].tolist() == [first, first]
    same = made(facts("input_ids", vocab_size=20, eos_token_id=4, bos_token_id=4))["input_ids"]
    assert same[0, 0] != 4 and same[0, -1] == 4


def test_long_texts_hold_a_question_and_its_separators() -> None:
    given = facts("input_ids", vocab_size=20, sep_token_id=2, question_token_id=6)
    assert (made(given)["input_ids"][:, 1:-1] == 2).sum() == 1  # too short: the end of the padded text alone
    assert made(given)["input_ids"][:, 1].tolist() == [6, 6]
    given.length = 8
    ids = made(given)["input_ids"]
    assert ids[:, 2:4].eq(2).all() and ids[0, -1] == 2 and (ids == 2).sum(dim=1).tolist() == [3, 3]


def test_placeholders_stand_in_front_and_come_on_top() -> None:
    given = facts(
        "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", vocab_size=20, image_token_id=7,
        audio_token_index=8, max_position_embeddings=12,
    )  # fmt: skip
    text = made(given, image=2, audio=1)
    ids = text["input_ids"]
    assert ids.shape == (2, 7 + 3) and ids[:, 1:4].tolist() == [[7, 7, 8]] * 2
    assert text["mm_token_type_ids"].tolist() == [[0, 1, 1, 3] + [0] * 6] * 2
    assert text["token_type_ids"].tolist() == [[0, 1, 1, 1] + [0] * 6] * 2
    assert "token_type_ids" not in made(given)
    assert made(given, image=8)["input_ids"].shape == (2, 8 + 2)
    given.length = 100
    assert made(given, image=2)["input_ids"].shape == (2, 12 - 2)
    assert made(facts("input_ids", vocab_size=5), video=1)["input_ids"][:, 1].tolist() == [0, 0]


def test_segments() -> None:
    types = made(facts("input_ids", "token_type_ids", vocab_size=20, type_vocab_size=2))["token_type_ids"]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert "token_type_ids" not in made(facts("input_ids", "token_type_ids", vocab_size=20, type_vocab_size=1))


def test_boxes_have_corners_in_order() -> None:
    boxes = made(facts("input_ids", "bbox?", vocab_size=20, max_2d_position_embeddings=60))["bbox"]
    assert boxes.shape == (2, 7, 4) and not boxes.is_floating_point() and boxes.max() < 60
    assert (boxes[..., :2] <= boxes[..., 2:]).all() and boxes[..., :2].max() < 30
    for given in (facts("input_ids", "bbox", vocab_size=20), facts("input_ids", "bbox?", vocab_size=20, dim_bbox=8)):
        relative = made(given)["bbox"]
        assert relative.is_floating_point() and (relative[..., :2] <= relative[..., 2:]).all()
    assert "bbox" not in made(facts("input_ids", "bbox?", vocab_size=20))


def test_languages() -> None:
    assert made(facts("input_ids", "lang_ids", vocab_size=20, languages=["en_XX"]))["lang_ids"].tolist() == [0, 0]
    assert "lang_ids" not in made(facts("input_ids", "lang_ids", vocab_size=20))


def test_tokens_of_the_decoder() -> None:
    given = facts(
        "input_ids", "decoder_input_ids?", vocab_size=20, is_encoder_decoder=True, decoder_start_token_id=3,
        eos_token_id=2, pad_token_id=0, bos_token_id=4, max_target_positions=8,
    )  # fmt: skip
    ids = made(given)["decoder_input_ids"]
    assert ids.shape == (2, 6) and ids[:, 0].tolist() == [3, 3]
    assert ids[0, -1] == 2 and ids[1, 2:].tolist() == [2, 0, 0, 0]
    given.length = 4
    assert made(given)["decoder_input_ids"].shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "config", "expected"),
    [
        (("input_ids", "decoder_input_ids?"), {"is_encoder_decoder": True}, True),
        (("input_ids", "decoder_input_ids?"), {}, False),
        (("pixel_values", "decoder_input_ids?"), {}, True),
        (("input_ids",), {"is_encoder_decoder": True}, False),
        (("input_ids", "decoder_input_ids?"), {"inner": PreTrainedConfig(is_encoder_decoder=True)}, True),
    ],
)
def test_who_decodes(arguments, config, expected) -> None:
    assert decodes(facts(*arguments, **config)) is expected


@pytest.mark.parametrize(("length", "batch_size", "expected"), [(7, 2, 3), (4, 2, 2), (2, 2, 0), (7, 1, 0), (5, 3, 3)])
def test_padding_leaves_a_start_and_an_end(length, batch_size, expected) -> None:
    given = facts("input_ids", vocab_size=9)
    given.batch_size = batch_size
    assert num_padded(given, length) == expected


@pytest.mark.parametrize(("value", "expected"), [(7, 7), (8, 8), (9, None), (-1, None), (0, 0), ([7], None)])
def test_placeholders_outside_the_vocabulary_are_none(value, expected) -> None:
    assert placeholder_id(facts("input_ids", vocab_size=9, image_token_id=value), "image") == expected
    assert placeholder_id(facts("input_ids", image_token_id=7), "image") is None


def test_choices_are_known_from_the_code() -> None:
    class Chooses(nn.Module):
        config = PreTrainedConfig()

        def forward(self, input_ids: Any) -> Any:
            num_choices = input_ids.shape[1]
            return input_ids.view(-1, num_choices)

    vars(Chooses.config)["vocab_size"] = 9
    given = ModelFacts(Chooses(), batch_size=2, length=5, seed=0)
    assert takes_choices(given) and not takes_choices(facts("input_ids"))
    assert made(given)["input_ids"].shape == (2, 3, 5)


def test_positions_limit_the_length() -> None:
    def limit(decoder: bool = False, **config: Any) -> int | None:
        return facts("input_ids", **config).max_length(decoder)

    assert limit() is None and limit(max_position_embeddings=-1) is None
    assert limit(max_position_embeddings=12) == 10 and limit(n_positions=9) == 7 and limit(n_positions=1) == 1
    sizes = {"max_position_embeddings": 12, "max_target_positions": 20}
    assert limit(**sizes) == 10 and limit(decoder=True, **sizes) == 18
    padded = facts("input_ids", max_position_embeddings=12)
    padded.model.positions = nn.Embedding(12, 2, padding_idx=4)
    padded.model.words = nn.Embedding(30, 2, padding_idx=9)
    assert padded.max_length() == 12 - 5


def test_special_tokens_are_found_by_kind() -> None:
    given = facts("input_ids", vocab_size=9, eos_token_id=[3, 4], pad_token_id=9, sep_token_id=0, cls_token_id=[])
    found = {kind: given.token_id(kind) for kind in ("eos", "pad", "sep", "cls", "bos")}
    assert found == {"eos": 3, "pad": None, "sep": 0, "cls": None, "bos": None}
    assert given.special_ids == {3, 4, 9, 0}


def test_fields_are_looked_up_in_the_nearest_config_or_that_of_a_kind() -> None:
    inner = PreTrainedConfig()
    vars(inner).update(width=5, depth=[7, 8], flag=True)
    given = facts("input_ids", width=3, vision_config=inner)
    assert given.lookup("width") == 3 and given.lookup("width", kind="vision") == 5
    assert given.lookup("width", kind="audio") == 3 and given.lookup("none", "depth") == [7, 8]
    assert given.lookup("none") is None
    assert given.number("none", "depth", default=1) == 7 and given.number("flag", default=2) == 2
    assert given.number("none", default=4) == 4
