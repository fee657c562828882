"""Drop-in layers: the constructor, forward, state_dict and errors of torch.nn, and fused blocks beside them."""
