"""RAJNI, training-free pruning by centred values and class attention, its keep ratio set block by
block from how sensitive the class token is (formulas as in RAJNI's published README and code).

The published code averages the decision over the batch and keeps the same patches in every image;
here each image has its own. `budget="calibrated"` freezes the counts found on calibration images
(static shapes, exportable); `budget="image"` lets every image decide, padded in a batch.
"""
