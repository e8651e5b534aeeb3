"""A single click."""

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

best = np.argmax(scores)
print(f"best of {len(masks)} masks: {masks[best].shape}, score {scores[best]:.3f}")
