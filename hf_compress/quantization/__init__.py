"""Numbers of few bits: grids, ranges, fake quantization; tensors in, tensors out."""
