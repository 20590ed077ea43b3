"""The specification of every kernel in plain PyTorch, differentiated by autograd."""
