"""From the bytes of an image to the pixels that are shown: shape, decoding, cuts, masks."""
