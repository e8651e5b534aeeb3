"""Write reference outputs of SAM 2's own predictor on a small synthetic SAM 2.1.

``SAM2ImagePredictor`` of the ``sam2`` package is run on drawn images with points, boxes and masks
as prompts, and what it returns is kept. README.md describes the files.

Needs Python 3.11 and, in an environment of its own, the packages::

    python3 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 numpy pillow scipy hydra-core==1.3.8 iopath==0.1.10 \
        tqdm setuptools wheel
    golden-env/bin/pip install --no-deps torchvision==0.28.0
    SAM2_BUILD_CUDA=0 golden-env/bin/pip install --no-deps --no-build-isolation sam2==1.1.0

Then, from the root of the repository::

    golden-env/bin/python -m tests.golden.sam2.make_golden

It takes a few seconds on one CPU core. Everything is computed in float32 on the CPU with one
thread, so that two runs on one machine give the same files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import types
from typing import Any

import numpy as np
import PIL.Image
import scipy.ndimage
import torch
from tests.golden.sam2 import synthetic
from tests.golden.sam3.synthetic import image as drawn_image
from torch.library import Library

# PyPI's torchvision is built for CUDA; beside a CPU-only PyTorch its import asks for these names.
_LIBRARY = Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sam2.modeling.backbones.hieradet import Hiera  # noqa: E402
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder  # noqa: E402
from sam2.modeling.position_encoding import PositionEmbeddingSine  # noqa: E402
from sam2.modeling.sam2_base import SAM2Base  # noqa: E402
from sam2.sam2_image_predictor import SAM2ImagePredictor  # noqa: E402

MODEL: dict[str, Any] = {
    "salt": "sam2-",
    "image_size": 256,
    "embed_dim": 16,
    "num_heads": 1,
    "stages": [1, 2, 4, 2],
    "window_spec": [8, 4, 14, 7],
    "global_att_blocks": [5],
    "window_pos_embed_bkg_spatial_size": [7, 7],
    "d_model": 256,
}
IMAGES = {"0": (600, 240, 320), "1": (601, 350, 150), "2": (602, 40, 56), "3": (603, 700, 1000)}
CENTRE = [[190.5, 96.25]]
PAIR = [[84.5, 60.0], [240.0, 200.75]]
BOX = [60.25, 40.5, 230.75, 190.0]
BOXES = [[60.25, 40.5, 230.75, 190.0], [10.0, 12.5, 120.0, 100.0], [150.0, 90.0, 319.5, 239.0]]


def call(
    name: str, image: int = 0, ctor: dict[str, Any] | None = None, **args: Any
) -> dict[str, Any]:
    """One call of ``predict``; ``mask_from`` is the case whose mask it takes and the channel."""
    case: dict[str, Any] = {"id": name, "image": image, "ctor": ctor or {}}
    source = args.pop("mask_from", None)
    if source is not None:
        case["mask_input"] = {"from_case": source[0], "channel": source[1]}
    return {**case, "args": args}


HOLES = {"max_hole_area": 12.0, "max_sprinkle_area": 20.0}
THRESHOLD = {"mask_threshold": 1.5, "max_hole_area": 8.0}
POINT = {"point_coords": CENTRE, "point_labels": [1]}
CASES = [
    call("point", **POINT),
    call("point_single", **POINT, multimask_output=False),
    call("points_pos_neg", point_coords=PAIR, point_labels=[1, 0], multimask_output=False),
    call("points_ignored", point_coords=PAIR, point_labels=[1, -1]),
    call("box", box=BOX, multimask_output=False),
    call("box_points", box=BOX, point_coords=PAIR, point_labels=[1, 0]),
    call("boxes", box=BOXES, multimask_output=False),
    call("boxes_multi", box=BOXES),
    call("points_batch", point_coords=[PAIR, PAIR[::-1]], point_labels=[[1, 0], [1, 1]]),
    call("logits", **POINT, return_logits=True),
    call(
        "normalized",
        point_coords=[[0.515625, 0.25], [0.25, 0.875]],
        point_labels=[1, 0],
        normalize_coords=False,
    ),
    call("refine", point_coords=PAIR, point_labels=[1, 1], mask_from=("point", 1)),
    call("refine_single", **POINT, mask_from=("box_points", 0), multimask_output=False),
    call("mask_only", mask_from=("point", 1)),
    call("no_prompt"),
    call("holes", ctor=HOLES, **POINT),
    call("holes_logits", ctor=HOLES, **POINT, return_logits=True),
    call("threshold", ctor=THRESHOLD, **POINT),
    call("image1_point", image=1, point_coords=[[75.0, 130.0]], point_labels=[1]),
    call("image1_box", image=1, box=[20.5, 60.0, 120.0, 300.25]),
    call("image2_point", image=2, point_coords=[[30.0, 14.5]], point_labels=[1]),
    call("image3_point", image=3, point_coords=[[600.0, 420.0]], point_labels=[1]),
    call("image3_box", image=3, box=[120.0, 80.0, 700.0, 610.0], multimask_output=False),
]
BATCH = {
    "batch_points": {
        "point_coords_batch": [[[100.0, 90.5]], [[80.25, 200.0]], [[20.0, 22.0]]],
        "point_labels_batch": [[1], [1], [1]],
    },
    "batch_boxes": {
        "box_batch": [BOX, [20.5, 60.0, 120.0, 300.25], [8.0, 6.0, 40.0, 33.5]],
        "multimask_output": False,
    },
}


def main() -> None:
    """Run the predictor and write ``keys.tsv``, ``cases.json`` and ``golden.npz``."""
    torch.set_num_threads(1)
    provide_components()
    model = build()
    images = {name: drawn_image(seed, h, w) for name, (seed, h, w) in IMAGES.items()}
    outputs: dict[str, np.ndarray[Any, Any]] = {}
    for name, image in images.items():
        outputs |= features_of(predictor(model, {}, image, name == "1"), name)
    pixels = predictor(model, {}, images["0"])._transforms(images["0"])
    outputs["image0/preprocessed"] = pixels.numpy()[:, ::21, ::21]
    cases = list(CASES)
    low_res: dict[str, np.ndarray[Any, Any]] = {}
    for case in cases:
        arguments = as_arrays(case["args"])
        if "mask_input" in case:
            source = case["mask_input"]
            arguments["mask_input"] = low_res[source["from_case"]][source["channel"]][None]
        image = images[str(case["image"])]
        result = predictor(model, case["ctor"], image, case["image"] == 1).predict(**arguments)
        low_res[case["id"]] = result[2]
        outputs |= keep(case, result)
    for name, arguments in BATCH.items():
        batch = bare_predictor(model, {})
        batch.set_image_batch([images[str(index)] for index in range(3)])
        for index, result in enumerate(
            zip(*batch.predict_batch(**as_arrays(arguments, 1)), strict=True)
        ):
            case = {"id": f"{name}_{index}", "image": index, "batch": True, "index": index}
            case |= {"ctor": {}, "batch_args": arguments}
            outputs |= keep(case, result)
            cases.append(case)
    rows = [
        f"{name}\t{'x'.join(map(str, tensor.shape))}\tfloat32"
        for name, tensor in model.state_dict().items()
    ]
    (synthetic.FOLDER / "keys.tsv").write_text("\n".join(rows) + "\n")
    document = {
        "packages": {
            name: importlib.metadata.version(name) for name in ("sam2", "torch", "torchvision")
        },
        "model": MODEL,
        "images": {
            name: {
                "seed": seed,
                "height": h,
                "width": w,
                "sha256": hashlib.sha256(images[name].tobytes()).hexdigest(),
            }
            for name, (seed, h, w) in IMAGES.items()
        },
        "cases": cases,
    }
    (synthetic.FOLDER / "cases.json").write_text(json.dumps(document, indent=1) + "\n")
    np.savez_compressed(synthetic.FOLDER / "golden.npz", **outputs)


def as_arrays(arguments: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Lists as arrays, or with ``depth`` 1 as lists of arrays."""

    def convert(value: Any, depth: int) -> Any:
        if not isinstance(value, list):
            return value
        return [convert(one, 0) for one in value] if depth else np.asarray(value)

    return {key: convert(value, depth) for key, value in arguments.items()}


