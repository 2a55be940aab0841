"""Read-outs: linear heads on the layers of a frozen encoder, trained by SGD or solved exactly."""
