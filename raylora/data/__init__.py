"""From a folder of images and captions to the tensors of a training step.

The road, in file names: source → captions, decode, bucket → plan → encode → cache_write ‖
cache_read → dataset → steps, prefetch. Knows no Ray and no torch.
"""
