"""A click on the object and one on what is not to belong to it."""

from pathlib import Path

import numpy as np
from PIL import Image

from sam3rt import SAM3InteractiveImagePredictor, load_model

PHOTOS = Path(__file__).parents[1] / "tests" / "photos"

predictor = SAM3InteractiveImagePredictor(load_model())

image = np.array(Image.open(PHOTOS / "chelsea.png").convert("RGB"))
predictor.set_image(image)

masks, scores, low_res_masks = predictor.predict(
    point_coords=np.array([[150, 120], [172, 112]]),
    point_labels=np.array([1, 0]),
    multimask_output=True,
)

best = np.argmax(scores)
print(f"mask {masks[best].shape}, score {scores[best]:.3f}")
