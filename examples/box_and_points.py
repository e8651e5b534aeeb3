"""A box with clicks in it."""

from pathlib import Path

import numpy as np
from PIL import Image

from sam3rt import SAM3InteractiveImagePredictor, load_model

PHOTOS = Path(__file__).parents[1] / "tests" / "photos"

predictor = SAM3InteractiveImagePredictor(load_model())

image = np.array(Image.open(PHOTOS / "chelsea.png").convert("RGB"))
predictor.set_image(image)

masks, scores, low_res_masks = predictor.predict(
    point_coords=np.array([[225, 150], [60, 280]]),
    point_labels=np.array([1, 0]),
    box=np.array([20, 10, 400, 290]),
    multimask_output=False,
)

print(f"mask {masks[0].shape}, score {scores[0]:.3f}")
