"""Tiny random models of many architectures.

``ZOO`` holds what must work, ``VARIANTS`` the same architectures with other heads and options, ``OTHERS`` whatever
else transformers has. All are builders by name: ``ZOO["bert"]()``, ``ZOO["bert"](attn_implementation="eager")``.
"""

from zoo.audio import AUDIO, AUDIO_VARIANTS, OTHER_AUDIO
from zoo.base import Tiny, join, randomize
from zoo.decoders import DECODER_VARIANTS, DECODERS, OTHER_DECODERS
from zoo.multimodal import MULTIMODAL, MULTIMODAL_VARIANTS, OTHER_MULTIMODAL
from zoo.seq2seq import OTHER_SEQ2SEQ, SEQ2SEQ, SEQ2SEQ_VARIANTS
from zoo.text import OTHER_TEXT, TEXT, TEXT_VARIANTS
from zoo.vision import OTHER_VISION, VISION_MODELS, VISION_VARIANTS

ZOO = join(TEXT, DECODERS, SEQ2SEQ, AUDIO, VISION_MODELS, MULTIMODAL)
VARIANTS = join(TEXT_VARIANTS, DECODER_VARIANTS, SEQ2SEQ_VARIANTS, AUDIO_VARIANTS, VISION_VARIANTS, MULTIMODAL_VARIANTS)
OTHERS = join(OTHER_TEXT, OTHER_DECODERS, OTHER_SEQ2SEQ, OTHER_AUDIO, OTHER_VISION, OTHER_MULTIMODAL)
ALL = join(ZOO, VARIANTS, OTHERS)

__all__ = ["ALL", "OTHERS", "VARIANTS", "ZOO", "Tiny", "randomize"]
