"""RAJNI: training-free pruning by class attention and centred values, with a keep ratio per block
that follows from the sensitivity of the class token (formulas of RAJNI's README and code).

The published code averages the decision over the batch and keeps the same patches in every image;
here each image keeps its own. `budget="calibrated"` freezes the counts found on calibration images
(fixed shapes, exportable). `budget="image"` decides per image and pads the batch.

May import `methods.engine`, torch and timm, and no other method.
"""
