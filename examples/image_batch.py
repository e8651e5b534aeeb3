"""Three images in one batch, each with a click of its own."""

from pathlib import Path

import numpy as np
from PIL import Image

from sam3rt import SAM3InteractiveImagePredictor, load_model

PHOTOS = Path(__file__).parents[1] / "tests" / "photos"

predictor = SAM3InteractiveImagePredictor(load_model())

paths = [PHOTOS / f"{name}.png" for name in ("chelsea", "coffee", "astronaut")]
images = [np.array(Image.open(path).convert("RGB")) for path in paths]
predictor.set_image_batch(images)

masks_batch, scores_batch, low_res_batch = predictor.predict_batch(
    point_coords_batch=[np.array([[225, 150]]), np.array([[300, 180]]), np.array([[220, 120]])],
    point_labels_batch=[np.array([1]), np.array([1]), np.array([1])],
    multimask_output=True,
)

for path, masks, scores in zip(paths, masks_batch, scores_batch, strict=True):
    print(f"{path.name}: {masks.shape}, best score {scores.max():.3f}")
