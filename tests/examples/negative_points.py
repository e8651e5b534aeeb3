"""A click on the object and one on what is not to belong to it."""

import os

import numpy as np
from PIL import Image

from sam3rt import SAM3InteractiveImagePredictor, load_model

predictor = SAM3InteractiveImagePredictor(load_model(os.environ.get("BUNDLE")))

image = np.array(Image.open(os.environ["IMAGES"].split(os.pathsep)[0]).convert("RGB"))
predictor.set_image(image)

masks, scores, low_res_masks = predictor.predict(
    point_coords=np.array([[150, 120], [172, 112]]),
    point_labels=np.array([1, 0]),
    multimask_output=True,
)

best = np.argmax(scores)
print(f"mask {masks[best].shape}, score {scores[best]:.3f}")
