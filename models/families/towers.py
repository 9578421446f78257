"""The text models of checkpoints that read images too. Images are refused where a request has one."""

from collections.abc import Mapping

from msgspec.structs import replace

from graphgen.models.families.family import Family
from graphgen.models.families.gemma import GEMMA3
from graphgen.models.families.llama import MINISTRAL3, MISTRAL
from graphgen.models.families.llama4 import LLAMA4

_OF_IMAGES = (
    *("vision_config", "image_token_id", "image_token_index", "image_seq_length", "mm_tokens_per_image"),
    *("boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "vision_feature_layer"),
    *("vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size"),
)
"""Keys beside the text model's config."""


def tower(text: Family, model_type: str, architecture: str, checkpoints: Mapping[str, float]) -> Family:
    """A row of the same layers, whose config and tensors lie deeper."""
    return replace(
        text,
        model_type=model_type,
        architecture=architecture,
        checkpoints=checkpoints,
        notes="text; images are refused, their encoder is not loaded",
        nested="text_config",
        unread=(*text.unread, *_OF_IMAGES),
        beside={"tie_word_embeddings": True},
        renames=(
            *(("language_model.model.", "model."), ("model.language_model.", "model.")),
            ("language_model.lm_head.", "lm_head."),
        ),
        ignored=("*vision_tower.*", "*vision_model.*", "*multi_modal_projector.*"),
    )


GEMMA3_TOWER = tower(
    GEMMA3,
    "gemma3",
    "Gemma3ForConditionalGeneration",
    {"Gemma 3 4B": 3.88, "Gemma 3 12B": 11.8, "Gemma 3 27B": 27.0},
)
MISTRAL3 = replace(
    tower(MISTRAL, "mistral3", "Mistral3ForConditionalGeneration", {"Mistral Small 3.1 24B": 23.6}),
    variant="of Mistral",
    when={"text_config.model_type": (None, "mistral")},
)
MISTRAL3_OF_MINISTRAL = replace(
    tower(MINISTRAL3, "mistral3", "Mistral3ForConditionalGeneration", MINISTRAL3.checkpoints),
    variant="of Ministral",
    when={"text_config.model_type": ("ministral3",)},
)
LLAMA4_TOWER = replace(
    tower(
        LLAMA4,
        "llama4",
        "Llama4ForConditionalGeneration",
        {"Llama 4 Scout 17B-16E": 107.8, "Llama 4 Maverick 17B-128E": 400.7},
    ),
    beside={"tie_word_embeddings": False},
)

FAMILIES = (GEMMA3_TOWER, MISTRAL3, MISTRAL3_OF_MINISTRAL, LLAMA4_TOWER)
