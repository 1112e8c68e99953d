"""Loading models: timm names, weight files, checkpoint layouts, and weights by digest."""
