"""Measuring a bundle: stages, side by side, curves, and the distance to the machine's limits."""

# What a run is made of, in the order in which it is measured. Fresh processes come first, before
# anything else takes memory.
PARTS = ("starts", "calls", "stages", "limits", "curves")
# Of these there are pictures.
PLOTS = ("calls", "curves", "limits")
RESULT = "bench.json"
