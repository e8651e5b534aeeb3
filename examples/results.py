"""One click, and the result as a picture, polygons, COCO JSON and a cut-out."""

from pathlib import Path

from sam3rt import load_model

PHOTOS = Path(__file__).parents[1] / "tests" / "photos"

model = load_model()
photo = PHOTOS / "chelsea.png"

result = model.segment_image(photo, points=[225, 150])
print(result)

best = result.best
best.save("overlay.png")
best.save("annotations.json")
best.crop()[0].save("cut-out.png")
outline = best.polygons(tolerance=1.0)[0][0]
print(f"{best.area[0]} pixels within {best.boxes[0].tolist()}, outlined by {len(outline)} points")
