"""A second call that starts from the best mask of the first."""

from pathlib import Path

import numpy as np
from PIL import Image

from sam3rt import SAM3InteractiveImagePredictor, load_model

PHOTOS = Path(__file__).parents[1] / "tests" / "photos"

predictor = SAM3InteractiveImagePredictor(load_model())

image = np.array(Image.open(PHOTOS / "chelsea.png").convert("RGB"))
predictor.set_image(image)

masks, scores, low_res_masks = predictor.predict(
    point_coords=np.array([[225, 150]]),
    point_labels=np.array([1]),
    multimask_output=True,
)
best_mask = low_res_masks[np.argmax(scores)]

masks, scores, low_res_masks = predictor.predict(
    point_coords=np.array([[225, 150], [300, 200]]),
    point_labels=np.array([1, 1]),
    mask_input=best_mask[None, :, :],
    multimask_output=False,
)

print(f"refined mask {masks[0].shape}, score {scores[0]:.3f}")
