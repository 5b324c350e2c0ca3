"""Linear layers whose weight gradients are summed in float32 inside the matrix product."""
