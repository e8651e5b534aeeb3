"""A box."""

from pathlib import Path

import numpy as np
from PIL import Image

from sam3rt import SAM3InteractiveImagePredictor, load_model

PHOTOS = Path(__file__).parents[1] / "tests" / "photos"

predictor = SAM3InteractiveImagePredictor(load_model())

image = Image.open(PHOTOS / "chelsea.png").convert("RGB")
predictor.set_image(image)

masks, scores, low_res_masks = predictor.predict(
    box=np.array([20, 10, 400, 290]),
    multimask_output=False,
)

print(f"mask {masks[0].shape}, score {scores[0]:.3f}, area {int(masks[0].sum())}")
