"""The words that GenEval's prompts are made of, and other names that detectors have for COCO's classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
PROMPT_TAGS: tuple[Tag, ...] = get_args(Tag)
RELATIONS: tuple[Relation, ...] = get_args(Relation)


@dataclass(frozen=True)
class Vocabulary:
    """The classes of objects and the colours that prompts may ask for."""

    classes: tuple[str, ...]
    colours: tuple[str, ...]


# COCO's 80 classes in its order, three of them renamed as in GenEval's object_names.txt; colours in its scorer's order.
GENEVAL = Vocabulary(
    classes=(
        *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
        *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
        *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
        *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
        *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
        *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
        *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
        *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book"),
        *("clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
    ),
    colours=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
)
# GenEval's name of a class by COCO's own, where the two differ, and by the older one of the list of labels that
# transformers' conversions of COCO detectors took over (coco-detection-mmdet-id2label.json).
GENEVAL_NAMES: Mapping[str, str] = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