def build() -> SAM2Base:
    """The small model, by the package's own classes and with what ``build_sam2`` sets.

    The parts for video are left out: nothing of an image goes through them.
    """
    widths = [MODEL["embed_dim"] * 2**stage for stage in range(4)]
    size = MODEL["d_model"]
    keys = ("embed_dim", "num_heads", "stages", "window_spec", "global_att_blocks")
    trunk = Hiera(
        **{key: MODEL[key] for key in keys},
        window_pos_embed_bkg_spatial_size=MODEL["window_pos_embed_bkg_spatial_size"],
    )
    neck = FpnNeck(
        PositionEmbeddingSine(size, normalize=True, scale=None, temperature=10000),
        size,
        widths[::-1],
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    model = SAM2Base(
        ImageEncoder(trunk, neck, scalp=1),
        memory_attention=None,
        memory_encoder=None,
        image_size=MODEL["image_size"],
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
        no_obj_embed_spatial=True,
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    state = model.state_dict()
    for name, tensor in state.items():
        tensor.copy_(torch.from_numpy(synthetic.weight(name, tuple(tensor.shape), MODEL["salt"])))
    return model.eval()


def provide_components() -> None:
    """Stand in for the package's CUDA kernel; without it the predictor would fill no holes.

    It labels 8-connected components (``connected_components.cu``) and gives each pixel its
    component's area.
    """

    def components(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels, areas = torch.zeros(mask.shape, dtype=torch.int32), torch.zeros(mask.shape)
        for index, one in enumerate(mask[:, 0].numpy()):
            found, count = scipy.ndimage.label(one, structure=np.ones((3, 3)))
            sizes = np.bincount(found.ravel(), minlength=count + 1)
            labels[index, 0] = torch.from_numpy(found)
            areas[index, 0] = torch.from_numpy(np.where(found > 0, sizes[found], 0))
        return labels, areas.int()

    import sam2

    kernel = types.ModuleType("sam2._C")
    kernel.get_connected_componnets = components  # type: ignore[attr-defined]
    sys.modules["sam2._C"] = kernel
    sam2._C = kernel


def bare_predictor(model: SAM2Base, options: dict[str, Any]) -> SAM2ImagePredictor:
    made = SAM2ImagePredictor(model, **options)
    # The class has the sizes of 1024 pixels written in.
    made._bb_feat_sizes = [(MODEL["image_size"] // step,) * 2 for step in (4, 8, 16)]
    return made


def predictor(
    model: SAM2Base, options: dict[str, Any], image: np.ndarray[Any, Any], as_pil: bool = False
) -> SAM2ImagePredictor:
    made = bare_predictor(model, options)
    made.set_image(PIL.Image.fromarray(image) if as_pil else image)
    return made


def features_of(made: SAM2ImagePredictor, name: str) -> dict[str, np.ndarray[Any, Any]]:
    fine, middle = (level.numpy() for level in made._features["high_res_feats"])
    coarse = made._features["image_embed"].numpy()
    return {
        f"image{name}/image_embed": coarse[:, ::8, ::4, ::4],
        f"image{name}/high_res_0": fine[:, ::8, ::16, ::16],
        f"image{name}/high_res_1": middle[:, ::8, ::8, ::8],
        f"image{name}/stats": np.array(
            [[a.mean(), a.std(), np.abs(a).max()] for a in (fine, middle, coarse)], np.float32
        ),
    }


def keep(case: dict[str, Any], result: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Note shapes in the case, and return what is kept of its result."""
    masks, iou, low_res = result
    parts = {"masks": masks, "iou": iou, "low_res": low_res}
    case["shapes"] = {part: list(array.shape) for part, array in parts.items()}
    case["masks_dtype"] = str(masks.dtype)
    case["mask_area"] = (masks > 0).sum(axis=(-2, -1)).ravel().tolist()
    name = case["id"]
    kept = {
        f"{name}/masks": np.packbits(masks > 0),
        f"{name}/low_res": low_res[..., ::3, ::3],
        f"{name}/iou": iou,
    }
    if case.get("args", {}).get("return_logits"):
        kept[f"{name}/logits"] = masks[..., ::7, ::7]
    return kept


if __name__ == "__main__":
    main()
